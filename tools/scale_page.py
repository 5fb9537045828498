"""docs/scale.md: what the benchmarks of memory, time and ranks wrote, as tables and sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

ABOUT = """\
A model that does not fit into memory stays in its files: blocks come and go, moments are measured
on each weight's smaller side, and what waits between the stages lies in the work directory until
nobody asks for it again. `rankine plan` says beforehand what a run takes.

```bash
python -m benchmarks.scale.memory      # the first table
python -m benchmarks.speed.compress    # the second
python -m benchmarks.speed.ranks       # the third
```
"""


def page(results: Path, note: str, table: Table) -> str:
    """The page."""
    parts = ["# Scale", note, ABOUT]
    for name, section in (("scale", _memory), ("compress", _floor), ("ranks", _ranks)):
        file = results / f"{name}.json"
        if file.exists():
            parts.append(section(json.loads(file.read_text(encoding="utf-8")), table))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _memory(found: Mapping[str, Any], table: Table) -> str:
    rows = [
        [
            f"{row['shape']}, {row['blocks']} blocks",
            row["method"],
            f"{row['checkpoint_bytes'] / 1e9:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['scratch_bytes'] / row['checkpoint_bytes']:.2f}",
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in sorted(found["rows"], key=lambda r: (r["shape"], r["method"]))
    ]
    headers = ["model", "method", "weights, GB", "peak, GB", "scratch ÷ weights", "minutes"]
    return (
        "## Peak memory, scratch and time\n\nRandom weights of Llama's shape in bfloat16, "
        "vocabulary 32,000, 8 × 256 calibration tokens, measured before and after. Peaks are "
        "VmHWM, mapped file pages included; imports alone take "
        f"{found['imports_bytes'] / 1e9:.2f} GB. "
        f"{_machine(found['hardware'])}.\n\n" + table(headers, rows)
    )


def _floor(row: Mapping[str, Any], table: Table) -> str:
    floor = [[part, f"{seconds:.1f}"] for part, seconds in row["floor"].items()]
    total = sum(row["floor"].values())
    return (
        f"## What compressing cannot do without\n\n`svd_llm` on {row['blocks']} blocks of the "
        f"{row['shape']} shape with {row['tokens']} tokens took {row['seconds']:.0f} s, "
        f"{row['ratio']:.2f} × the sum of these parts ({total:.0f} s): forward passes without "
        "hooks, X Xᵀ of each distinct input in float64, one decomposition of each weight's "
        f"smaller Gram matrix, one root of each input, the bytes. {_machine(row['hardware'])}, "
        f"{row['threads']} threads.\n\n" + table(["part of the floor", "seconds"], floor)
    )


def _ranks(found: Mapping[str, Any], table: Table) -> str:
    parts = [name for name, row in found.items() if isinstance(row, dict) and "ratio" in row]
    rows = [
        [
            name,
            f"{found[name]['one']:.1f}",
            f"{found[name]['all']:.1f}",
            f"{found[name]['ratio']:.2f}",
        ]
        for name in parts
    ]
    headers = ["part", "1 rank, s", f"{found['ranks']} ranks, s", "ratio"]
    return (
        f"## A second rank\n\n`{found['method']}` on {found['blocks']} block(s) of hidden 1024, "
        f"{found['tokens']} tokens, one thread per rank on one machine, by turns; medians. "
        f"{_machine(found['hardware'])}.\n\n" + table(headers, rows)
    )


def _machine(hardware: Mapping[str, Any]) -> str:
    return f"{hardware['processor']}, {hardware['cores']} cores"
