"""The charts, as Bokeh documents in JSON. The page's script draws them and swaps the colours on
dark paper. The user's strings appear as data only (tooltips and text marks, which Bokeh shows
literally), never as titles or axis labels, which it would read as TeX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bokeh.core.properties import value
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d
from bokeh.models.renderers import GlyphRenderer
from bokeh.plotting import figure

from rankine.report import numbers as n
from rankine.report.labels import place
from rankine.report.palette import METHOD_COLOURS, METHOD_MARKS, light
from rankine.report.schema import Row, TargetReport
from rankine.report.terminal import name_of

FONT = "system-ui, sans-serif"
MARGINS = (64, 60)  # pixels beside and around the frame, for axes
LONGEST = 28  # characters of a name beside its point
FLOOR = 1e-4  # singular values below this share of the largest are drawn at it

Json = dict[str, Any]


class Axis(NamedTuple):
    """A range with room around the data."""

    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """Position along the axis, 0 to 1."""
        scale = math.log if self.log else float
        low, high = scale(self.start), scale(self.end)
        return (scale(value) - low) / (high - low)


def around(values: Sequence[float], margin: float, log: bool) -> Axis:
    """The values, and a share of their spread on both sides."""
    low, high = min(values), max(values)
    if log:
        room = math.exp(margin * (math.log(high / low) or 1.0))
        return Axis(low / room, high * room, True)
    room = margin * ((high - low) or abs(high) or 1.0)
    return Axis(low - room, high + room, False)


def log_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers on a logarithmic axis: the coarsest set with at least `wanted` of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(1, 10)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= wanted:
            return inside
    rough = (high - low) / wanted  # a narrow range is as good as linear
    unit = 10.0 ** math.floor(math.log10(rough))
    step = max(digit * unit for digit in (1, 2, 5) if digit * unit <= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


# -- bytes against perplexity -------------------------------------------------------------------
class Point(NamedTuple):
    """A row that can be drawn: megabytes (or the like) and perplexity."""

    x: float
    y: float
    row: Row


class Style(NamedTuple):
    """How the points of one series look."""

    mark: str
    colour: str
    hollow: bool


def tradeoff(rows: Sequence[Row], width: int, height: int) -> Json | None:
    """Bytes against perplexity, for a frame about `width` pixels wide; None below two points."""
    known = [(n.real(row.get("bytes")), n.real(row.get("perplexity")), row) for row in rows]
    sized = [(x, y, row) for x, y, row in known if x and y and x > 0 and y > 0]
    if len(sized) < 2:
        return None
    unit, divisor = _unit(max(x for x, _, _ in sized))
    points = [Point(x / divisor, y, row) for x, y, row in sized]
    x_axis = around([p.x for p in points], 0.08, log=False)
    y_axis = around([p.y for p in points], 0.12, log=True)  # equal steps are equal nats
    plot = _figure(height, x_axis, y_axis)
    plot.yaxis.ticker = log_ticks(y_axis.start, y_axis.end)
    plot.xaxis.axis_label, plot.yaxis.axis_label = f"{unit} on disk", "held-out perplexity"
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    drawn = [_series(plot, style, members) for style, members in styled(points)]
    _names(plot, points, x_axis, y_axis, width - MARGINS[0], height - MARGINS[1])
    _tips(plot, drawn, ("model", "on disk", "kept bits", "perplexity", "tokens/s"))
    return dict(json_item(plot))


def _unit(largest: float) -> tuple[str, float]:
    for unit, divisor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if largest >= divisor:
            return unit, divisor
    return "B", 1.0


def styled(points: Iterable[Point]) -> list[tuple[Style, list[Point]]]:
    """Points in series: dense, baselines, and one per method, each sorted by size."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.x):
        kind = str(point.row.get("kind") or "result")
        method = str(point.row.get("method") or point.row.get("name") or "")
        groups.setdefault(kind if kind != "result" else f"result {method}", []).append(point)
    fixed = {
        "dense": Style("diamond", "ink", False),
        "baseline": Style("square", "orange", True),
    }
    methods = sorted(key for key in groups if key not in fixed)
    count = len(METHOD_COLOURS)
    for i, key in enumerate(methods):
        fixed[key] = Style(METHOD_MARKS[i % count], METHOD_COLOURS[i % count], i >= count)
    return [(fixed[key], members) for key, members in groups.items()]


def _series(plot: figure, style: Style, members: Sequence[Point]) -> GlyphRenderer:
    colour = light(style.colour)
    xs, ys = [p.x for p in members], [p.y for p in members]
    if members[0].row.get("kind") == "result" and len(members) > 1:
        plot.line(xs, ys, line_color=colour, line_width=1.5, line_alpha=0.55)
    for point, (low, high) in _intervals(members):
        plot.segment([point.x], [low], [point.x], [high], line_color=colour, line_width=1.5)
    source = ColumnDataSource(
        {
            "x": xs,
            "y": ys,
            "model": [name_of(p.row) for p in members],
            "on disk": [n.size(p.row.get("bytes")) for p in members],
            "kept bits": [n.percent(p.row.get("keep")) for p in members],
            "perplexity": [n.perplexity(p.y) for p in members],
            "tokens/s": [n.rate(p.row.get("tokens_per_second")) for p in members],
        }
    )
    return plot.scatter(
        "x",
        "y",
        source=source,
        marker=style.mark,
        size=13 if style.mark == "diamond" else 10,
        line_color=colour,
        line_width=2,
        fill_color=light("paper") if style.hollow else colour,
    )


def _intervals(members: Sequence[Point]) -> list[tuple[Point, tuple[float, float]]]:
    found = []
    for point in members:
        bounds = point.row.get("perplexity_interval")
        pair = [n.real(b) for b in bounds] if isinstance(bounds, list) else []
        if len(pair) == 2 and pair[0] and pair[1] and pair[0] > 0:
            found.append((point, (pair[0], pair[1])))
    return found


def _names(
    plot: figure, points: Sequence[Point], x_axis: Axis, y_axis: Axis, width: float, height: float
) -> None:
    order = sorted(points, key=lambda p: str(p.row.get("kind")) == "result")
    pixels = [(width * x_axis.at(p.x), height * y_axis.at(p.y)) for p in order]
    labels = place(pixels, [_short(name_of(p.row)) for p in order], width, height)
    source = ColumnDataSource(
        {
            "x": [order[label.point].x for label in labels],
            "y": [order[label.point].y for label in labels],
            "text": [label.text for label in labels],
            "dx": [label.dx for label in labels],
            "dy": [-label.dy for label in labels],  # Bokeh's offsets grow downwards
            "align": [label.align for label in labels],
        }
    )
    names = plot.text(
        "x",
        "y",
        "text",
        source=source,
        x_offset="dx",
        y_offset="dy",
        text_align="align",
        text_baseline="middle",
        text_font=value(FONT),
        text_font_size="12px",
        text_color=light("ink"),
    )
    # Names stay legible where a line passes behind them.
    names.glyph.update(background_fill_color=light("paper"), background_fill_alpha=0.75)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


# -- spectra ------------------------------------------------------------------------------------
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
    return [_spectra(curves, min(least / 1.3, 0.5), height) if curves else None for curves in drawn]


def _spectra(curves: Sequence[Curve], least: float, height: int) -> Json:
    """One line per block, darker with depth, and a dot at each cut."""
    plot = _figure(height, Axis(0, 1.03, False), Axis(least, 1.4, True))
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    plot.xaxis.ticker = [0, 0.5, 1]
    plot.yaxis.ticker = log_ticks(least, 1.4, wanted=2)
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[0000]")
    depth = [i / max(len(curves) - 1, 1) for i in range(len(curves))]
    lines = plot.multi_line(
        "xs",
        "ys",
        source=ColumnDataSource(
            {
                "xs": [curve.xs for curve in curves],
                "ys": [curve.ys for curve in curves],
                "alpha": [0.25 + 0.65 * share for share in depth],
                "target": [id_of(curve.target) for curve in curves],
                "rank": [rank_text(curve.target) for curve in curves],
            }
        ),
        line_color=light("blue"),
        line_alpha="alpha",
        line_width=1.5,
        name="lines",
    )
    plot.line([], [], line_color=light("orange"), line_width=3, name="picked")
    cuts = [curve.cut for curve in curves if curve.cut is not None]
    plot.scatter(
        [x for x, _ in cuts],
        [y for _, y in cuts],
        size=7,
        fill_color=light("orange"),
        line_color=light("paper"),
        line_width=1,
    )
    _tips(plot, [lines], ("target", "rank"), line_policy="nearest")
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
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    rank = n.real(target.get("rank"))
    cut = None if rank is None or rank <= 0 else (rank / full, _between(rank / full, xs, ys))
    return Curve(target, xs, ys, cut)


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


# -- both ---------------------------------------------------------------------------------------
def _figure(height: int, x_axis: Axis, y_axis: Axis) -> figure:
    """An empty chart: no frame, no toolbar, quiet grid, transparent ground."""
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=Range1d(start=x_axis.start, end=x_axis.end),
        y_range=Range1d(start=y_axis.start, end=y_axis.end),
        y_axis_type="log" if y_axis.log else "linear",
        tools="",
        toolbar_location=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.grid.grid_line_color = light("line")
    plot.xgrid.grid_line_color = None
    plot.axis.axis_line_color = None
    plot.xaxis.axis_line_color = light("line")
    plot.axis.major_tick_line_color = None
    plot.axis.minor_tick_line_color = None
    plot.axis.major_label_text_font = FONT
    plot.axis.major_label_text_font_size = "12px"
    plot.axis.major_label_text_color = light("muted")
    plot.axis.axis_label_text_font = FONT
    plot.axis.axis_label_text_font_size = "12px"
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_label_text_color = light("muted")
    return plot


def _tips(
    plot: figure, renderers: Sequence[GlyphRenderer], columns: Sequence[str], **options: Any
) -> None:
    """Tooltips with one line per column; Bokeh escapes the values."""
    row = '<div class="tip"><span style="color: var(--muted)">{0}</span> @{{{0}}}</div>'
    text = "".join(row.format(column) for column in columns)
    hover = HoverTool(tooltips=text, renderers=list(renderers), show_arrow=False, **options)
    plot.add_tools(hover)
