"""safetensors files tensor by tensor: neither reading nor writing holds more than one."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rankine.checkpoint.form import INDEX, WEIGHTS

#: Bytes that a header is padded to, so that the data of every tensor lies evenly.
ALIGN = 8

#: torch dtype → its name in a header.
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Spec:
    """A tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Spec:
        """That of a tensor, meta or not."""
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        """Of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_file(path: Path, specs: Sequence[Spec], read: Callable[[str], Tensor]) -> str:
    """Write one file, asking `read` for each tensor in turn; returns its sha256. The bytes are on
    the disk when this returns."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.bytes],
        }
        start += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for data in _parts(struct.pack("<Q", len(text)) + text, specs, read):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _parts(
    head: bytes, specs: Sequence[Spec], read: Callable[[str], Tensor]
) -> Iterator[bytes | memoryview]:
    yield head
    for spec in specs:
        tensor = read(spec.name)
        if Spec.of(spec.name, tensor) != spec:
            raise AssertionError(f"{spec} was announced and {Spec.of(spec.name, tensor)} came")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def write_shards(
    directory: Path, specs: Sequence[Spec], read: Callable[[str], Tensor], limit: int
) -> None:
    """The weights of a model in files of at most `limit` bytes of data each (a larger tensor has
    its own), with the index that transformers reads where there are several."""
    shards = list(_split(specs, limit))
    if len(shards) == 1:
        write_file(directory / WEIGHTS, shards[0], read)
        return
    stem, suffix = WEIGHTS.split(".")
    places = {}
    for n, shard in enumerate(shards, 1):
        name = f"{stem}-{n:05d}-of-{len(shards):05d}.{suffix}"
        write_file(directory / name, shard, read)
        places.update({spec.name: name for spec in shard})
    total = sum(spec.bytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(specs: Sequence[Spec], limit: int) -> Iterator[list[Spec]]:
    shard: list[Spec] = []
    size = 0
    for spec in specs:
        if shard and size + spec.bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += spec.bytes
    yield shard


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a file and its name there."""

    file: Path
    name: str


def read_places(
    places: Mapping[str, Place], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in memory of its own; floating ones in `dtype` if given. Files are mapped only
    while they are read, so that their pages do not stay with the process."""
    by_file: dict[Path, list[str]] = {}
    for name, place in places.items():
        by_file.setdefault(place.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as f:
            for name in names:
                mapped = f.get_tensor(places[name].name)
                wanted = dtype if dtype is not None and mapped.is_floating_point() else mapped.dtype
                yield name, torch.empty_like(mapped, dtype=wanted).copy_(mapped)
                del mapped


def read_place(place: Place, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor."""
    return next(read_places({place.name: place}, dtype))[1]


def total_bytes(specs: Iterable[Spec]) -> int:
    """Of all their data."""
    return sum(spec.bytes for spec in specs)
