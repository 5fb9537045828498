"""The harness of all claims: arms are measured once, cached by what they depend on, compared in
pairs on the same held-out windows, and written as rows.

    python -m benchmarks.claims [SYSTEM ...] [--full] [--data DIR] [--docs]

A claim module has `TITLE` and `claims(lab) -> list[Row]`. `quick` rows are decidable in minutes;
`full` is the specification's own size. A row with rule "assert" that fails is published as failed,
with what was found (`why`). Statements about data that does not come with Python are measured
where `--data` (or RANKINE_DATA) names its folder; elsewhere their rows stay as they were.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rankine
from rankine.checkpoint import open_model
from rankine.engine.record import hardware, versions
from rankine.evaluation.perplexity import Interval, gap_ratio, paired_bootstrap
from rankine.pipeline import compress
from rankine.tasks import LanguageModelling
from rankine.tasks.score import LanguageScore, score_windows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "claims.json"
CACHE = ROOT / "benchmarks" / ".cache"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One re-measured statement. `holds` is decided by the claim, never typed in. `why`: what was
    found where it fails. `on` and `data`: model and data, where they are not the lab's own; `given`
    where only `--data` has them."""

    system: str
    claim: str
    budget: str
    baseline: str
    baseline_value: float
    value: float
    unit: str
    holds: bool
    interval: tuple[float, float] | None = None
    rule: str = "assert"
    note: str = ""
    seeds: tuple[int, ...] = SEEDS
    why: str = ""
    on: str = ""
    data: str = ""
    given: bool = False


@dataclass
class Lab:
    """A model, its data, and the arms measured so far."""

    system: str
    full: bool = False
    model: str = "embedded"
    data: Path | None = None
    log: Callable[[str], None] = print

    @property
    def profile(self) -> str:
        """ "quick" or "full"."""
        return "full" if self.full else "quick"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of calibration samples."""
        return SEEDS if self.full else SEEDS[:2]

    @property
    def tokens(self) -> str:
        """Calibration: sequences x length."""
        return "128x1024" if self.full else "32x1024"

    @property
    def eval_tokens(self) -> int:
        """Held-out tokens scored: the issue's 200k in full."""
        return 240_000 if self.full else 60_000

    @cached_property
    def _dense_model(self) -> Any:
        return open_model(self.model, "cpu", "auto")

    @cached_property
    def windows(self) -> Any:
        """The evaluation windows every arm is scored on."""
        _, tokenizer, _ = self._dense_model
        task = LanguageModelling(tokenizer, max_tokens=self.eval_tokens, window=1024)
        return task.windows("evaluation")

    def dense(self) -> LanguageScore:
        """The untouched model."""
        model, _, _ = self._dense_model
        return self._cached({"arm": "dense"}, lambda: self._score(model))

    def arm(
        self,
        method: str,
        keep: float,
        seed: int = 0,
        tokens: str = "",
        heal: Mapping[str, Any] | None = None,
        include: Sequence[str] = (),
        calibration: Path | None = None,
        **knobs: Any,
    ) -> LanguageScore:
        """One compression (of the weights that `include` names; calibrated on a text file of one's
        own; with the knobs `heal`, training after it), scored; from the cache when nothing it
        depends on has changed."""
        key = {
            "arm": method,
            "keep": keep,
            "seed": seed,
            "knobs": _shown(knobs),
            "tokens": tokens or self.tokens,
            **({"heal": _shown(heal)} if heal else {}),
            **({"include": list(include)} if include else {}),
            **({"text": digest(calibration)} if calibration else {}),
        }

        def run() -> LanguageScore:
            stages = [{"method": method, "keep": keep, "set": knobs}]
            stages += [{"method": "heal", "set": heal}] if heal else []
            result = compress(
                self.model,
                stages=stages,
                seed=seed,
                tokens=tokens or self.tokens,
                eval_tokens=self.eval_tokens,
                evaluate=False,
                include=tuple(include),
                **({"calibration": str(calibration)} if calibration else {}),
            )
            kept = result.report["budget"]["keep"]
            assert kept <= keep + 1e-9, f"{method} kept {kept} of {keep}"
            return self._score(result.model)

        return self._cached(key, run)

    def figures(self, key: Mapping[str, Any], run: Callable[[], list[float]]) -> list[float]:
        """What `run` measures, from the cache when nothing it depends on has changed. `key` must
        say everything that `run` does."""
        file = self._place(key, ".json")
        if not file.exists():
            start = time.perf_counter()
            found = run()
            CACHE.mkdir(parents=True, exist_ok=True)
            beside = file.with_suffix(".tmp")
            beside.write_text(json.dumps(found, allow_nan=False))
            beside.rename(file)
            self._say(key, f"{len(found)} figures", start)
        return [float(value) for value in json.loads(file.read_text())]

    def _score(self, model: Any) -> LanguageScore:
        return score_windows(model.to(torch.float32), self.windows)

    def _cached(self, key: Mapping[str, Any], run: Callable[[], LanguageScore]) -> LanguageScore:
        file = self._place(key, ".npz")
        if file.exists():
            with np.load(file) as data:
                return LanguageScore(data["nats"], data["counts"], data["hits"], data["bytes"])
        start = time.perf_counter()
        score = run()
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".tmp.npz")
        np.savez(beside, nats=score.nats, counts=score.counts, hits=score.hits, bytes=score.bytes)
        beside.rename(file)
        self._say(key, f"perplexity {score.perplexity:.4f}", start)
        return score

    def _place(self, key: Mapping[str, Any], suffix: str) -> Path:
        text = json.dumps([self.fingerprint, key], sort_keys=True)
        return CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}{suffix}"

    def _say(self, key: Mapping[str, Any], found: str, start: float) -> None:
        said = " ".join(f"{k}={v}" for k, v in key.items() if v not in ({}, ""))
        self.log(f"  {said}: {found} ({time.perf_counter() - start:.0f} s)")

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Code, data and versions: an arm is measured again only when one of them changed."""
        code = hashlib.sha256()
        for file in sorted((ROOT / "src" / "rankine").rglob("*.py")):
            if not any(part in ("cli", "report", "kernels", "evaluation") for part in file.parts):
                code.update(file.read_bytes())
        model, _, _ = self._dense_model
        weights = hashlib.sha256()
        for _, tensor in sorted(model.state_dict().items()):
            weights.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "code": code.hexdigest(),
            "model": weights.hexdigest(),
            "data": self.windows.fingerprint(),
            "torch": torch.__version__,
        }

    def gap_ratio(self, a: LanguageScore, b: LanguageScore) -> Interval:
        """(a − dense) / (b − dense) in log-perplexity, with a paired bootstrap interval."""
        return gap_ratio(a, b, self.dense())

    def difference(self, a: LanguageScore, b: LanguageScore) -> Interval:
        """Log-perplexity of a minus b, paired bootstrap."""
        return paired_bootstrap(a, b)


def digest(file: Path) -> str:
    """What says in a key that a file is the same."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _shown(knobs: Mapping[str, Any]) -> dict[str, str]:
    return {k: repr(v) for k, v in sorted(knobs.items())}


def write_rows(lab: Lab, rows: list[Row], command: str) -> None:
    """Replace this system's rows of this profile in claims.json; without the folder of data those
    that need it stay."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [
        r
        for r in known
        if (r["system"], r["profile"]) != (lab.system, lab.profile)
        or (lab.data is None and r.get("given", False))
    ]
    text = f"standard library of Python {platform.python_version()}, "
    text += f"{lab.windows.tokens:,} tokens scored"
    common = {
        "profile": lab.profile,
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
        "versions": {"rankine": rankine.__version__, **versions()},
    }
    for row in rows:
        found = dataclasses.asdict(row)
        where = {"model": found.pop("on") or lab.model, "data": row.data or text}
        how = {"command": f"RANKINE_DATA=DIR {command}" if row.given else command}
        kept.append({**found, **where, **how, **common})
    kept.sort(key=lambda r: (r["system"], r["profile"]))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
