"""The trade-off curve: bytes against perplexity (or the user's loss, or their first figure), with
the baselines on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bokeh.core.properties import value
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, NumeralTickFormatter
from bokeh.models.renderers import GlyphRenderer
from bokeh.plotting import figure

from rankine.acceptance import metrics
from rankine.report import numbers as n
from rankine.report.charts import FONT, Axis, Json, add_tips, around, empty_figure, log_ticks
from rankine.report.labels import place
from rankine.report.palette import METHOD_COLOURS, METHOD_MARKS, light
from rankine.report.schema import Row
from rankine.report.terminal import metric_names, name_of

MARGINS = (64, 60)  # pixels beside and around the frame, for axes
LONGEST = 28  # characters of a name beside its point
#: A perplexity or loss more than this many times the lowest is drawn at the top, with its figure:
#: one broken result must not squeeze all others into a line.
CEILING = 8.0


class Point(NamedTuple):
    """A row that can be drawn: megabytes (or the like), its figure as a number and as text, the
    interval of a perplexity, and whether it lies above the chart."""

    x: float
    y: float
    low: float
    high: float
    over: bool
    row: Row
    text: str

    @property
    def label(self) -> str:
        """The name beside it."""
        name = name_of(self.row)
        short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        return f"{short}: {self.text} ↑" if self.over else short


class Style(NamedTuple):
    """How the points of one series look."""

    mark: str
    colour: str
    hollow: bool


class Quality(NamedTuple):
    """The figure that is drawn: what the page calls it, what the chart does (in our words: Bokeh
    would read a user's as TeX), how a row gives it. Where more is worse the scale is logarithmic:
    equal steps are equal nats."""

    name: str
    label: str
    worse: bool
    value: Callable[[Row], Any]
    text: Callable[[Any], str]


PERPLEXITY = Quality(
    "perplexity", "held-out perplexity", True, lambda row: row.get("perplexity"), n.perplexity
)
LOSS = Quality("loss", "loss", True, lambda row: row.get("loss"), n.decimal)


def quality_of(rows: Sequence[Row]) -> Quality:
    """Perplexity where two rows have one, else the loss, else the user's first figure."""
    own = (_own_quality(name) for name in metric_names(rows))
    known = (q for q in (PERPLEXITY, LOSS, *own) if len(points_of(rows, q)[1]) > 1)
    return next(known, PERPLEXITY)


def _own_quality(name: str) -> Quality:
    return Quality(name, "figure", False, lambda row: metrics(row).get(name), n.decimal)


def tradeoff(rows: Sequence[Row], width: int, height: int) -> Json | None:
    """Bytes against quality, for a frame about `width` pixels wide; None below two points."""
    quality = quality_of(rows)
    unit, points = points_of(rows, quality)
    if len(points) < 2:
        return None
    x_axis = around([p.x for p in points], 0.08, log=False)
    spread = [at for p in points for at in (p.low, p.y, p.high)]
    y_axis = around(spread, 0.12, log=quality.worse)
    plot = empty_figure(height, x_axis, y_axis)
    plot.xaxis.axis_label, plot.yaxis.axis_label = f"{unit} on disk", quality.label
    if quality.worse:
        plot.yaxis.ticker = log_ticks(y_axis.start, y_axis.end)
        plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[0000]")
    drawn = [_series(plot, style, members, quality.label) for style, members in styled(points)]
    _names(plot, points, x_axis, y_axis, width - MARGINS[0], height - MARGINS[1])
    add_tips(plot, drawn, ("model", "on disk", "kept bits", quality.label, "tokens/s"))
    return dict(json_item(plot))


def points_of(rows: Sequence[Row], quality: Quality = PERPLEXITY) -> tuple[str, list[Point]]:
    """Rows with a size and the figure, and the unit of their x."""
    known = [(n.real(row.get("bytes")), n.real(quality.value(row)), row) for row in rows]
    sized = [
        (x, y, row)
        for x, y, row in known
        if x and x > 0 and y is not None and (y > 0 or not quality.worse)
    ]
    unit, divisor = _unit(max((x for x, _, _ in sized), default=1.0))
    least = min((y for _, y, _ in sized), default=1.0)
    bottom, top = (least / CEILING, CEILING * least) if quality.worse else (-math.inf, math.inf)
    points = []
    for x, y, row in sized:
        low, high = (_interval(row) if quality is PERPLEXITY else None) or (y, y)
        at, low, high = (min(max(number, bottom), top) for number in (y, low, high))
        points.append(Point(x / divisor, at, low, high, y > top, row, quality.text(y)))
    return unit, points


def _interval(row: Row) -> tuple[float, float] | None:
    bounds = row.get("perplexity_interval")
    pair = [n.real(bound) for bound in bounds] if isinstance(bounds, list) else []
    if len(pair) != 2 or pair[0] is None or pair[1] is None or not 0 < pair[0] <= pair[1]:
        return None
    return pair[0], pair[1]


def _unit(largest: float) -> tuple[str, float]:
    for unit, divisor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if largest >= divisor:
            return unit, divisor
    return "B", 1.0


def styled(points: Iterable[Point]) -> list[tuple[Style, list[Point]]]:
    """Points in series: dense, baselines, and one per method, each sorted by size."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        kind = str(point.row.get("kind") or "result")
        method = str(point.row.get("method") or point.row.get("name") or "")
        groups.setdefault(kind if kind != "result" else f"result {method}", []).append(point)
    fixed = {
        "dense": Style("diamond", "ink", False),
        "baseline": Style("square", "orange", True),
    }
    methods = [key for key in groups if key not in fixed]
    count = len(METHOD_COLOURS)
    for i, key in enumerate(methods):
        fixed[key] = Style(METHOD_MARKS[i % count], METHOD_COLOURS[i % count], i >= count)
    return [(fixed[key], sorted(members, key=lambda p: p.x)) for key, members in groups.items()]


def _series(plot: figure, style: Style, members: Sequence[Point], label: str) -> GlyphRenderer:
    colour = light(style.colour)
    xs, ys = [p.x for p in members], [p.y for p in members]
    if members[0].row.get("kind") == "result" and len(members) > 1:
        plot.line(xs, ys, line_color=colour, line_width=1.5, line_alpha=0.55)
    lows, highs = [p.low for p in members], [p.high for p in members]
    plot.segment(xs, lows, xs, highs, line_color=colour, line_width=1.5)
    source = ColumnDataSource(
        {
            "x": xs,
            "y": ys,
            "model": [name_of(p.row) for p in members],
            "on disk": [n.size(p.row.get("bytes")) for p in members],
            "kept bits": [n.percent(p.row.get("keep")) for p in members],
            label: [p.text for p in members],
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


def _names(
    plot: figure, points: Sequence[Point], x_axis: Axis, y_axis: Axis, width: float, height: float
) -> None:
    order = sorted(points, key=lambda p: str(p.row.get("kind")) == "result")
    pixels = [(width * x_axis.at(p.x), height * y_axis.at(p.y)) for p in order]
    labels = place(pixels, [p.label for p in order], width, height)
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
