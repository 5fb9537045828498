"""Names and the version of the on-disk format (docs/format.md), and the policy on versions."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rankine.errors import UserError

QUANT_METHOD = "rankine"
#: major.minor. A reader takes every minor version up to its own; a new minor version only adds.
FORMAT_VERSION = "1.0"

CONFIG = "config.json"
PATCH = "patch.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODELING = "modeling_rankine.py"
CARD = "README.md"
#: Of the weight files, in the form that `sha256sum -c` reads.
SUMS = "SHA256SUMS"


def check_version(found: str) -> None:
    """Older versions pass for ever, a newer minor one warns, a newer major one is refused."""
    if re.fullmatch(r"\d+\.\d+", str(found)) is None:
        raise UserError(f'expected a format version such as "{FORMAT_VERSION}", found {found!r}')
    major, minor = (int(n) for n in found.split("."))
    our_major, our_minor = (int(n) for n in FORMAT_VERSION.split("."))
    if major > our_major:
        raise UserError(
            f"expected a checkpoint of format {our_major}.x or older, found format {found}: "
            "upgrade rankine to read it"
        )
    if major == our_major and minor > our_minor:
        warnings.warn(
            f"this checkpoint has format {found}, newer than the {FORMAT_VERSION} this rankine "
            "knows: it loads, without what is new in it",
            stacklevel=2,
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError when it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"expected to read {path}, found: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"expected JSON in {path}, found a damaged file: {error}") from None
    if not isinstance(data, Mapping):
        raise UserError(f"expected a JSON object in {path}, found {type(data).__name__}")
    return dict(data)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: those of the index, or all model*.safetensors."""
    index = directory / INDEX
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [n for n in names if not (directory / n).is_file()]
        if missing:
            raise UserError(
                f"expected the weight file {missing[0]} that {INDEX} names in {directory}, "
                "found none: copy the directory again"
            )
        return [directory / n for n in names]
    return sorted(directory.glob("model*.safetensors"))


def tensor_names(file: str | Path) -> set[str]:
    """Names in a safetensors header; raises UserError on a truncated or foreign file."""
    try:
        with safe_open(file, framework="pt") as f:
            return set(f.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"expected a complete safetensors file {file}, found a damaged one ({error}): "
            "copy or download it again"
        ) from None


def write_sums(directory: Path) -> None:
    """Note the hashes of the weight files: safetensors itself cannot tell a flipped bit."""
    lines = [f"{_sha256(file)}  {file.name}\n" for file in weight_files(directory)]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: Path) -> None:
    """Raises UserError where a weight file is not what SHA256SUMS says (if it is there)."""
    if not (directory / SUMS).is_file():
        return
    lines = (directory / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    for found, name in (line.split(maxsplit=1) for line in lines if len(line.split()) == 2):
        if (directory / name).is_file() and _sha256(directory / name) != found:
            raise UserError(
                f"expected {directory / name} as {SUMS} describes it, found other bytes: copy or "
                f"download it again, or delete {SUMS} if you changed the weights yourself"
            )


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"expected to read {file}, found: {error.strerror}") from None
