"""docs/speed.md: what the benchmarks under benchmarks/speed wrote, as tables and sentences.

Every figure is read from benchmarks/results, those in sentences too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
Rows = Mapping[str, Mapping[str, Any]]

DTYPES = ("float32", "bfloat16")
KEEPS = ("keep 0.7", "keep 0.5", "keep 0.3")
SMALLEST = KEEPS[-1]
SHOWN = ("dense", *KEEPS, "int8", "int4")
#: Layout of the results → what it is called here.
LAYOUTS = {"rows": "torch", "fused": "compiled"}

INTRO = """\
Decoding one sequence reads every weight once per token, so bytes decide. *Limit* is dense bytes ÷
stored bytes: what a form could win if reading were all. *Share* is the measured speed-up ÷ that
limit. *torch* runs layers as `nn.Linear` does; *compiled* is [`fused`](methods/fused.md), both
factors in one call, and its speed-ups are against a dense model that runs compiled too (int8 and
int4 are torch's kernels in both). Prefill and larger batches are bound by arithmetic: there a layer
at keep 0.5 does half the work in any form."""

MEASURE = """\
On your machine: `make bench`, or one by one

```text
python benchmarks/speed/factored_linears.py            # the first tables
python benchmarks/speed/factored_linears.py --widths   # the widths, which plans are made with
python benchmarks/speed/allocator.py                   # the allocator
```"""


def page(results: Path, note: str, table: Table) -> str:
    """The whole page from the files in `results`."""
    linears = json.loads((results / "factored_linears.json").read_text("utf-8"))
    allocator = json.loads((results / "allocator.json").read_text("utf-8"))
    parts = ["# Speed", note, INTRO]
    for key in sorted(k for k in linears if k.startswith("block")):
        parts += _blocks(linears[key], table)
    for key in sorted(k for k in linears if k.startswith("widths")):
        parts += _widths(linears[key], table)
    parts += [*_allocator(allocator, table), "## Measure it", MEASURE]
    return "\n\n".join(parts) + "\n"


def _blocks(found: Mapping[str, Any], table: Table) -> Iterator[str]:
    yield f"## Layers of a 1.1B model, {_threads(found)}"
    yield (
        f"{found['layers']} blocks of hidden 2048 and intermediate 5632, more than the caches "
        f"hold; one row of input; ranks in steps of {found['align']}; arms in turn, medians of "
        f"{found['repeats']}. {_hardware(found)}"
    )
    dtypes = {d: {name: _by_name(found, d, name) for name in LAYOUTS} for d in DTYPES}
    for dtype, forms in dtypes.items():
        yield f"### {dtype}"
        yield _block_table(forms, table)
    told = (
        _near_the_limit(dtypes),
        _beside_codes(dtypes),
        _not_by_speed_alone(dtypes["bfloat16"]),
    )
    yield "\n".join(f"- {sentence}" for sentence in told)


def _by_name(found: Mapping[str, Any], dtype: str, layout: str) -> Rows:
    return {row["name"]: row for row in found["tables"].get(f"{dtype} {layout}", [])}


def _block_table(forms: Mapping[str, Rows], table: Table) -> str:
    forms = {name: rows for name, rows in forms.items() if rows}
    headers = ["form", "MB", "limit"]
    for name in forms:
        headers += [f"{LAYOUTS[name]}: ms", "speed-up", "share"]
    body = []
    for name in SHOWN:
        first = forms["rows"][name]
        line = [name, f"{first['bytes'] / 1e6:.0f}", _times(first["limit"])]
        for rows in forms.values():
            row = rows[name]
            line += [f"{1e3 * row['seconds']:.1f}", _times(row["speedup"]), f"{row['share']:.2f}"]
        body.append(line)
    return table(headers, body)


def _near_the_limit(dtypes: Mapping[str, Mapping[str, Rows]]) -> str:
    spans = []
    for dtype, forms in dtypes.items():
        for name, rows in forms.items():
            if shares := [rows[keep]["share"] for keep in KEEPS if keep in rows]:
                span = f"{min(shares):.2f}–{max(shares):.2f}"
                spans.append(f"{span} in {dtype} {LAYOUTS[name]}")
    return f"Factored layers reach this share of their limit: {', '.join(spans)}."


def _beside_codes(dtypes: Mapping[str, Mapping[str, Rows]]) -> str:
    """Each form at its best, against dense through torch."""
    told = []
    for dtype, forms in dtypes.items():
        best = {
            name: max(r[name]["speedup"] * _base(forms, r) for r in forms.values() if r)
            for name in (SMALLEST, "int8", "int4")
        }
        told.append(f"in {dtype} " + ", ".join(f"{n} {_times(b)}" for n, b in best.items()))
    return f"Each form at its best, against dense through torch: {'; '.join(told)}."


def _not_by_speed_alone(forms: Mapping[str, Rows]) -> str:
    low, codes = (forms["rows"][name]["bytes"] / 1e6 for name in (SMALLEST, "int4"))
    return (
        f"Speed alone decides nothing: at 16 bits {SMALLEST} stores {low:.0f} MB and int4 "
        f"{codes:.0f} MB, and int4 usually loses far less; the report of a run shows both."
    )


def _base(forms: Mapping[str, Rows], rows: Rows) -> float:
    """Speed of a layout's dense weights against torch's."""
    return float(forms["rows"]["dense"]["seconds"] / rows["dense"]["seconds"])


def _widths(found: Mapping[str, Any], table: Table) -> Iterator[str]:
    columns = [(d, name) for d in DTYPES for name in LAYOUTS if f"{d} {name}" in found]
    curves = {column: found["{} {}".format(*column)] for column in columns}
    widths = [int(width) for width in curves[columns[0]]["speedups"]]
    yield f"## From which width factors pay, {_threads(found)}"
    yield f"Square layers at keep 0.7, more of them than the caches hold. {_hardware(found)}"
    body = [
        [str(width), *(_times(curve["speedups"][str(width)]) for curve in curves.values())]
        for width in widths
    ]
    body.append(["pays from", *(str(curve["faster_from"]) for curve in curves.values())])
    yield table(["width", *(f"{d}, {LAYOUTS[name]}" for d, name in columns)], body)
    yield (
        "- Below those widths a factored layer is smaller, not faster: the second call costs more "
        "than the bytes it saves. Plans say so, and `--fast` keeps such weights dense."
    )


def _allocator(found: Mapping[str, Any], table: Table) -> Iterator[str]:
    rows = found["rows"]
    yield "## The allocator"
    yield (
        f"{found['targets']} targets × {found['sizes']} sizes, bids like those of a 32-layer model "
        f"with grouped queries. {_hardware(found)}"
    )
    solved = any(row.get("gap_to_solver") is not None for row in rows)
    headers = ["keep", "ms", "loss above the dual bound", "budget used"]
    headers += ["above HiGHS's bound"] * solved
    body = [
        [
            f"{row['keep']:.2f}",
            f"{row['milliseconds']:.1f}",
            f"{row['gap']:.4%}",
            f"{row['used']:.4%}",
            *([_gap(row["gap_to_solver"])] * solved),
        ]
        for row in rows
    ]
    yield table(headers, body)
    slowest, widest = max(r["milliseconds"] for r in rows), max(r["gap"] for r in rows)
    yield (
        f"- One split of a budget takes at most {slowest:.0f} ms and loses at most {widest:.3%} "
        "against the bound that no split can beat."
    )


def _hardware(found: Mapping[str, Any]) -> str:
    name = found.get("cpu") or found.get("processor")
    capability = f" ({found['capability']})" if "capability" in found else ""
    clock = {"process_time": "CPU time of the process"}.get(found["clock"], "wall time")
    return (
        f"{name}{capability}, {_threads(found)} of {found['cores']} cores, torch "
        f"{found['torch']}, Python {found['python']}, {found['date'][:10]}; {clock}, "
        f"load average {found['load']:.1f}."
    )


def _threads(found: Mapping[str, Any]) -> str:
    return "one thread" if found["threads"] == 1 else f"{found['threads']} threads"


def _gap(value: float | None) -> str:
    return "none in time" if value is None else f"{value:.4%}"


def _times(value: float) -> str:
    return f"{value:.2f}×"
