"""A method's card and knobs as data, and its citation. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankine.errors import UserError

if TYPE_CHECKING:
    from rankine.method import Method

#: arXiv:YYMM.NNNNN
ARXIV = re.compile(r"arXiv:((\d\d)\d\d\.\d{4,5})")
DOI = re.compile(r"doi:(\S+)")
YEAR = re.compile(r"\b(?:19|20)\d\d\b")


def entry(cls: type[Method]) -> dict[str, Any]:
    """One method: its card, its knobs with types, defaults and meaning, and its file."""
    file = Path(sys.modules[cls.__module__].__file__ or "").name
    knobs = [
        {
            "name": field.name,
            "type": str(field.type),
            "default": field.default,
            "doc": knob_doc(cls, field.name),
        }
        for field in dataclasses.fields(cls)
    ]
    facts = {"sized": getattr(cls, "sized", True), "file": file, "knobs": knobs}
    # Through JSON, so that tuples are lists whether or not the file was written yet.
    card = dataclasses.asdict(cls.card)
    found: dict[str, Any] = json.loads(json.dumps({**card, **facts}, default=str))
    return found


def knob_doc(cls: type[Method], knob: str) -> str:
    """What the docstring of the class, or of one that it inherits from, says about a knob: the
    item "- `a`, `b`: text", the same inside a paragraph, or the first sentence that names it; ""
    where none says anything."""
    found = (_explained(base.__doc__ or "", knob) for base in cls.__mro__[:-1])
    return next(filter(None, found), "")


def _explained(doc: str, knob: str) -> str:
    text = re.sub(r"\n\s+(?![\s-])", " ", doc)
    names = r"((?:`\w+`(?:, | and )?)+)"
    forms = (rf"^\s*- {names}: (.+)$", rf"{names}: ([^`]+?)(?=\.\s|\.?$)", r"()([^.]+)")
    for form in forms:
        for item in re.finditer(form, text, re.MULTILINE):
            if f"`{knob}`" in (item[1] or item[2]):
                return item[2].strip().rstrip(".")
    return ""


def bibtex(card: Mapping[str, Any]) -> str:
    """The citation that a card (an `entry`) gives. Raises UserError for what nobody published."""
    source = _source(card["reference"])
    if not source:
        what = "is Rankine's own" if card["ours"] else f"is a {card['reference']}"
        raise UserError(f"expected a published method, found {card['name']}, which {what}")
    fields = {
        "title": f"{{{card['title']}}}",
        "author": card.get("authors", ""),
        **source,
        "year": str(card.get("year") or source.get("year", "")),
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@misc{{{card['name']},", *lines, "}"])


def _source(reference: str) -> dict[str, str]:
    if found := ARXIV.search(reference):
        number, year = found.groups()
        url = f"https://arxiv.org/abs/{number}"
        return {"year": f"20{year}", "eprint": number, "archivePrefix": "arXiv", "url": url}
    if found := DOI.search(reference):
        return {"doi": found[1], "url": f"https://doi.org/{found[1]}"}
    if found := YEAR.search(reference):
        return {"year": found[0], "howpublished": reference}
    return {}
