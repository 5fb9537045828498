"""The page: one HTML file with everything inside, which asks the network for nothing.

Everything from the model, the data or the user goes through Jinja's escaping, or as JSON into an
inert script element. The content policy in the page allows only the two scripts of this package,
by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rankine.acceptance import metrics
from rankine.report import numbers as n
from rankine.report.charts import Json
from rankine.report.maps import by_role, maps, shares
from rankine.report.palette import twins, variables
from rankine.report.schema import Report, parse
from rankine.report.spectra import spectra
from rankine.report.terminal import cells
from rankine.report.tradeoff import LOSS, PERPLEXITY, quality_of, tradeoff
from rankine.report.verdict import dense_row, subject_row, verdict

HERE = Path(__file__).parent
WIDE, NARROW = (960, 420), (340, 340)  # pixels the trade-off chart is laid out for


class Fact(NamedTuple):
    """A name, its value, and a remark in small print."""

    name: str
    value: str
    note: str = ""


def html(data: Mapping[str, Any]) -> str:
    """The page of a report; see `rankine.report.schema`. Raises UserError for what is none."""
    report = parse(data)
    scripts = [_bokeh(), (HERE / "charts.js").read_text(encoding="utf-8")]
    return _template().render(
        title=report["model"].get("name") or "model",
        report=report,
        verdict=verdict(report),
        facts=headline(report),
        table=_table(report),
        lead=_lead(report),
        maps=maps(report["targets"]),
        roles=list(by_role(report["targets"])),
        shares=shares(report),
        plan=planned(report),
        about=about(report),
        recipe=_yaml(report["recipe"]),
        charts=_charts(report),
        policy=_policy(scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        light=Markup(variables(dark=False)),
        dark=Markup(variables(dark=True)),
    )


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tight"] = tight
    return environment.get_template("template.html")


def tight(text: str) -> str:
    """Numbers stay on one line with their units."""
    return re.sub(r"(?<=\d) (?=%|[kMGT]?B\b)", "\N{NO-BREAK SPACE}", text)


# -- scripts ------------------------------------------------------------------------------------
@cache
def _bokeh() -> str:
    """Bokeh's own script, without widgets, tables or MathJax."""
    return str(Resources(mode="inline", components=["bokeh"]).js_raw[0])


def _policy(scripts: Sequence[str]) -> str:
    """No network at all; only these scripts; styles inline, as Bokeh writes its own."""
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    rules = {
        "default-src": "'none'",
        "script-src": hashes,
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _charts(report: Report) -> Markup:
    """JSON for the page's script, harmless inside an HTML script element."""
    charts: Json = {
        "dark": twins(),
        "tradeoff": _both(report),
        "spectra": spectra(list(by_role(report["targets"]).values()), 180),
    }
    text = json.dumps(charts, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _both(report: Report) -> Json | None:
    wide = tradeoff(report["rows"], *WIDE)
    return None if wide is None else {"wide": wide, "narrow": tradeoff(report["rows"], *NARROW)}


# -- what is printed ----------------------------------------------------------------------------
def headline(report: Report) -> list[Fact]:
    """The figures below the verdict, those that are known."""
    row, dense = subject_row(report), dense_row(report["rows"])
    budget = report.get("budget", {})
    keep = row.get("keep") if n.real(row.get("keep")) is not None else budget.get("keep")
    facts = [
        Fact("kept bits", n.percent(keep), asked(budget.get("asked") or {})),
        Fact(
            "on disk",
            n.size(row.get("bytes")),
            _unless_unknown("dense {}", n.size(dense.get("bytes"))),
        ),
        Fact(
            "perplexity",
            n.perplexity(row.get("perplexity")),
            _unless_unknown("dense {}", n.perplexity(dense.get("perplexity"))),
        ),
        Fact(
            "accuracy",
            n.percent(row.get("accuracy")),
            _unless_unknown("dense {}", n.percent(dense.get("accuracy"))),
        ),
        Fact(
            "decoding speed",
            n.times(row.get("ratio_to_dense")),
            _unless_unknown("{} tokens/s", n.rate(row.get("tokens_per_second"))),
        ),
    ]
    own = {"loss": (row.get("loss"), dense.get("loss"))}
    own |= {name: (value, metrics(dense).get(name)) for name, value in metrics(row).items()}
    facts += [
        Fact(name, n.decimal(after, 4), _unless_unknown("dense {}", n.decimal(before, 4)))
        for name, (after, before) in own.items()
    ]
    return [fact for fact in facts if fact.value != n.UNKNOWN]


def asked(budget: Mapping[str, Any]) -> str:
    """What the user asked for: "asked 80.0 %"."""
    words = {"keep": n.percent, "size": n.size, "bits": lambda bits: f"{n.decimal(bits)} bits"}
    parts = [
        words[key](value) if key in words and n.real(value) is not None else f"{key} {value}"
        for key, value in budget.items()
    ]
    return f"asked {', '.join(parts)}" if parts else ""


def _unless_unknown(sentence: str, text: str) -> str:
    return "" if text == n.UNKNOWN else sentence.format(text)


def _lead(report: Report) -> str:
    """How to read the chart of size against quality."""
    quality = quality_of(report["rows"])
    if quality is PERPLEXITY:
        return (
            "Lower left is better. Sizes are files on disk, perplexity is measured on text that "
            "calibration never saw."
        )
    if quality is LOSS:
        return "Lower left is better. Sizes are files on disk, loss is the mean of your own."
    return f"Sizes are files on disk, the figure is your own: {quality.name}."


def _table(report: Report) -> dict[str, Any]:
    """Headings, and per row its kind, note and cells."""
    shown, body = cells(report["rows"])
    subject = subject_row(report)
    rows = [
        {
            "kind": str(row.get("kind") or "result"),
            "subject": row is subject,
            "note": str(row.get("note") or ""),
            "cells": line,
        }
        for row, line in zip(report["rows"], body)
    ]
    return {"titles": [column.title for column in shown], "rows": rows}


def planned(report: Report) -> list[tuple[str, str, str]]:
    """What was predicted beside what came of it: (what, predicted, measured)."""
    plan, row = report.get("plan", {}), subject_row(report)
    spent = [n.real(value) for value in report.get("times", {}).values()]
    total = sum(value for value in spent if value is not None) if spent else None
    lines = [
        ("size on disk", n.size(plan.get("bytes")), n.size(row.get("bytes"))),
        ("time", n.seconds(plan.get("seconds")), n.seconds(total)),
        ("peak memory", n.size(plan.get("memory")), n.size(report.get("hardware", {}).get("peak"))),
    ]
    return [line for line in lines if line[1] != n.UNKNOWN]


def about(report: Report) -> list[tuple[str, list[Fact]]]:
    """Where the run came from, in groups."""
    model = report["model"]
    facts = [
        Fact("model", str(model.get("name") or n.UNKNOWN)),
        Fact("family", str(model.get("family") or n.UNKNOWN)),
        Fact("parameters", n.count(model.get("parameters"))),
        Fact("stored as", str(model.get("dtype") or n.UNKNOWN)),
        Fact("rankine", str(report.get("rankine") or n.UNKNOWN)),
        Fact("created", str(report.get("created") or n.UNKNOWN)),
    ]
    groups = [
        ("Model", [fact for fact in facts if fact.value != n.UNKNOWN]),
        ("Fingerprints", _listed(report.get("fingerprints", {}))),
        ("Time", [Fact(k, n.seconds(v)) for k, v in report.get("times", {}).items()]),
        ("Hardware", _listed(_machine(report))),
        ("Versions", _listed(report.get("versions", {}))),
    ]
    return [(title, group) for title, group in groups if group]


def _machine(report: Report) -> dict[str, Any]:
    """Without the peak, which stands beside its prediction."""
    return {k: v for k, v in report.get("hardware", {}).items() if k != "peak"}


def _listed(values: Mapping[str, Any]) -> list[Fact]:
    return [Fact(str(k), _plain(v)) for k, v in values.items() if v is not None]


def _plain(value: Any) -> str:
    return str(value) if not isinstance(value, (dict, list)) else json.dumps(value)


def _yaml(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True) if recipe else ""
