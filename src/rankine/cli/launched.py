"""One command on several ranks, as torchrun starts it: the first one speaks and writes. Why a run
ends is said once, by the first rank or, where that is gone, by the next one that is not."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout

from rankine.errors import UserError
from rankine.ranks import Group, RankError, joined, launched

#: Verbs that share their work out.
TOGETHER = ("compress", "compare")


class ToldError(Exception):
    """The run ended by an error that another rank tells."""

    def __init__(self, exit_code: int):
        super().__init__("told by another rank")
        self.exit_code = exit_code


def is_first() -> bool:
    """Does this process speak?"""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def muted() -> Iterator[None]:
    """Inside, ranks other than the first print nothing, and torch's C++ nothing but errors: whom it
    lost, we tell."""
    if not launched():
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with open(os.devnull, "w") as nowhere:
        first = is_first()
        with (
            nullcontext() if first else redirect_stdout(nowhere),
            nullcontext() if first else redirect_stderr(nowhere),
        ):
            yield


@contextmanager
def together(timeout: float) -> Iterator[Group]:
    """The group that was launched, or this process. A known error leaves the context as itself on
    the rank that tells it (as a RankError, if that is not the first), as ToldError on the others;
    a bug shows its traceback wherever it is."""
    with joined(timeout) as group:
        try:
            yield group
        except Exception as error:
            told = _as_told(group, group.leave(error))
            if told is error:
                raise
            raise told from error


def _as_told(group: Group, error: BaseException) -> BaseException:
    code = getattr(error, "exit_code", None)
    if code is None or group.leads:
        return error
    if not group.speaks:
        return ToldError(code)
    again = not isinstance(error, UserError)
    return error if isinstance(error, RankError) else RankError(str(error), code, again)


def check_verb(verb: str | None) -> None:
    """Raises UserError for a verb that does not share its work out."""
    if launched() and verb not in TOGETHER:
        raise UserError(
            f"expected one process for `rankine {verb}`, found {os.environ['WORLD_SIZE']} ranks: "
            f"start it without torchrun; only {' and '.join(TOGETHER)} run on several"
        )


def same_command(arguments: Sequence[str]) -> str:
    """What to type to go on."""
    words = ["rankine", *(a for a in arguments if a != "--fresh")]
    if not launched():
        return shlex.join(words)
    size, here = (int(os.environ.get(n, "1")) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = ["--nnodes", str(size // here)] if here < size else []
    return shlex.join(["torchrun", *nodes, "--nproc-per-node", str(here), "-m", *words])
