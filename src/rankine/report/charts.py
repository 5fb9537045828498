"""What the charts share: axes with room and round ticks, one quiet look, tooltips.

Charts leave as Bokeh documents in JSON. The page's script draws them and swaps the colours on dark
paper. The user's strings appear as data only (tooltips and text marks, which Bokeh shows
literally), never as titles or axis labels, which it would read as TeX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bokeh.models import HoverTool, Range1d
from bokeh.models.renderers import GlyphRenderer
from bokeh.plotting import figure

from rankine.report.palette import light

FONT = "system-ui, sans-serif"

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


def empty_figure(height: int, x_axis: Axis, y_axis: Axis) -> figure:
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


def add_tips(
    plot: figure, renderers: Sequence[GlyphRenderer], columns: Sequence[str], **options: Any
) -> None:
    """Tooltips with one line per column; Bokeh escapes the values."""
    row = '<div class="tip"><span style="color: var(--muted)">{0}</span> @{{{0}}}</div>'
    text = "".join(row.format(column) for column in columns)
    hover = HoverTool(tooltips=text, renderers=list(renderers), show_arrow=False, **options)
    plot.add_tools(hover)
