"""Decoding through factored linear layers against its limit, beside int8 and int4.

    python benchmarks/speed/factored_linears.py              # writes results/factored_linears.json
    python benchmarks/speed/factored_linears.py --threads 2
    python benchmarks/speed/factored_linears.py --widths     # below which width factors do not pay

The layers of a 1.1B Llama block (hidden 2048, intermediate 5632, 256 key/value), three blocks, so
that the weights exceed the last-level cache; one row of input; equal dtype; arms interleaved,
medians. The limit of a speed-up is dense bytes ÷ factored bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from rankine.evaluation.linears import (
    ALIGN,
    BLOCK_1B,
    LinearSpeed,
    crossing,
    fair_clock,
    measure_linears,
    measure_widths,
)
from rankine.kernels.fused import missing

RESULTS = Path(__file__).resolve().parents[1] / "results" / "factored_linears.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: As `nn.Linear` stores and runs weights; torch's fastest layout for the dtype; our compiled form.
LAYOUTS = {"float32": ("rows", "columns", "fused"), "bfloat16": ("rows", "packed", "fused")}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--align", type=int, default=ALIGN, help="ranks in steps of this")
    parser.add_argument("--widths", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.widths:
        update(arguments.out, f"widths, threads {arguments.threads}", widths(arguments))
    else:
        update(arguments.out, f"block, threads {arguments.threads}", block(arguments))


def block(arguments: argparse.Namespace) -> dict[str, object]:
    """The table of one block shape."""
    tables: dict[str, object] = {}
    for name, dtype in DTYPES.items():
        for layout in LAYOUTS[name]:
            if layout == "fused" and missing():
                print(missing())
                continue
            rows = measure_linears(
                dtype=dtype,
                layers=arguments.layers,
                repeats=arguments.repeats,
                align=arguments.align,
                layout=layout,  # type: ignore[arg-type]
            )
            show(f"{name}, {layout}", rows)
            tables[f"{name} {layout}"] = [{**asdict(row), "share": row.share} for row in rows]
    setting = {"shapes": BLOCK_1B, "layers": arguments.layers, "align": arguments.align}
    return {**setting, "repeats": arguments.repeats, "tables": tables}


def widths(arguments: argparse.Namespace) -> dict[str, object]:
    """Speed-up of square layers at keep 0.7 by width."""
    found: dict[str, object] = {}
    for name, dtype in DTYPES.items():
        for layout in ("rows", "fused"):
            speedups = measure_widths(0.7, dtype, arguments.repeats, layout)  # type: ignore[arg-type]
            by_width = "  ".join(f"{width}: {s:.2f}x" for width, s in speedups.items())
            print(f"{name}, {layout}: {by_width}")
            print(f"  factors at keep 0.7 are faster from a width of {crossing(speedups)}")
            found[f"{name} {layout}"] = {"speedups": speedups, "faster_from": crossing(speedups)}
    return found


def show(title: str, rows: list[LinearSpeed]) -> None:
    """One table."""
    print(f"\n{title}\n          form       ms      MB   GB/s  speed-up  limit share")
    for row in rows:
        print(
            f"{row.name:>14} {row.seconds * 1e3:8.2f} {row.bytes / 1e6:7.1f} "
            f"{row.bytes / row.seconds / 1e9:6.1f} {row.speedup:8.2f}x {row.limit:5.2f}x "
            f"{row.share:5.2f}"
        )


def update(path: Path, key: str, found: dict[str, object]) -> None:
    """Put this run beside the others in the file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content[key] = {**conditions(), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten to {path}")


def conditions() -> dict[str, object]:
    """Hardware, versions, and how busy the machine was."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": fair_clock().__name__,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
