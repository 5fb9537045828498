"""The section of a model card that says what was done and what it cost, in Markdown.

How to load the model, its licence and what it is based on are `rankine.checkpoint.card`'s part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from rankine.report.schema import parse
from rankine.report.terminal import markdown_table, markdown_text
from rankine.report.verdict import verdict


def cost(data: Mapping[str, Any]) -> str:
    """The verdict, the table with the plain quantization baselines, the recipe, the fingerprints.

    Raises UserError where `data` is no report.
    """
    report = parse(data)
    parts = [markdown_text(" ".join(verdict(report))), markdown_table(report["rows"])]
    parts += [f"- {markdown_text(warning)}" for warning in map(str, report["warnings"])]
    if report["recipe"]:
        recipe = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
        healed = report["recipe"].get("method") == "heal"
        how = (
            "`rankine heal` with these" if healed else "`rankine compress --recipe FILE` from these"
        )
        parts.append(f"Made with {how} settings:")
        parts.append(fenced(recipe, "yaml"))
    marks = [f"{name} `{_code(mark)}`" for name, mark in report["fingerprints"].items()]
    if marks:
        parts.append("Fingerprints: " + ", ".join(marks) + ".")
    return "\n\n".join(parts) + "\n"


def fenced(text: str, language: str) -> str:
    """A code block that its content cannot close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _code(text: Any) -> str:
    return str(text).replace("`", "'")
