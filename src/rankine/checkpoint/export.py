"""Checkpoints for others: an ordinary dense one, a plain PEFT LoRA folder."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankine import compat
from rankine.checkpoint.beside import written_beside
from rankine.checkpoint.form import MODELING
from rankine.checkpoint.load import directory_of, load, tokenizer_of
from rankine.checkpoint.save import is_pretrained, patch_of, save
from rankine.errors import UserError
from rankine.modules import conceal, put
from rankine.patch import Patch, dense_patch


# -- dense --------------------------------------------------------------------------------------
def export_dense(
    where: str | Path | nn.Module,
    out: str | Path,
    *,
    force: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Merge a Rankine checkpoint (or a copy of a module) into an ordinary one that loads without
    rankine.

    It gives up the saving and keeps the function, up to rounding. Raises UserError where the
    architecture cannot hold the result (narrower widths, a function between factors, an added
    bias).
    """
    if isinstance(where, nn.Module):
        merged = copy.deepcopy(where)
        merged = merge(merged) if is_pretrained(merged) else dense_patch(merged).apply(merged)
        return save(merged, out, Patch(), force=force, max_shard_size=max_shard_size)
    source = directory_of(str(where))
    model = merge(load(source))
    return save(
        model,
        out,
        Patch(),
        tokenizer=tokenizer_of(str(source)),
        source=source,
        force=force,
        max_shard_size=max_shard_size,
    )


def merge(model: Any) -> Any:
    """Replace, in place, every structured module of a transformers model by the architecture's own
    kind of layer with the same weight; returns the model, without quantization config.

    Raises UserError where the architecture cannot hold the result; the model is then unusable.
    """
    patch = patch_of(model)
    dense = dense_patch(model)
    compat.forget_tied(model, patch.tied)
    conceal(dense.apply(model))
    skeleton = _skeleton(model)
    for path, like in skeleton.named_modules():
        if isinstance(like, nn.Linear | nn.Embedding) or type(like).__name__ == "Conv1D":
            _restore(model, path, like)
    _check_ordinary(model, skeleton)
    _forget_format(model)
    return model


def _forget_format(model: Any) -> None:
    """Nothing of the config or the instance may still say "rankine"."""
    if hasattr(model, "rankine_patch"):
        del model.rankine_patch
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    auto_map = getattr(model.config, "auto_map", None) or {}
    if any(str(name).startswith(Path(MODELING).stem) for name in auto_map.values()):
        del model.config.auto_map


def _skeleton(model: Any) -> nn.Module:
    """The dense architecture of the model's config, on meta."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton: nn.Module = type(model)(config)
    return skeleton


def _restore(model: nn.Module, path: str, like: nn.Module) -> None:
    """GPT-2's Conv1D stores its weight transposed: a merged linear layer goes back into one."""
    try:
        have = model.get_submodule(path)
    except AttributeError:
        raise _not_ordinary(path, "no such module") from None
    if type(like).__name__ != "Conv1D" or not isinstance(have, nn.Linear):
        return
    like.weight = nn.Parameter(have.weight.detach().mT.contiguous())
    like.bias = have.bias
    put(model, path, like)


def _check_ordinary(model: nn.Module, skeleton: nn.Module) -> None:
    want = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in sorted({*want, *have}):
        if want.get(name) != have.get(name):
            raise _not_ordinary(name, f"{have.get(name)} instead of {want.get(name)}")


def _not_ordinary(name: str, found: str) -> UserError:
    return UserError(
        f"expected a model that its architecture can hold densely, found {name} with {found}: "
        "it has no ordinary dense form, use the checkpoint as it is"
    )


# -- PEFT ---------------------------------------------------------------------------------------
def export_peft(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    out: str | Path,
    *,
    base: str = "",
    task_type: str | None = None,
    force: bool = False,
) -> Path:
    """Write residuals as a plain LoRA folder: {module path: (B (out, r), A (r, in))}, W + B A.

    `base` is the model the residuals belong to (directory or hub id). Every rank may differ.
    Raises UserError for factors that do not fit together.
    """
    from peft import LoraConfig

    if not factors:
        raise UserError("expected factors for at least one module, found none")
    ranks = {path: _rank(path, b, a) for path, (b, a) in factors.items()}
    # PEFT matches pattern keys as the end of a path: anchored, or a longer path would match too.
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    top = max(ranks.values())
    config = LoraConfig(
        r=top,
        lora_alpha=top,
        target_modules=sorted(factors),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),  # the same: the scale alpha / r is 1
        base_model_name_or_path=base or None,
        task_type=task_type,
        inference_mode=True,
    )
    tensors = {}
    for path, (b, a) in factors.items():
        stem = f"base_model.model.{path}"
        tensors[f"{stem}.lora_A.weight"] = a.detach().cpu().contiguous().clone()
        tensors[f"{stem}.lora_B.weight"] = b.detach().cpu().contiguous().clone()
    with written_beside(Path(out), force) as beside:
        config.save_pretrained(beside)
        save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
    return Path(out)


def _rank(path: str, b_or: Tensor, a_ri: Tensor) -> int:
    if b_or.ndim != 2 or a_ri.ndim != 2 or b_or.shape[1] != a_ri.shape[0]:
        raise UserError(
            f"expected factors (out, r) and (r, in) for {path}, found {tuple(b_or.shape)} and "
            f"{tuple(a_ri.shape)}"
        )
    return int(a_ri.shape[0])
