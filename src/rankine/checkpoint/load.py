"""Reads checkpoints: ours, dense ones, the embedded model; a directory, a hub id, any module."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rankine import structures
from rankine.checkpoint.fits import check_counts, check_fits, check_lengths, unbuildable
from rankine.checkpoint.form import (
    ADAPTER,
    CONFIG,
    PATCH,
    TOKENIZER_CONFIG,
    check_links,
    check_sums,
    check_version,
    headers,
    read_json,
    weight_files,
)
from rankine.checkpoint.hub import PLACES, cached, fetched, unreachable
from rankine.checkpoint.pickled import without_pickles
from rankine.errors import UserError
from rankine.kernels.fused import missing
from rankine.limits import allowing_pickles
from rankine.patch import Patch, assign
from rankine.structures.base import check_module
from rankine.tasks.embedded import embedded_model_dir

EMBEDDED = "embedded"
#: transformers copies a config many times over; one of 10,000 modules has a megabyte.
CONFIG_BYTES = 1 << 24
#: Keywords of `from_pretrained` for what lies on the hub beside a model's own files: transformers
#: fetches that itself.
OF_THE_HUB = {"trust_remote_code", "subfolder", "gguf_file"}
#: Where one of these is, there is a tokenizer.
TOKENIZER = ("tokenizer.json", TOKENIZER_CONFIG)


@dataclass(frozen=True)
class ModelInfo:
    """Where an opened model came from: what the user typed, and the local directory if any."""

    spec: str
    directory: Path | None
    patch: Patch

    @property
    def name(self) -> str:
        """What reports call it: the last part of what was typed."""
        return self.spec.rstrip("/").rpartition("/")[2] or self.spec


def load(
    where: str | Path,
    *,
    into: nn.Module | None = None,
    fused: bool = False,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> Any:
    """The model of a checkpoint, in its own class (`architectures` of config.json).

    `where` is a directory or a hub id; keywords go to transformers' `from_pretrained`, `dtype`
    defaults to "auto" (as saved). With `into`, the patch and all tensors go into that module,
    built by the caller as the dense architecture; it is returned. With `fused`, linear layers
    decode through compiled products (see `rankine.fused`); without a C compiler this warns. With
    `allow_pickle` a directory without safetensors is read all the same: the tensors in its
    pickles, and nothing else.

    Raises UserError for a path that is missing, no model, or damaged. The network is used for a
    hub id only, and not with HF_HUB_OFFLINE.
    """
    with allowing_pickles(allow_pickle):
        if into is None:
            model = _load_pretrained(where, kwargs)
        else:
            model = _load_into(Path(where).expanduser(), into)
    if fused:
        structures.fused(model)
        if (why := missing()) is not None:
            warnings.warn(why, stacklevel=2)
    return model


def _load_pretrained(where: str | Path, kwargs: dict[str, Any]) -> Any:
    directory = local_directory(str(where))
    if directory is None and not any(kwargs.get(name) for name in OF_THE_HUB):
        directory = directory_of(str(where), **{n: kwargs[n] for n in PLACES if n in kwargs})
    if directory is not None:
        check_directory(directory)
        if not (directory / CONFIG).is_file():
            raise UserError(
                f"expected a transformers model in {directory}, found a plain torch checkpoint: "
                "build the module yourself and call rankine.load(directory, into=module), or name "
                "what builds it: --into package.module:factory"
            )
    import rankine.checkpoint.hf  # noqa: F401  (registers, whoever imported what)

    place = str(directory or where)
    kwargs = {"dtype": "auto", "use_safetensors": True, **kwargs}  # never a pickle
    cls, _ = architecture(str(where), directory, **_hub_only(kwargs))
    try:
        return cls.from_pretrained(place, **kwargs)
    except OSError as error:
        raise _not_found(str(where), directory, error) from None
    except Exception as error:
        if directory is None or isinstance(error, UserError):
            raise
        if "ignore_mismatched_sizes" not in str(error):
            raise unbuildable(directory, error) from error
        raise UserError(
            f"expected weights in {place} of the sizes that its {CONFIG} states, found others: "
            "copy both from the same place again"
        ) from None


def open_model(
    spec: str, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> tuple[Any, Any, ModelInfo]:
    """(model in evaluation mode, its tokenizer or None, where it came from).

    `spec` is "embedded", a directory, or a hub id; `dtype` a torch dtype, its name, or "auto".
    Raises UserError as `load` does.
    """
    directory = directory_of(spec)
    model = load(directory, dtype=_dtype(dtype)).to(device).eval()
    from rankine.checkpoint.save import patch_of

    return model, tokenizer_of(str(directory)), ModelInfo(spec, directory, patch_of(model))


def directory_bytes(directory: str | Path) -> tuple[int, int]:
    """(bytes of the model's weight files, bytes of all files below its directory). Some directories
    hold the same weights once more, in another layout. Raises UserError as `weight_files` does."""
    weights = sum(file.stat().st_size for file in weight_files(Path(directory)))
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return weights, sum(file.stat().st_size for file in files)


def local_directory(spec: str) -> Path | None:
    """The directory a spec names (see `without_pickles`), that of the model in the package for
    "embedded", None for a hub id; raises UserError for anything else."""
    if spec == EMBEDDED:
        return embedded_model_dir()
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return without_pickles(path)
    if spec and path.exists():
        raise UserError(f"expected a model directory, found the file {spec}: name its directory")
    hub_like = spec.count("/") <= 1 and not spec.startswith((".", "/", "~")) and spec
    if not hub_like or "\\" in spec:
        raise UserError(f'expected a model directory, found nothing at "{spec}": check the path')
    return None


def directory_of(spec: str, **places: Any) -> Path:
    """The directory a spec names; of a hub id that of the local cache, filled from the hub where
    the model is not there yet. Raises UserError."""
    directory = local_directory(spec)
    return directory if directory is not None else without_pickles(fetched(spec, **places))


def directory_here(spec: str) -> Path | None:
    """The same without a network: None for a hub id that is not in the cache."""
    directory = local_directory(spec)
    found = cached(spec) if directory is None else None
    return directory if found is None else without_pickles(found)


def check_directory(directory: Path) -> None:
    """Raises UserError unless config and whole, unchanged safetensors files stand there."""
    described = [n for n in (CONFIG, PATCH) if (directory / n).is_file()]
    if not described and (directory / ADAPTER).is_file():
        raise UserError(
            f"expected a model in {directory}, found a PEFT adapter, which is none by itself: "
            "merge it into its base model (peft's merge_and_unload) and name the directory of that"
        )
    if not described:
        raise UserError(
            f"expected a model in {directory}, found no {CONFIG}: name the directory that holds "
            f"{CONFIG} and *.safetensors"
        )
    check_links(directory)
    config = read_json(directory / described[0], CONFIG_BYTES)
    check_counts(config, directory / described[0])
    files = weight_files(directory)
    if not files:
        raise UserError(
            f"expected *.safetensors weights in {directory}, found none: copy the directory again"
        )
    check_lengths(config, len(headers(*files)), directory)
    read_plan(directory)  # transformers copies a config several times before it looks at it
    check_sums(directory)


# -- transformers -------------------------------------------------------------------------------
def _hub_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "local_files_only", "revision", "token", "trust_remote_code")
    return {name: kwargs[name] for name in names if name in kwargs}


def architecture(spec: str, directory: Path | None, **kwargs: Any) -> tuple[Any, Any]:
    """(model class, config) of a model; held against the headers of the weights in `directory`,
    so that loading takes no more memory than they do. Runs no code that lies there, unless
    `trust_remote_code` says so. Raises UserError."""
    import transformers

    kwargs = {"trust_remote_code": False, **kwargs}
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory or spec), **kwargs)
    except (OSError, ValueError) as error:
        raise _not_found(spec, directory, error) from None
    except Exception as error:
        if directory is None or isinstance(error, UserError):
            raise
        raise unbuildable(directory, error) from error
    cls = _model_class(transformers, config)
    if directory is not None:
        check_fits(cls, config, directory)
    return cls, config


def _model_class(transformers: Any, config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    from rankine.compat import auto_classes

    known = auto_classes(config)
    names = ("AutoModelForCausalLM", "AutoModel")
    return getattr(transformers, next((n for n in names if n in known), "AutoModel"))


def _not_found(spec: str, directory: Path | None, error: Exception) -> UserError:
    if directory is None:
        return unreachable(spec, error)
    first = str(error).strip().split("\n")[0]
    return UserError(f"expected a readable model in {directory}, found: {first}")


def tokenizer_of(where: str) -> Any:
    """The tokenizer of a model directory or hub id, None where there is none (vision,
    click-through, a test's). Raises UserError for one that is there and cannot be read."""
    import transformers

    place = Path(where).expanduser()
    here = any((place / name).is_file() for name in TOKENIZER)
    if place.is_dir() and not here:
        return None  # transformers would make an empty one up for some families
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(place) if here else where, trust_remote_code=False
        )
    except Exception as error:  # of a dozen types, by which file is missing or damaged
        if not here:
            return None
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        raise UserError(
            f"expected a tokenizer in {where} that can be read, found another ({reason:.200}): "
            "copy its files again"
        ) from None


def _dtype(dtype: str | torch.dtype) -> Any:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f'expected a dtype such as "bfloat16" or "auto", found {dtype!r}')
    return found


# -- any module ---------------------------------------------------------------------------------
def read_plan(directory: Path) -> Patch:
    """The patch (no tensors) of a checkpoint; empty for a dense one. Checks the version."""
    if (directory / PATCH).is_file():
        data = read_json(directory / PATCH)
    else:
        data = read_json(directory / CONFIG).get("quantization_config") or {}
        if not isinstance(data, Mapping):
            raise UserError(
                f'expected an object as "quantization_config" in {directory / CONFIG}, found '
                f"{data!r:.40}"
            )
        if data.get("quant_method") != "rankine":
            return Patch()
    check_version(data.get("format_version", ""))
    return Patch.from_json(data)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        headers(file)  # raises a sentence on a damaged file
        tensors.update(load_file(file))
    return tensors


def _load_into(directory: Path, module: nn.Module) -> nn.Module:
    if not directory.is_dir():
        raise UserError(f"expected a checkpoint directory, found nothing at {directory}")
    directory = without_pickles(directory)
    check_directory(directory)
    patch, tensors = read_plan(directory), read_tensors(directory)
    absent = sorted(set(patch.modules) - set(patch.swap(module)))
    if absent:
        raise UserError(
            f"expected a module {absent[0]} in the {type(module).__name__}, found none: build it "
            "as it was before compression"
        )
    slots = module.state_dict(keep_vars=True)
    for name, value in tensors.items():
        _put(module, name, slots.get(name), value)
    patch.tie(module)
    for path in patch.modules:
        check_module(module.get_submodule(path))
    filled = module.state_dict(keep_vars=True)
    known = {id(filled[name]) for name in tensors}  # what is tied is stored once
    if (empty := next((n for n, t in filled.items() if id(t) not in known), None)) is not None:
        raise UserError(
            f"expected the tensor {empty} in {directory}, found none: copy the directory again, or "
            "build the module as it was before compression"
        )
    from rankine.checkpoint.save import remember

    remember(module, patch)
    return module


def _put(module: nn.Module, name: str, slot: Tensor | None, value: Tensor) -> None:
    if slot is None or slot.shape != value.shape:
        found = "none" if slot is None else f"shape {tuple(slot.shape)}"
        raise UserError(
            f"expected a place for {name} of shape {tuple(value.shape)} in the module, found "
            f"{found}: build it as it was before compression"
        )
    if slot.is_meta:
        # Memory of our own: a tensor at an odd place in a file takes other instructions, and its
        # products other roundings, than the one it was saved from.
        dtype = slot.dtype if value.is_floating_point() else value.dtype
        assign(module, name, torch.empty_like(value, dtype=dtype).copy_(value))
    else:
        with torch.no_grad():
            slot.copy_(value)
