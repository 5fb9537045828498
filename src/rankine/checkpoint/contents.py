"""What a checkpoint is made of, by its config and safetensors headers; no weight is loaded."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rankine import compat
from rankine.budget import format_bytes
from rankine.checkpoint.form import CONFIG, PATCH, QUANT_METHOD, headers, read_json, weight_files
from rankine.checkpoint.load import check_directory, directory_bytes, directory_here, read_plan
from rankine.errors import UserError
from rankine.limits import allowing_pickles
from rankine.patch import Patch


def inspect(where: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Format version, architecture, size, and for each compressed module its structure and bits.

    `where` is a checkpoint directory, ours or a dense one; with `allow_pickle` one whose weights
    are pickles is read too, their tensors and no code. Raises UserError for anything else.
    """
    with allowing_pickles(allow_pickle):
        return _contents(where)


def _contents(where: str | Path) -> dict[str, Any]:
    directory = directory_here(str(where))
    if directory is None:
        raise UserError(
            f"expected a checkpoint directory or a hub id that was downloaded, found nothing at "
            f"{where}: check the path"
        )
    check_directory(directory)
    plan, stored = read_plan(directory), _stored_bits(directory)
    below = _below(_as_loaded(directory, plan, stored))
    modules = {
        path: {**structure.to_json(), "stored_bits": below[path]}
        for path, structure in plan.modules.items()
    }
    weights, everything = directory_bytes(directory)
    return {
        "directory": str(where),
        "architecture": _architecture(directory),
        "format_version": _format_version(directory),
        "weight_bytes": weights,
        "total_bytes": everything,
        "stored_bits": sum(stored.values()),
        "modules": modules,
        "tied": dict(plan.tied),
        "adapter": sorted(plan.adapter),
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """`inspect`'s answer as text."""
    version = found["format_version"]
    kind = f"Rankine format {version}" if version else "dense, not compressed by Rankine"
    size = f"{format_bytes(found['weight_bytes'])} of weights"
    text = [
        f"{found['directory']}: {found['architecture']}, {kind}",
        f"{size}, {format_bytes(found['total_bytes'])} with everything beside them",
    ]
    modules = found["modules"]
    if not modules:
        return text
    share = sum(m["stored_bits"] for m in modules.values()) / max(found["stored_bits"], 1)
    kinds = Counter(m["kind"] for m in modules.values())
    made_of = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
    text += [f"{len(modules)} compressed modules ({made_of}), {share:.0%} of the stored bits", ""]
    return [*text, *_module_lines(modules)]


def _module_lines(modules: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    width = max(map(len, modules))
    for path, module in modules.items():
        fields = {k: v for k, v in module.items() if k not in ("kind", "stored_bits")}
        shown = " ".join(f"{k}={_short(v)}" for k, v in fields.items())
        stored = format_bytes(module["stored_bits"] // 8)
        yield f"{path:{width}}  {stored:>9}  {module['kind']} {shown}".rstrip()


def _short(value: Any) -> str:
    return (
        json.dumps(value, separators=(",", ":")) if isinstance(value, dict | list) else str(value)
    )


def _as_loaded(directory: Path, plan: Patch, stored: Mapping[str, int]) -> dict[str, int]:
    """`stored` under the names that the model has for the tensors. Only mixtures of experts call
    some otherwise, and the answer takes transformers, which takes a second to import."""
    if not any(path.endswith("_bank") for path in plan.modules):
        return dict(stored)
    names = compat.loaded_names(str(read_json(directory / CONFIG).get("model_type")), stored)
    return {names[name]: bits for name, bits in stored.items()}


def _architecture(directory: Path) -> str:
    if not (directory / CONFIG).is_file():
        return "a plain torch module"
    config = read_json(directory / CONFIG)
    named = config.get("architectures") or config.get("model_type", "unknown architecture")
    return str(named[0] if isinstance(named, list) else named)


def _format_version(directory: Path) -> str | None:
    if (directory / PATCH).is_file():
        return str(read_json(directory / PATCH)["format_version"])
    quantization = read_json(directory / CONFIG).get("quantization_config") or {}
    ours = isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD
    return str(quantization["format_version"]) if ours else None


def _stored_bits(directory: Path) -> dict[str, int]:
    """Tensor name → bits in the files."""
    found: dict[str, int] = {}
    for file in weight_files(directory):
        headers(file)  # raises a sentence on a damaged file
        found.update(_header_bits(file))
    return found


def _header_bits(file: Path) -> dict[str, int]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {n: 8 * (e["data_offsets"][1] - e["data_offsets"][0]) for n, e in header.items()}


def _below(stored: Mapping[str, int]) -> Counter[str]:
    """Module path → bits of all tensors below it."""
    found: Counter[str] = Counter()
    for name, bits in stored.items():
        while name := name.rpartition(".")[0]:
            found[name] += bits
    return found
