"""Writes a checkpoint: a dense architecture's directory plus a patch in its config."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from rankine import compat
from rankine.checkpoint import card
from rankine.checkpoint.beside import final_name, written_beside
from rankine.checkpoint.form import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    MODELING,
    PATCH,
    QUANT_METHOD,
    TOKENIZER_CONFIG,
    WEIGHTS,
    read_json,
    write_sums,
)
from rankine.checkpoint.hub import id_of
from rankine.checkpoint.streamed import Streamed, Weights
from rankine.errors import UserError
from rankine.patch import Patch, standing


def save(
    model: nn.Module,
    directory: str | Path,
    patch: Patch | None = None,
    *,
    tokenizer: Any = None,
    source: str | Path | None = None,
    cost: str = "",
    force: bool = False,
    extra_files: Mapping[str, bytes | str] | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Save a patched model so that transformers (or `load(dir, into=module)`) reads it back.

    - `patch`: everything that differs from the dense architecture; None takes the one the model
      was compressed or loaded with. Its tensors are not read: the model holds them.
    - `tokenizer`: saved beside (transformers models).
    - `source`: the input's directory or hub id, whose licence, notices and base model the output
      inherits; None takes the place the model was loaded from.
    - `cost`: markdown for the card: what was lost and what was won.
    - `extra_files`: name → content of further files (a report).

    Returns the directory. Raises UserError when it exists (unless `force`, which replaces a model
    or an empty directory), and when the disk cannot take it; nothing half-written stays.
    """
    directory = Path(directory)
    with written_beside(directory, force) as beside:
        write(model, beside, patch, tokenizer, source, cost, max_shard_size)
        for name, content in (extra_files or {}).items():
            data = content.encode() if isinstance(content, str) else content
            (beside / name).write_bytes(data)
    return directory


def write(
    model: nn.Module,
    beside: Path,
    patch: Patch | None = None,
    tokenizer: Any = None,
    source: str | Path | None = None,
    cost: str = "",
    max_shard_size: str | int = "5GB",
    weights: Weights | None = None,
) -> None:
    """Write a model into a directory that `written_beside` gave: `save` for who measures the
    written files before they take their place. `weights`: where those of a skeleton are."""
    patch = patch_of(model) if patch is None else patch
    if is_pretrained(model):
        _save_pretrained(model, beside, patch, max_shard_size, weights)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, beside)
    else:
        _save_plain(model, beside, patch)
    write_card(model, beside, source, cost, bool(patch))
    write_sums(beside)


def is_pretrained(model: nn.Module) -> bool:
    """One of transformers' models, which save and load themselves?"""
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


def remember(model: nn.Module, patch: Patch) -> None:
    """Note on the model what stands in it (no tensors), so that `save` needs no patch."""
    model.rankine_patch = patch.without_tensors()  # type: ignore[assignment]


def patch_of(model: nn.Module) -> Patch:
    """The plan (no tensors) a model was compressed, loaded or saved with; of another one, what its
    modules say they are; empty for a dense one."""
    if isinstance(noted := getattr(model, "rankine_patch", None), Patch):
        return noted
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return standing(model)
    data = config if isinstance(config, Mapping) else config.to_dict()
    if data.get("quant_method") != QUANT_METHOD:
        raise UserError(
            f"expected a dense or a Rankine model, found one quantized by {data['quant_method']}"
        )
    return Patch.from_json(data)


# -- transformers -------------------------------------------------------------------------------
def _save_pretrained(
    model: Any, beside: Path, patch: Patch, max_shard_size: str | int, weights: Weights | None
) -> None:
    from rankine.checkpoint.hf import RankineConfig

    patch = untie_output(model, patch)
    if patch:
        model.config.quantization_config = RankineConfig.of(patch)
        compat.declare_tied(model, patch.tied)
    if isinstance(weights, Streamed):
        weights.write(beside)
    else:
        model.save_pretrained(beside, max_shard_size=max_shard_size)
    if patch:
        (beside / MODELING).write_bytes((Path(__file__).parent / MODELING).read_bytes())
        # Only in the file: a plain save_pretrained of the model in memory copies no code along.
        config = read_json(beside / CONFIG)
        names = compat.auto_classes(model.config)
        # In place of the input's own entries: they name code that neither ran nor lies here, which
        # whoever trusts this directory, as its card may ask, would fetch and run.
        ours = {auto: f"{Path(MODELING).stem}.{n}" for auto, n in names.items()}
        config["auto_map"] = ours or config.get("auto_map") or {}
        (beside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_tokenizer(tokenizer: Any, beside: Path) -> None:
    tokenizer.save_pretrained(beside)
    file = beside / TOKENIZER_CONFIG
    if not file.is_file() or not type(tokenizer).__module__.startswith("transformers."):
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.pop("auto_map", None) is not None:  # a stranger's code, as in the model's config
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def untie_output(model: Any, patch: Patch) -> Patch:
    """Where the patch replaces one end of tied embeddings, the config may not tie them again:
    transformers would look for a `weight` that a factored module does not have."""
    config = model.config
    if not getattr(config, "tie_word_embeddings", False):
        return patch
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    replaced = {id(model.get_submodule(path)) for path in patch.modules}
    if not any(id(end) in replaced for end in ends if end is not None):
        return patch
    config.tie_word_embeddings = False
    # transformers now declares no tie at all: those that still hold (a decoder's bias) are ours.
    names, ties = set(model.state_dict()), compat.tied_names(model)
    held = {a: b for a, b in ties.items() if a in names and b in names}
    compat.forget_tied(model, set(ties) - set(held))
    return patch | Patch(tied=held, config={"tie_word_embeddings": False})


def write_card(
    model: Any, beside: Path, source: str | Path | None, cost: str, patched: bool
) -> None:
    """The model card (README.md), with the licence and notices of `source`; writing it again, with
    what the measurements said, replaces it."""
    if not is_pretrained(model):
        text = card.plain_card(final_name(beside), type(model).__name__, cost)
        (beside / CARD).write_text(text, encoding="utf-8")
        return
    origin = str(source or getattr(model.config, "_name_or_path", "") or "")
    folder = Path(origin) if origin and os.path.isdir(origin) else None
    base = origin if origin and folder is None and origin.count("/") == 1 else None
    base = id_of(folder) if folder is not None else base
    if folder is not None:
        for file in card.notices(folder):
            shutil.copyfile(file, beside / file.name)
    architecture = type(model).__name__
    autos = [auto for auto, n in compat.auto_classes(model.config).items() if n == architecture]
    auto = autos[0] if autos else "AutoModel"
    fields = card.inherited(folder, base)
    text = card.card(final_name(beside), auto, fields, cost, patched)
    (beside / CARD).write_text(text, encoding="utf-8")


# -- any module ---------------------------------------------------------------------------------
def _save_plain(model: nn.Module, beside: Path, patch: Patch) -> None:
    save_file(own_tensors(model), beside / WEIGHTS)
    head = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
    text = json.dumps({**head, **patch.to_json()}, indent=2, sort_keys=True)
    (beside / PATCH).write_text(text + "\n", encoding="utf-8")


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every storage once (a tied tensor under its first name)."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors
