"""Spectra, and where they were cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, NumeralTickFormatter

from rankine.report import numbers as n
from rankine.report.charts import Axis, Json, add_tips, empty_figure, log_ticks
from rankine.report.palette import light
from rankine.report.schema import TargetReport

FLOOR = 1e-4  # singular values below this share of the largest are drawn at it
MANY = 16  # more lines than this are drawn thinner


class Curve(NamedTuple):
    """A target's spectrum over the share of its full rank, and where it was cut (if it was)."""

    target: TargetReport
    xs: list[float]
    ys: list[float]
    cut: tuple[float, float] | None


def spectra(groups: Sequence[Sequence[TargetReport]], height: int) -> list[Json | None]:
    """A chart per group (the targets of one role), all on the same axes; None where a group has
    no spectra."""
    drawn = [[c for target in group if (c := spectrum(target)) is not None] for group in groups]
    least = min((min(curve.ys) for curves in drawn for curve in curves), default=FLOOR)
    widest = max((curve.xs[-1] for curves in drawn for curve in curves), default=1.0)
    x_axis = Axis(0, 1.03 * widest, False)
    y_axis = Axis(min(least / 1.3, 0.5), 1.4, True)
    return [_spectra(curves, x_axis, y_axis, height) if curves else None for curves in drawn]


def _spectra(curves: Sequence[Curve], x_axis: Axis, y_axis: Axis, height: int) -> Json:
    """One line per block, darker with depth, and a dot at each cut."""
    plot = empty_figure(height, x_axis, y_axis)
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    plot.xaxis.ticker = [0, 0.25, 0.5, 0.75, 1] if x_axis.end < 0.8 else [0, 0.5, 1]
    plot.yaxis.ticker = log_ticks(y_axis.start, y_axis.end, wanted=2)
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[0000]")
    many = len(curves) > MANY
    depth = [i / max(len(curves) - 1, 1) for i in range(len(curves))]
    lines = plot.multi_line(
        "xs",
        "ys",
        source=ColumnDataSource(
            {
                "xs": [curve.xs for curve in curves],
                "ys": [curve.ys for curve in curves],
                "alpha": [(0.12 if many else 0.25) + 0.65 * share for share in depth],
                "target": [id_of(curve.target) for curve in curves],
                "rank": [rank_text(curve.target) for curve in curves],
            }
        ),
        line_color=light("blue"),
        line_alpha="alpha",
        line_width=0.75 if many else 1.5,
        name="lines",
    )
    plot.line([], [], line_color=light("orange"), line_width=3, name="picked")
    cuts = [curve.cut for curve in curves if curve.cut is not None]
    plot.scatter(
        [x for x, _ in cuts],
        [y for _, y in cuts],
        size=5 if many else 7,
        fill_color=light("orange"),
        line_color=light("paper"),
        line_width=1,
    )
    add_tips(plot, [lines], ("target", "rank"), line_policy="nearest")
    return dict(json_item(plot))


def spectrum(target: TargetReport) -> Curve | None:
    """The drawable part of a target's spectrum."""
    values = [n.real(value) for value in target.get("spectrum") or []]
    ranks = [n.real(rank) for rank in target.get("spectrum_ranks") or range(len(values))]
    full = full_rank(target) or max([r + 1 for r in ranks if r is not None], default=1)
    pairs = [
        ((r + 1) / full, max(v, FLOOR))
        for r, v in zip(ranks, values)
        if r is not None and v is not None
    ]
    if len(pairs) < 2:
        return None
    xs, ys = [_digits(x) for x, _ in pairs], [_digits(y) for _, y in pairs]
    rank = n.real(target.get("rank"))
    cut = None if rank is None or rank <= 0 else (rank / full, _between(rank / full, xs, ys))
    return Curve(target, xs, ys, cut)


def _digits(number: float) -> float:
    """What can be seen of a number: the page of a large model stays light."""
    return float(f"{number:.4g}")


def id_of(target: TargetReport) -> str:
    """What a target is called; the page's script finds its line by it."""
    return str(target.get("id") or target.get("path") or n.UNKNOWN)


def full_rank(target: TargetReport) -> int | None:
    """min(out, in), where the shape is known."""
    sides = [n.real(side) for side in target.get("shape") or []]
    known = [side for side in sides if side]
    return int(min(known)) if known else None


def rank_text(target: TargetReport) -> str:
    """ "96 of 192"."""
    rank, full = n.real(target.get("rank")), full_rank(target)
    if rank is None:
        return "not cut"
    return f"{rank:.0f} of {full}" if full else f"{rank:.0f}"


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The line's height at x; straight between points on the logarithmic axis."""
    for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:]):
        if x0 <= x <= x1 and x1 > x0:
            return float(y0 * (y1 / y0) ** ((x - x0) / (x1 - x0)))
    return ys[0] if x < xs[0] else ys[-1]
