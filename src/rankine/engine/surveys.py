"""Arms of one comparison, or tries of one search, measure the same model on the same text: what
the first surveyed, the next ones read. Entries depend on all that the moments do: model, data,
versions, threads, and exactly what is measured where."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from rankine.checkpoint import Journal
from rankine.checkpoint.journal import digest
from rankine.engine.run import Run, open_journal
from rankine.statistics import Need

#: Where the surveys of what runs now are shared; None: each run keeps its own.
_SHARED: ContextVar[Path | None] = ContextVar("surveys", default=None)


@contextmanager
def shared_surveys(work: str | Path | None, output: str | Path | None) -> Iterator[None]:
    """Runs inside share surveys of their first stage. They lie in the work directory, else beside
    the output (so that a killed comparison finds them), else in a temporary directory, and go when
    all is done."""
    with tempfile.TemporaryDirectory(prefix="rankine-") as scratch:
        place = Path(scratch) / "surveys"
        if work is not None:
            place = Path(work) / "surveys"
        elif output is not None:
            place = Path(output).with_name(Path(output).name + ".rankine-surveys")
        token = _SHARED.set(place)
        try:
            yield
        finally:
            _SHARED.reset(token)
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def survey_journal(
    run: Run, number: int, needs: Mapping[str, frozenset[Need]]
) -> Iterator[Journal]:
    """Where a stage's survey is kept: the run's own journal, or the shared one. Later stages of a
    chain see what the earlier ones left, so theirs is never shared."""
    place = _SHARED.get()
    if place is None or number > 0:
        yield run.journal
        return
    measured = {path: sorted(map(repr, need)) for path, need in sorted(needs.items())}
    depends = {k: v for k, v in run.journal.fingerprint.items() if k != "recipe"}
    depends |= {"needs": digest(measured), "device": f"{run.recipe.device}, {run.streamed}"}
    shared = Path(run.group.first(lambda: str(place))) / digest(depends)[:16]
    with open_journal(run.group, shared, depends, fresh=False) as journal:
        yield journal  # read again after it is closed: the lock guards writing
