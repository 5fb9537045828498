"""Verbs that look after the installation: doctor."""

from __future__ import annotations

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
