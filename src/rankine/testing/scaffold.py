"""A new method in a checkout of Rankine: four files that are green before the first edit."""

from __future__ import annotations

import keyword
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

from rankine.errors import UserError

TABLE = "tests/methods/table.py"
#: Template → where it goes.
FILES = {
    "method.py.txt": "src/rankine/methods/{name}.py",
    "claim.py.txt": "benchmarks/claims/{name}.py",
    "page.md.txt": "docs/methods/{name}.md",
}
#: Two rows: a usual size, and a small one with an extreme knob.
ROWS = '    Row("{name}"),\n    Row("{name}", 0.2, {{"shrink": 0.0}}),\n]\n'
GENERATOR = "tools/generate.py"


def new_method(name: str, start: Path) -> list[Path]:
    """Write the method, its rows, its claim and its page into the checkout around `start`, and
    renew the generated files; returns the four. Raises UserError before anything is written."""
    root, cls = checkout(start), class_name(name)
    made = {
        root / path.format(name=name): template(file).format(name=name, cls=cls)
        for file, path in FILES.items()
    }
    taken = [path for path in made if path.exists()]
    if taken:
        raise UserError(f"expected a new name, found {name} in {taken[0]}: choose another one")
    table = root / TABLE
    made[table] = with_rows(table.read_text("utf-8"), name)
    for path, text in made.items():
        path.write_text(text, "utf-8")
    generate(root)
    return list(made)


def checkout(start: Path) -> Path:
    """The nearest directory above that holds Rankine's sources. Raises UserError."""
    for place in (start, *start.parents):
        if (place / TABLE).is_file() and (place / GENERATOR).is_file():
            return place
    raise UserError(
        f"expected a checkout of Rankine around {start}, found none: run it inside one; a method "
        'in a package of your own needs only the entry point "rankine.methods" (CONTRIBUTING.md)'
    )


def class_name(name: str) -> str:
    """my_svd → MySvd. Raises UserError unless it can be a module's name."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f'expected a name like my_svd, found "{name}": a-z, digits and underscores')
    return "".join(part.capitalize() for part in name.split("_"))


def template(file: str) -> str:
    """The text of one template."""
    return resources.files("rankine").joinpath("testing", "templates", file).read_text("utf-8")


def with_rows(table: str, name: str) -> str:
    """The table of methods with the new rows at its end."""
    head, end, tail = table.partition("\n]\n")
    if not end or "ROWS = [" not in head:
        raise UserError(f"expected a list ROWS in {TABLE}, found none: add the row by hand")
    return f"{head}\n{ROWS.format(name=name)}{tail}"


def generate(root: Path) -> None:
    """Catalogue, tables and command-line reference of that checkout."""
    done = subprocess.run(
        [sys.executable, str(root / GENERATOR)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{GENERATOR} failed: {done.stderr.strip().splitlines()[-1]}")
