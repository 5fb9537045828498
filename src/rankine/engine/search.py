"""The question asked backwards: the smallest model that holds a loss, by a few real runs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rankine.acceptance import figure
from rankine.discovery import get
from rankine.engine.record import before
from rankine.errors import AcceptanceError, UserError
from rankine.progress import named, quiet
from rankine.recipe import Recipe

#: Real compressions at most; each is evaluated on the held-out text.
TRIES = 5


def parse_max_loss(text: str) -> float:
    """Allowed rise of the log-perplexity: "1.02x" is ln 1.02, "0.05" is 0.05 nats."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e-?\d+)?)\s*(x?)\s*", str(text), re.IGNORECASE)
    try:
        value = float(found.group(1)) if found else math.nan
    except ValueError:
        value = math.nan
    rise = math.log(value) if found and found.group(2) and value > 0 else value
    if not math.isfinite(rise) or rise <= 0:
        raise UserError(
            f"expected --max-loss above the dense loss, such as 1.02x (perplexity) or 0.05 (nats "
            f"per token), found {text!r}"
        )
    return rise


def smallest_that_holds(
    compress: Callable[..., Any],
    recipe: Recipe,
    model: Any,
    output: Any,
    progress: Any,
    task: Any,
    tokenizer: Any,
) -> Any:
    """Bracket the keep by a few evaluated runs, then write the smallest that held.

    ln(gap) is close to linear in keep, so a secant on it converges in about three runs.
    """
    allowed = parse_max_loss(recipe.max_loss or "")
    _check_sized(recipe)
    given = {"task": task, "tokenizer": tokenizer}
    tried: dict[float, float] = {}
    known, keep = None, 0.8
    for _ in range(TRIES):
        fresh = copy.deepcopy(model)  # a module is compressed in place
        told = named(f"keep {keep:g}", progress or quiet)
        asked = at_keep(recipe, keep)
        result = compress(fresh, recipe=asked, before=known, progress=told, **given)
        known = known or before(result.report)
        tried[keep] = gap_of(result)
        keep = next_keep(tried, allowed)
        if keep in tried:
            break
    holding = [k for k, gap in tried.items() if gap <= allowed]
    if not holding:
        closest = min(tried.items(), key=lambda item: item[1])
        raise AcceptanceError(
            f"expected a size whose loss stays within {allowed:.4f} nats, found {closest[1]:.4f} "
            f"at keep {closest[0]:.3f}: allow more, choose another method, or quantize instead"
        )
    final = at_keep(recipe, min(holding), accept=recipe.accept)
    given["progress"] = progress
    result = compress(model, output=output, recipe=final, before=known, **given)
    result.report["search"] = {"allowed": allowed, "tried": tried}
    return result


def at_keep(recipe: Recipe, keep: float, accept: Sequence[str] = ()) -> Recipe:
    """The recipe of one try. Each has a work directory of its own: a journal serves one recipe."""
    asked = recipe.given("max_loss", "keep", "size", "bits", "accept")
    if recipe.work is not None:
        asked["work"] = str(Path(recipe.work) / f"keep-{keep:g}")
    return Recipe.of(**asked, keep=keep, accept=accept)


def _check_sized(recipe: Recipe) -> None:
    if recipe.stages:
        raise UserError("--max-loss sizes one method: give each stage of a chain its own budget")
    if not getattr(get(recipe.method, recipe.set), "sized", True):
        raise UserError(
            f"--max-loss looks for a size, and the knobs of {recipe.method} fix it: choose another "
            "method, or set its knobs"
        )


def gap_of(result: Any) -> float:
    """Held-out log-perplexity above dense; of a user's own task, its loss."""
    rows = {row["kind"]: row for row in result.report["rows"] if row["kind"] != "baseline"}
    after, before = rows["result"], rows["dense"]
    if figure(after, "perplexity") is not None:
        return math.log(after["perplexity"]) - math.log(before["perplexity"])
    if figure(after, "loss") is None:
        raise UserError(
            "expected a perplexity or a loss for --max-loss, found neither: give loss= and "
            "evaluation= batches, or say what must hold with --accept"
        )
    return float(after["loss"] - before["loss"])


def next_keep(tried: dict[float, float], allowed: float) -> float:
    """The next size to try, on a grid of 0.005; one already tried ends the search."""
    points = sorted(tried.items())
    holding = [(k, g) for k, g in points if g <= allowed]
    failing = [(k, g) for k, g in points if g > allowed]
    if holding and failing:
        (high, g_high), (low, g_low) = holding[0], failing[-1]
        slope = (math.log(max(g_high, 1e-6)) - math.log(max(g_low, 1e-6))) / (high - low)
        keep = high + (math.log(allowed) - math.log(max(g_high, 1e-6))) / slope
        keep = min(max(keep, low + 0.1 * (high - low)), high)
    elif failing:
        keep = min(0.5 * (failing[-1][0] + 1.0), 0.98)
    else:
        keep = max(holding[0][0] - 0.2, 0.1)
    # Rounded first: 0.555 × 200 is 111.00000000000001.
    return math.ceil(round(keep * 200, 6)) / 200
