"""What a run means, in sentences: what was kept, what it cost, and whether plain quantization
would have been the better choice."""

from __future__ import annotations

from collections.abc import Sequence

from rankine.acceptance import metrics
from rankine.report import numbers as n
from rankine.report.schema import Report, Row


def dense_row(rows: Sequence[Row]) -> Row:
    """The dense model's row; empty where it was not measured."""
    return next((row for row in rows if row.get("kind") == "dense"), Row())


def subject_row(report: Report) -> Row:
    """The row the headline speaks of: the named one, else the first result."""
    results = [row for row in report["rows"] if row.get("kind") == "result"]
    named = [row for row in results if row.get("name") == report.get("subject")]
    return next(iter(named or results), Row())


def verdict(report: Report) -> list[str]:
    """One to three sentences. Says nothing about what was not measured."""
    row, dense = subject_row(report), dense_row(report["rows"])
    if not row:
        return ["No result was measured in this run."]
    sentences = [_size_sentence(report, row, dense)]
    if n.real(row.get("perplexity")) is not None:
        sentences.append(_perplexity_sentence(row, dense))
    sentences.append(_own_sentence(row, dense))
    sentences.append(quantization(row, report["rows"]))
    return [sentence for sentence in sentences if sentence]


def _size_sentence(report: Report, row: Row, dense: Row) -> str:
    keep = row.get("keep")
    if n.real(keep) is None:
        keep = report.get("budget", {}).get("keep")
    kept = f"Kept {n.percent(keep)} of the targeted bits" if n.real(keep) is not None else ""
    before = n.size(dense.get("bytes") or report["model"].get("bytes"))
    after = n.size(row.get("bytes"))
    disk = f"{before} → {after} on disk" if n.UNKNOWN not in (before, after) else ""
    if not (kept or disk):
        return ""
    return ": ".join(part for part in (kept, disk) if part) + "."


def _perplexity_sentence(row: Row, dense: Row) -> str:
    after, before = row.get("perplexity"), dense.get("perplexity")
    if n.real(before) is None:
        return f"Held-out perplexity {n.perplexity(after)}."
    moved = n.change(after, before)
    tail = f" ({moved})" if moved else ""
    return f"Held-out perplexity {n.perplexity(before)} → {n.perplexity(after)}{tail}."


def _own_sentence(row: Row, dense: Row) -> str:
    """The loss and the user's own figures; what is better, more or less, only the user knows."""
    parts = []
    for name, value in {"loss": row.get("loss"), **metrics(row)}.items():
        if n.real(value) is None:
            continue
        before = dense.get("loss") if name == "loss" else metrics(dense).get(name)
        moved = f"{n.decimal(before, 4)} → " if n.real(before) is not None else ""
        parts.append(f"{name} {moved}{n.decimal(value, 4)}")
    return f"Measured {', '.join(parts)}." if parts else ""


def quantization(row: Row, rows: Sequence[Row]) -> str:
    """How the result stands against the baselines; names the one that beats it, if one does.

    Otherwise the most informative one: the largest among those that are smaller than the result
    (what fewer bytes would cost), or the smallest of the larger ones.
    """
    size, loss = n.real(row.get("bytes")), n.real(row.get("perplexity"))
    others = [(_measured(other), other) for other in rows if other.get("kind") == "baseline"]
    known = [(pair, other) for pair, other in others if pair is not None]
    if size is None or loss is None or not known:
        return ""
    better = [item for item in known if item[0][0] <= size and item[0][1] <= loss]
    if better:
        _, best = min(better, key=lambda item: item[0][1])
        return _plain(best, "smaller and better than this result")
    smaller = [item for item in known if item[0][0] <= size]
    if smaller:
        _, nearest = max(smaller, key=lambda item: item[0][0])
        return _plain(nearest, "smaller, at a higher perplexity")
    (_, other_loss), nearest = min(known, key=lambda item: item[0][0])
    if other_loss <= loss:
        return _plain(nearest, "larger, at a lower perplexity")
    return _plain(nearest, "larger and worse than this result")


def _measured(row: Row) -> tuple[float, float] | None:
    size, loss = n.real(row.get("bytes")), n.real(row.get("perplexity"))
    return None if size is None or loss is None else (size, loss)


def _plain(row: Row, judgement: str) -> str:
    name = str(row.get("name") or row.get("method") or "quantization").replace(" (plain)", "")
    return (
        f"Plain {name} would be {n.size(row.get('bytes'))} at "
        f"{n.perplexity(row.get('perplexity'))}: {judgement}."
    )
