"""Peak resident memory and time of `rankine compress` on models of random weights.

    python -m benchmarks.scale.memory [SHAPE ...] [--methods svd_llm,auto] [--threads N]

Peaks are VmHWM of the whole process, mapped file pages included; the peak of a process that only
imports what `compress` needs is printed beside. Rows go to benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankine.checkpoint.shards import Spec, total_bytes, write_shards
from rankine.engine.record import hardware, versions
from rankine.tasks.embedded import embedded_model_dir

RESULTS = Path(__file__).resolve().parents[1] / "results" / "scale.json"
IMPORTS = "import rankine.pipeline, rankine.report.page; from transformers.models import llama"


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights, 16 bits each."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000

    def config(self) -> LlamaConfig:
        """What transformers builds."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=False,
            max_position_embeddings=2048,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )


SHAPES = {
    "1.1b": Shape(2048, 5632, 22, 32, 4),
    "1k x 32": Shape(1024, 2816, 32, 16, 4),
    "1k x 16": Shape(1024, 2816, 16, 16, 4),
    "tiny": Shape(256, 704, 4, 4, 2),
}


def build(shape: Shape, directory: Path) -> int:
    """Write the checkpoint, one tensor in memory at a time; returns its bytes of weights."""
    directory.mkdir(parents=True)
    shape.config().save_pretrained(directory)
    for file in embedded_model_dir().glob("*token*"):
        shutil.copy(file, directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config()).to(torch.bfloat16)
    specs = [Spec.of(name, tensor) for name, tensor in model.state_dict().items()]
    sizes = {spec.name: spec.shape for spec in specs}
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> torch.Tensor:
        if len(sizes[name]) == 1:
            return torch.ones(sizes[name], dtype=torch.bfloat16)
        std = sizes[name][1] ** -0.5
        return torch.empty(sizes[name]).normal_(std=std, generator=generator).bfloat16()

    write_shards(directory, specs, drawn, 10**9)
    return total_bytes(specs)


def watched(command: list[str], scratch: Path | None, threads: int) -> tuple[int, int, float]:
    """(peak resident bytes, peak bytes below `scratch`, seconds) of a command."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    start = time.perf_counter()
    peak = most = 0
    with subprocess.Popen(command, env=environment) as process:
        while process.poll() is None:
            peak = max(peak, _high_water(process.pid))
            if scratch is not None and scratch.exists():
                most = max(most, _below(scratch))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak, most, time.perf_counter() - start


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def _below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def measure(name: str, method: str, keep: float, memory: str, threads: int, place: Path) -> dict:
    """One row."""
    model = place / name.replace(" ", "")
    size = build(SHAPES[name], model) if not model.exists() else _below(model)
    output = place / f"{model.name}-{method}"
    shutil.rmtree(output, ignore_errors=True)
    work = output.with_name(output.name + ".rankine-work")
    command = [sys.executable, "-m", "rankine", "compress", str(model), "-o", str(output)]
    command += ["--method", method, "--keep", str(keep), "--tokens", "8x256", "--memory", memory]
    command += ["--eval-tokens", "2048", "--threads", str(threads)]
    peak, scratch, seconds = watched(command, work, threads)
    report = json.loads((output / "report.json").read_text())
    shutil.rmtree(output)
    return {
        **asdict(SHAPES[name]),
        "shape": name,
        "method": method,
        "keep": keep,
        "checkpoint_bytes": size,
        "peak_bytes": peak,
        "scratch_bytes": scratch,
        "seconds": round(seconds, 1),
        "times": report["times"],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["1.1b", "1k x 32", "1k x 16"])
    parser.add_argument("--methods", default="svd_llm,auto")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--memory", default="1.8GB", help="what the run is told it may use")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--place", type=Path, help="where the models are built (kept there)")
    asked = parser.parse_args()
    baseline, _, _ = watched([sys.executable, "-c", IMPORTS], None, asked.threads)
    print(f"imports alone: {baseline / 1e9:.2f} GB")
    with tempfile.TemporaryDirectory(prefix="rankine-scale-") as scratch:
        place = asked.place or Path(scratch)
        for name in asked.shapes:
            for method in asked.methods.split(","):
                row = measure(name, method, asked.keep, asked.memory, asked.threads, place)
                gb = {k: row[k] / 1e9 for k in ("checkpoint_bytes", "peak_bytes", "scratch_bytes")}
                print(
                    f"{name:8s} {method:8s} {gb['checkpoint_bytes']:.2f} GB of weights: peak "
                    f"{gb['peak_bytes']:.2f} GB, scratch {gb['scratch_bytes']:.2f} GB, "
                    f"{row['seconds']:.0f} s {row['times']}",
                    flush=True,
                )
                keep_row(row, baseline)


def keep_row(row: dict[str, Any], baseline: int) -> None:
    """Replace the row of this shape and method."""
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    same = ("shape", "method", "keep")
    rows = [r for r in known if [r[k] for k in same] != [row[k] for k in same]] + [row]
    about = {"hardware": hardware(), "versions": versions(), "imports_bytes": baseline}
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
