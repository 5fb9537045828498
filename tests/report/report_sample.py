"""A run as the pipeline reports it: plausible figures of a small model, from a formula."""

import math
from typing import Any

WIDTH, KV, FFN, BLOCKS, VOCABULARY = 256, 128, 640, 7, 2048
SHAPES = {
    "q": (WIDTH, WIDTH),
    "k": (KV, WIDTH),
    "v": (KV, WIDTH),
    "o": (WIDTH, WIDTH),
    "gate": (FFN, WIDTH),
    "up": (FFN, WIDTH),
    "down": (WIDTH, FFN),
}
PATHS = {role: f"{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj" for role in SHAPES}

PROMPT = 'def mean(values):\n    """Arithmetic mean of a sequence."""\n'
BEFORE = (
    "    if not values:\n        raise ValueError('empty')\n    return sum(values) / len(values)\n"
)
AFTER = "    if not values:\n        raise ValueError\n    return sum(values, 0.0) / len(values)\n"


def target(role: str, block: int) -> dict[str, Any]:
    """One projection: steeper spectra early, more kept late and in v and down."""
    out, into = SHAPES[role]
    full = min(out, into)
    steep = {"q": 4.2, "k": 4.6, "v": 1.5, "o": 2.2, "gate": 2.6, "up": 1.9, "down": 1.7}[role]
    steep *= 1.25 - 0.07 * block
    ranks = sorted({round(i * (full - 1) / 63) for i in range(64)})
    spectrum = [
        math.exp(-steep * (rank / full) ** 0.8) * (1 - 0.35 * min(rank, 4) / 4) for rank in ranks
    ]
    share = max(0.16, min(1.0, 1.05 - 0.17 * steep + 0.03 * math.sin(3.0 * block + len(role))))
    rank = max(8, 8 * round(share * out * into / (out + into) / 8))
    keep = rank * (out + into) / (out * into)
    error = math.exp(-steep * (rank / full)) * 0.4
    return {
        "id": f"{block}.{role}",
        "path": f"model.layers.{block}.{PATHS[role]}",
        "role": role,
        "block": block,
        "shape": [out, into],
        "structure": {"kind": "low_rank", "rank": rank},
        "rank": rank,
        "keep": keep,
        "bits": 16 * rank * (out + into),
        "loss": 0.11 * error**2,
        "error": error,
        "spectrum": spectrum,
        "spectrum_ranks": ranks,
    }


def row(name: str, method: str, kind: str, keep: float, size: float, loss: float, **more: Any):
    """One line of the table; accuracy and speed follow from the rest."""
    speed = more.pop("speed", 412.0)
    accuracy = 0.683 - 0.21 * math.log(loss / 8.12)
    return {
        "name": name,
        "method": method,
        "kind": kind,
        "keep": keep,
        "bytes": int(size * 1e6),
        "perplexity": loss,
        "perplexity_interval": [loss * 0.988, loss * 1.012],
        "bits_per_byte": math.log2(loss) / 3.4,
        "accuracy": accuracy,
        "tokens_per_second": speed,
        "ratio_to_dense": speed / 412.0,
        "note": None,
        **more,
    }


def rows() -> list[dict[str, Any]]:
    """The demo's table: three methods at two sizes, and plain quantization."""
    return [
        row("dense", "dense", "dense", 1.0, 9.87, 8.12),
        row("auto 0.8", "auto", "result", 0.7993, 8.11, 8.41, speed=398.0),
        row("auto 0.6", "auto", "result", 0.5991, 6.34, 9.38, speed=405.0),
        row("svd_llm 0.8", "svd_llm", "result", 0.7988, 8.11, 8.96, speed=377.0),
        row("svd_llm 0.6", "svd_llm", "result", 0.5984, 6.33, 11.87, speed=391.0),
        row("svd 0.8", "svd", "result", 0.7988, 8.11, 10.02, speed=379.0),
        row("svd 0.6", "svd", "result", 0.5984, 6.33, 21.4, speed=393.0, note="two factors stored"),
        row("int8 (plain)", "rtn", "baseline", 0.5078, 5.51, 8.13, speed=240.0, note="weight-only"),
        row("int4 (plain)", "rtn", "baseline", 0.2812, 3.52, 8.97, speed=201.0, note="weight-only"),
    ]


def report() -> dict[str, Any]:
    """The whole of report.json."""
    targets = [target(role, block) for block in range(BLOCKS) for role in SHAPES]
    kept = {role: sum(_stored(t) for t in targets if t["role"] == role) for role in SHAPES}
    whole = {role: BLOCKS * 2 * out * into for role, (out, into) in SHAPES.items()}
    rest = {"embedding": 2 * VOCABULARY * WIDTH, "norms": 2 * WIDTH * (2 * BLOCKS + 1)}
    return {
        "schema": "1.0",
        "rankine": "0.1.0",
        "created": "2026-03-02T10:41:07+00:00",
        "command": "rankine compress embedded --method auto --keep 0.8 -o small",
        "subject": "auto 0.8",
        "model": {
            "name": "rankine/embedded-code-4m",
            "family": "llama",
            "parameters": 4_935_424,
            "bytes": 9_870_000,
            "dtype": "bfloat16",
        },
        "recipe": {
            "model": "embedded",
            "method": "auto",
            "keep": 0.8,
            "calibration": "embedded",
            "tokens": "128x1024",
            "seed": 0,
        },
        "fingerprints": {"model": "9c41f0d27a", "data": "e2b8815c03", "recipe": "47d1b6aa90"},
        "plan": {
            "bytes": 8_104_000,
            "seconds": 48.0,
            "memory": 1_210_000_000,
            "runs_on": ["transformers", "PEFT", "ONNX"],
            "notes": ["Smaller, not faster here: all layers are narrower than 512."],
        },
        "budget": {
            "asked": {"keep": 0.8},
            "keep": 0.7993,
            "bits": 12.79,
            "size": 8_110_000,
            "note": None,
        },
        "rows": rows(),
        "targets": targets,
        "bytes": {**rest, **kept},
        "bytes_before": {**rest, **whole},
        "samples": [{"prompt": PROMPT, "before": BEFORE, "after": AFTER}],
        "hardware": {"device": "cpu", "cores": 2, "memory": "8 GB"},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "times": {"survey": 14.2, "allocate": 0.4, "solve": 21.9, "check": 3.1, "evaluate": 30.3},
        "warnings": ["The calibration text has 131,072 tokens; 262,144 were asked for."],
    }


def short() -> dict[str, Any]:
    """The same report with few rows and targets, where a test renders many pages."""
    data = report()
    data["rows"] = [row for row in data["rows"] if row["name"] in SHORT]
    data["targets"] = [target("q", 0), target("q", 1)]
    return data


SHORT = ("dense", "auto 0.8", "svd 0.6", "int8 (plain)")


def _stored(one: dict[str, Any]) -> int:
    return 2 * one["rank"] * sum(one["shape"])
