"""Verbs that look after an installation or a checkout: doctor, new-method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankine.cli import show
from rankine.cli.heavy import prepare
from rankine.cli.options import Json, Threads
from rankine.errors import AcceptanceError
from rankine.threads import settle


def doctor(threads: Threads = None, json: Json = False) -> None:
    """Say what a bug report needs (versions, device, memory, extras), and whether a small
    compression works here."""
    settle(threads)
    from rankine.doctor import attempt, examine, lines

    attempt(prepare)
    found = examine()
    show.lines("doctor", list(lines(found)), found, json)
    if found["problems"]:
        raise AcceptanceError("; ".join(found["problems"]))


def new_method(
    name: Annotated[str, typer.Argument(metavar="NAME", help="its name, such as my_svd")],
    json: Json = False,
) -> None:
    """Start a method in a checkout of Rankine: its file, test rows, claim and page, all green."""
    from rankine.testing.scaffold import new_method

    files = [str(path) for path in new_method(name, Path.cwd())]
    text = [f"wrote {file}" for file in files]
    text.append(f'now: make test ARGS="tests/methods/test_table.py -k {name}"; make check')
    show.lines("new-method", text, {"files": files}, json)
