"""Names and the version of the on-disk format (docs/format.md), and the policy on versions."""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from rankine.errors import UserError
from rankine.limits import JSON_BYTES, parse_json, read_text

QUANT_METHOD = "rankine"
#: major.minor. A reader takes every minor version up to its own; a new minor version only adds.
FORMAT_VERSION = "1.0"

CONFIG = "config.json"
PATCH = "patch.json"
#: What a folder of PEFT's holds in place of a config.
ADAPTER = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODELING = "modeling_rankine.py"
CARD = "README.md"
TOKENIZER_CONFIG = "tokenizer_config.json"
#: Of the weight files, in the form that `sha256sum -c` reads.
SUMS = "SHA256SUMS"


def check_version(found: str) -> None:
    """Older versions pass for ever, a newer minor one warns, a newer major one is refused."""
    if not isinstance(found, str) or re.fullmatch(r"\d{1,4}\.\d{1,4}", found) is None:
        raise UserError(
            f'expected a format version such as "{FORMAT_VERSION}", found {found!r:.40}'
        )
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


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most `most` bytes; raises UserError when it is none (see
    `rankine.limits`)."""
    data = parse_json(read_text(path, most), path)
    if not isinstance(data, Mapping):
        raise UserError(f"expected a JSON object in {path}, found {type(data).__name__}")
    return dict(data)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, as transformers chooses them: the single one, or those
    of the index; without either, all model*.safetensors.

    Raises UserError for an index that names a file elsewhere, none, or no safetensors file.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).exists():
        return named_in_index(directory, INDEX, (".safetensors",))
    return sorted(directory.glob("model*.safetensors"))


def named_in_index(directory: Path, index: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that an index maps tensors to: they stand beside it, and end in `suffixes`."""
    places = read_json(directory / index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(
            f'expected an object "weight_map" in {directory / index}, found {places!r:.40}'
        )
    for name in places.values():
        if not isinstance(name, str) or not name.endswith(suffixes) or set(name) & set("/\\:\0"):
            raise UserError(
                f"expected names of *{suffixes[0]} files beside {index} in {directory}, found "
                f"{name!r:.80}: this index does not come from an ordinary checkpoint"
            )
        if not (directory / name).is_file():
            raise UserError(
                f"expected the weight file {name} that {index} names in {directory}, "
                "found none: copy the directory again"
            )
    return [directory / name for name in sorted(set(places.values()))]


def check_links(directory: Path) -> None:
    """Raises UserError for a file that is a link out of the directory: what it leads to would be
    read, and copied into what is written. The hub's cache, whose files are links to its blobs, is
    known."""
    root = directory.resolve()
    inside = [root] + ([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])
    for file in directory.iterdir():
        if file.is_symlink() and not file.is_dir():
            goal = Path(os.path.realpath(file))
            if not any(goal.is_relative_to(place) for place in inside):
                raise UserError(
                    f"expected the files of {directory} in it, found {file.name}, a link to "
                    "another place: put a copy there, or name the directory where they are"
                )


class Header(NamedTuple):
    """What a safetensors file says of a tensor: the format's name of its dtype, its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Are they no integers (and no truth values)?"""
        return "F" in self.dtype


def tensor_names(file: str | Path) -> set[str]:
    """Names in a safetensors header."""
    return set(headers(file))


def headers(*files: str | Path) -> dict[str, Header]:
    """Name → header of the tensors in safetensors files. safetensors itself checks that the shapes
    fit the bytes that are there; raises UserError on a truncated or foreign file."""
    found: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
                found |= {n: Header(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"expected a complete safetensors file {file}, found a damaged one ({error}): "
                "copy or download it again"
            ) from None
        if (strange := next((n for n in found if not n.isprintable()), None)) is not None:
            raise UserError(f"expected printable names of tensors in {file}, found {strange!r:.60}")
    return found


def write_sums(directory: Path) -> None:
    """Note the hashes of the weight files: safetensors itself cannot tell a flipped bit."""
    lines = [f"{_sha256(file)}  {file.name}\n" for file in weight_files(directory)]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: Path) -> None:
    """Raises UserError where a weight file is not what SHA256SUMS says (if it is there)."""
    if not (directory / SUMS).is_file():
        return
    lines = read_text(directory / SUMS, JSON_BYTES).splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if len(line.split()) == 2)
    sums = {name: found for found, name in pairs}
    for file in weight_files(directory):
        if file.name in sums and sums[file.name] != _sha256(file):
            raise UserError(
                f"expected {file} as {SUMS} describes it, found other bytes: copy or "
                f"download it again, or delete {SUMS} if you changed the weights yourself"
            )


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"expected to read {file}, found: {error.strerror}") from None
