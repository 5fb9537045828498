"""The model card and what it inherits: licence, base model, notices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rankine.checkpoint.form import CARD
from rankine.errors import UserError
from rankine.limits import JSON_BYTES, parse_yaml, read_text

NOTICES = re.compile(r"(licen[cs]e|notice|copying|use_policy|third[-_]party)", re.IGNORECASE)
INHERITED = ("license", "license_name", "license_link", "base_model", "language", "datasets")

TEXT = """# {name}, made smaller with Rankine

A dense architecture with some of its modules replaced by smaller ones (`quantization_config` in
`config.json` lists them; the format is open, see rankine's `docs/format.md`).

## Load it

```python
import rankine  # before loading: it tells transformers about the format
model = rankine.load("{name}")  # or {auto}.from_pretrained("{name}")
```

`import rankine` is needed. Without it transformers only warns about an unknown method and fills
the replaced modules with random numbers. Where no import is possible,
`{auto}.from_pretrained("{name}", trust_remote_code=True)` does it through
`modeling_rankine.py` in this directory (rankine must be installed).

`model.to(dtype)` works; `.half()` and `.float()` are refused by transformers for every model
with a quantization config.
"""

DENSE = """# {name}

An ordinary checkpoint written by Rankine: it loads with
`transformers.{auto}.from_pretrained("{name}")` and needs nothing else.
"""


PLAIN = """# {name}, made smaller with Rankine

The weights of a torch module `{architecture}`, some of whose layers were replaced by smaller ones
(`patch.json` lists them; the format is open, see rankine's `docs/format.md`). The code of the
module is not here.

## Load it

```python
import rankine
model = rankine.load("{name}", into={architecture}(...))  # built as it was before compression
```
"""


def notices(source: Path) -> list[Path]:
    """Licence and notice files of a model directory."""
    return sorted(p for p in source.iterdir() if p.is_file() and NOTICES.match(p.name))


def front_matter(source: Path) -> dict[str, Any]:
    """The YAML head of a model directory's README, or nothing."""
    try:
        text = read_text(source / CARD, JSON_BYTES)
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        data = parse_yaml(found[1], CARD) if found else None
    except UserError:
        return {}
    return dict(data) if isinstance(data, Mapping) else {}


def inherited(source: Path | None, base: str | None) -> dict[str, Any]:
    """Card fields taken over from the input: its licence and languages, and what it is based on.

    A licence file without a card says `license: other` and links to the file.
    """
    fields: dict[str, Any] = {}
    if source is not None:
        card = front_matter(source)
        fields = {key: card[key] for key in INHERITED if card.get(key)}
        licences = [p for p in notices(source) if p.name.lower().startswith("licen")]
        if "license" not in fields and licences:
            fields |= {"license": "other", "license_link": licences[0].name}
    if base is not None:
        fields["base_model"] = base
    return fields


def card(name: str, auto: str, fields: Mapping[str, Any], cost: str, patched: bool) -> str:
    """The whole README.md; `cost` is markdown of the caller: what was lost and what was won."""
    head = {"library_name": "transformers", "tags": ["rankine"], **fields}
    body = (TEXT if patched else DENSE).format(name=name, auto=auto)
    if "license" not in fields:
        body += "\nThe input stated no licence: ask its makers before passing this on.\n"
    return _with_cost(head, body, cost)


def plain_card(name: str, architecture: str, cost: str) -> str:
    """The same for the directory of a plain module."""
    head = {"library_name": "pytorch", "tags": ["rankine"]}
    return _with_cost(head, PLAIN.format(name=name, architecture=architecture), cost)


def _with_cost(head: Mapping[str, Any], body: str, cost: str) -> str:
    if cost:
        body += f"\n## What it cost\n\n{cost.strip()}\n"
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)}---\n\n{body}"
