"""Weights in pickles (`.bin`, `.pt`, `.pth`): refused, as reading a pickle can run code; allowed by
the user, their tensors, and nothing else, are written anew as safetensors and read from there."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankine.checkpoint.beside import disk_errors
from rankine.checkpoint.form import INDEX, WEIGHTS, check_links, named_in_index, weight_files
from rankine.errors import UserError
from rankine.limits import JSON_BYTES, pickles_allowed

SUFFIXES = (".bin", ".pt", ".pth")
PICKLED_INDEX = "pytorch_model.bin.index.json"
#: What torch.save leaves beside weights in a training run, and no model needs.
OTHERS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")

#: Directory → its safetensors twin, for as long as the process lives.
_twins: dict[Path, tempfile.TemporaryDirectory[str]] = {}


def without_pickles(directory: Path) -> Path:
    """The directory itself, or where its weights are pickles its twin with safetensors, made at
    the first call. Raises UserError for pickles that are not allowed, or hold more than tensors."""
    if any(directory.glob("model*.safetensors")) or not (files := pickled_files(directory)):
        return directory
    if not pickles_allowed():
        raise UserError(
            f"expected *.safetensors weights in {directory}, found {files[0].name}, a pickle, "
            "which can run code when it is read: --allow-pickle takes the tensors in it and "
            "nothing else"
        )
    place = directory.resolve()
    if place not in _twins:
        check_links(directory)
        twin = tempfile.TemporaryDirectory(prefix="rankine-unpickled-")
        with disk_errors(Path(twin.name)):
            _convert(directory, files, Path(twin.name))
        _twins[place] = twin
    return Path(_twins[place].name)


def pickled_files(directory: Path) -> list[Path]:
    """Pickles that may hold a model's weights. Raises UserError for an index that names others."""
    if (directory / PICKLED_INDEX).is_file():
        return named_in_index(directory, PICKLED_INDEX, SUFFIXES)
    found = [f for f in directory.iterdir() if f.suffix in SUFFIXES and f.is_file()]
    return sorted(f for f in found if not f.name.startswith(OTHERS))


def _convert(directory: Path, files: list[Path], out: Path) -> None:
    for file in directory.iterdir():
        small = file.is_file() and file.stat().st_size <= JSON_BYTES  # config, tokenizer, licence
        if small and file.suffix not in SUFFIXES and file.name != PICKLED_INDEX:
            shutil.copyfile(file, out / file.name)
    places: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if files[1:] else WEIGHTS
        tensors = read_pickle(file)
        save_file(tensors, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if files[1:]:
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    weight_files(out)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, each in memory of its own; no code is run.
    Raises UserError for one that holds anything else."""
    try:
        found = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
        )
    except Exception as error:  # what unpickling a stranger's bytes raises has no end
        raise UserError(
            f"expected a file of tensors that torch.save wrote at {file}, found another "
            f"({type(error).__name__}): ask for safetensors"
        ) from None
    return {name: t.detach().contiguous().clone() for name, t in _tensors(found, file).items()}


def _tensors(found: Any, file: Path) -> dict[str, Tensor]:
    inner = found.get("state_dict", found) if isinstance(found, Mapping) else found
    named = isinstance(inner, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in inner.items()
    )
    if not named or not inner:
        raise UserError(
            f"expected a state dict (names and tensors) in {file}, found {type(found).__name__} of "
            "other things: save model.state_dict() there"
        )
    # A stride of 0 makes of one stored number as many as it likes.
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in inner.values())
    if wanted > 4 * file.stat().st_size:
        raise UserError(
            f"expected tensors of about the {file.stat().st_size:,} bytes of {file}, found some of "
            f"{wanted:,}: the file is damaged"
        )
    return dict(inner)
