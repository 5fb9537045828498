"""What the page shows as tables: the maps over layer × projection, and where the bytes went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rankine.report import numbers as n
from rankine.report.schema import Report, TargetReport
from rankine.report.spectra import id_of, rank_text

ROLES = ("q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down", "conv", "embedding", "head")
DENSE = 28  # with more rows than this a map's cells carry no text
DARK = 0.58  # from this shade on, paper-coloured text has more contrast than ink


class Cell(NamedTuple):
    """One target (or several of one role in one block, averaged): its shade from 0 to 1,
    whether that is dark, the figures in the cell, and the sentence shown when it is touched."""

    shade: float
    dark: bool
    text: str
    small: str
    detail: str
    target: str


class Map(NamedTuple):
    """A table over blocks (rows) and roles (columns); empty cells are None."""

    title: str
    kind: str
    low: str
    high: str
    roles: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    compact: bool


def by_role(targets: Sequence[TargetReport]) -> dict[str, list[TargetReport]]:
    """Targets grouped by role, roles in reading order, blocks ascending."""
    groups: dict[str, list[TargetReport]] = {}
    for target in sorted(targets, key=_block):
        groups.setdefault(str(target.get("role") or "other"), []).append(target)
    order = {role: i for i, role in enumerate(ROLES)}
    return dict(sorted(groups.items(), key=lambda item: (order.get(item[0], 99), item[0])))


def _block(target: TargetReport) -> float:
    number = n.real(target.get("block"))
    return float("inf") if number is None else number


def _blocks(target: TargetReport) -> list[float]:
    """All of a target's blocks: layers that share a basis have a cell each."""
    known = [number for b in target.get("blocks") or () if (number := n.real(b)) is not None]
    return known if len(known) > 1 else [_block(target)]


def maps(targets: Sequence[TargetReport]) -> list[Map]:
    """The map of kept bits and, where it was measured, the map of error."""
    errors = [error for t in targets if (error := n.real(t.get("error"))) is not None]
    found = []
    if any(n.real(t.get("keep")) is not None for t in targets):
        found.append(_map(targets, "kept", "Kept bits", "0 %", "100 %", "keep", 1.0))
    if errors:
        top = max(errors) or 1.0
        found.append(_map(targets, "error", "Error", "0", n.decimal(top, 2), "error", top))
    return found


def _map(
    targets: Sequence[TargetReport],
    kind: str,
    title: str,
    low: str,
    high: str,
    key: str,
    top: float,
) -> Map:
    roles = list(by_role(targets))
    blocks = sorted({block for t in targets for block in _blocks(t)})
    places: dict[tuple[float, str], list[TargetReport]] = {}
    for target in targets:
        for block in _blocks(target):
            place = (block, str(target.get("role") or "other"))
            places.setdefault(place, []).append(target)
    rows = []
    for block in blocks:
        cells = [_cell(places.get((block, role), []), key, top) for role in roles]
        rows.append(("–" if block == float("inf") else f"{block:.0f}", cells))
    return Map(title, kind, low, high, roles, rows, len(rows) > DENSE)


def _cell(targets: Sequence[TargetReport], key: str, top: float) -> Cell | None:
    known = [value for t in targets if (value := n.real(t.get(key))) is not None]
    if not known:
        return None
    value = sum(known) / len(known)
    text = f"{100 * value:.0f}" if key == "keep" else _short(value)
    ranks = [rank for t in targets if (rank := n.real(t.get("rank"))) is not None]
    small = f"r {sum(ranks) / len(ranks):.0f}" if ranks and key == "keep" else ""
    shade = min(max(value / top, 0.0), 1.0)
    return Cell(shade, shade > DARK, text, small, detail(targets), id_of(targets[0]))


def _short(error: float) -> str:
    """An error in the width of a cell: "0", "<.001", ".031", "1.2"."""
    if error == 0 or error >= 0.9995:
        return f"{error:.2g}"
    return "<.001" if error < 0.0005 else f"{error:.3f}".lstrip("0")


def detail(targets: Sequence[TargetReport]) -> str:
    """Everything known about a cell, in one line."""
    first = targets[0]
    if len(targets) > 1:
        return f"{len(targets)} targets such as {first.get('path') or id_of(first)}, averaged"
    structure = first.get("structure") or {}
    parts = [
        str(first.get("path") or id_of(first)),
        str(structure.get("kind") or "") if isinstance(structure, dict) else "",
        f"rank {rank_text(first)}" if n.real(first.get("rank")) is not None else "",
        _labelled("keep", n.percent(first.get("keep"))),
        _labelled("bits per weight", n.decimal(bits_per_weight(first))),
        _labelled("error", n.decimal(first.get("error"))),
        _labelled("predicted loss", n.decimal(first.get("loss"))),
    ]
    return " · ".join(part for part in parts if part)


def bits_per_weight(target: TargetReport) -> float | None:
    """Stored bits over the number of weights."""
    bits, sides = n.real(target.get("bits")), [n.real(side) for side in target.get("shape") or []]
    weights = math.prod(side for side in sides if side) if sides else 0.0
    return bits / weights if bits is not None and weights else None


def _labelled(name: str, text: str) -> str:
    return "" if text == n.UNKNOWN else f"{name} {text}"


class Share(NamedTuple):
    """A bar: its name, bytes now and before as text, and lengths relative to the longest."""

    name: str
    text: str
    percent: str
    length: float
    before: float | None


def shares(report: Report) -> list[Share]:
    """Where the bytes went, largest first."""
    after = _positive(report.get("bytes", {}))
    before = _positive(report.get("bytes_before", {}))
    if not after:
        return []
    total, longest = sum(after.values()), max([*after.values(), *before.values()])
    names = sorted({*after, *before}, key=lambda name: -after.get(name, 0.0))
    return [
        Share(
            name,
            n.size(after.get(name, 0.0)),
            n.percent(after.get(name, 0.0) / total),
            after.get(name, 0.0) / longest,
            before[name] / longest if name in before else None,
        )
        for name in names
    ]


def _positive(counts: dict[str, Any]) -> dict[str, float]:
    known = {name: n.real(count) for name, count in counts.items()}
    return {name: count for name, count in known.items() if count is not None and count > 0}
