"""The page's colours, stated once: the style sheet, the charts and the dark mode read them here.

Hues are those of Okabe and Ito, darkened or lightened until text and marks have a contrast of at
least 4.5 (text) or 3 (marks) on the page; no two things differ in hue alone.
"""

from __future__ import annotations

#: name → (on light paper, on dark paper)
COLOURS = {
    "paper": ("#fdfdfc", "#15181b"),
    "panel": ("#f5f5f2", "#1d2125"),
    "ink": ("#1b1e21", "#e7e8e6"),
    "muted": ("#5e666d", "#9da5ac"),
    "line": ("#e1e2de", "#31373d"),
    "blue": ("#1568a6", "#62b0ee"),
    "green": ("#0b7a5c", "#43bf98"),
    "purple": ("#93508f", "#d295cd"),
    "sky": ("#2f7690", "#7cc7e2"),
    "orange": ("#b4530c", "#f0994f"),
    "kept-low": ("#eaf1f6", "#1d2a35"),
    "kept-high": ("#08396a", "#7cc0f5"),
    "error-low": ("#fcefe0", "#30261d"),
    "error-high": ("#7f3300", "#f5a862"),
}

#: Results of one method share a colour and a mark; baselines are orange squares.
METHOD_COLOURS = ("blue", "green", "purple", "sky")
METHOD_MARKS = ("circle", "triangle", "inverted_triangle", "hex")


def light(name: str) -> str:
    """What charts are drawn with; the page's script swaps it for the dark twin."""
    return COLOURS[name][0]


def variables(dark: bool) -> str:
    """CSS custom properties: `--ink: #1b1e21; ...`."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())


def twins() -> dict[str, str]:
    """Light → dark, for the charts."""
    return dict(COLOURS.values())
