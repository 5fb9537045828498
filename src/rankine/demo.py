"""The first thing a stranger runs: one model, three methods, two sizes, one honest table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankine import report
from rankine.engine import record
from rankine.errors import UserError
from rankine.pipeline import compress
from rankine.progress import Progress, named


@dataclass(frozen=True)
class Extent:
    """What is run, and on how much text."""

    methods: tuple[str, ...]
    sizes: tuple[float, ...]
    tokens: str
    eval_tokens: int


#: What two cores do within three minutes (`make claims` measures with intervals and seeds).
WHOLE = Extent(("svd", "svd_llm", "auto"), (0.8, 0.6), "48x512", 30_000)
#: What shows within half a minute that it works.
QUICK = Extent(("auto",), (0.6,), "8x256", 4_000)


def demo(
    output: Path,
    *,
    model: str = "embedded",
    quick: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress `model` with every method at every size (`quick`: with one, at one); returns the
    report of all runs.

    `output` gets one checkpoint per run, report.json and report.html. Raises UserError.
    """
    if output.exists() and not force:
        raise UserError(
            f"expected a new output directory, found {output}: choose another one, or --force to "
            "write into it"
        )
    extent = QUICK if quick else WHOLE
    reports: list[dict[str, Any]] = []
    for keep in extent.sizes:
        for method in extent.methods:
            place = output / f"{method}-{keep:g}"
            before = record.before(reports[0]) if reports else None  # measured once
            made = compress(
                model,
                output=place,
                method=method,
                keep=keep,
                progress=named(f"{method} {keep:g}", progress) if progress else None,
                before=before,
                tokens=extent.tokens,
                eval_tokens=extent.eval_tokens,
                force=force,
            )
            reports.append(made.report)
    whole: dict[str, Any] = dict(report.combine(reports))
    whole["samples"] = reports[-1]["samples"]  # of the last method at the smallest size
    report.write(whole, output)
    return whole
