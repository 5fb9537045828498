"""The command line: a thin face of the Python verbs. Nothing here computes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from rankine.manners import as_found
from rankine.threads import be_passive

#: Exit codes; a UserError carries its own.
BROKEN, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 a user's mistake, 3 no result that holds what was
    asked, 130 or 143 stopped by a signal; 1 is ours: a traceback, please report it."""
    be_passive()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command, which leaves the process as it found it; every mistake
    becomes one sentence on stderr, here."""
    from rankine.cli.launched import muted
    from rankine.cli.logs import overheard, say, told, without_option

    arguments, as_json = without_option(arguments)
    with as_found():
        try:
            with muted(), told(as_json), overheard(as_json):
                code, sentence = _outcome(arguments)
        except Exception as error:
            if not as_json:
                raise
            what = f"{type(error).__name__}: {error}"
            with told(as_json):
                say(logging.CRITICAL, what, exit_code=BROKEN, exc_info=error)
            return BROKEN
        sys.stdout.flush()
        if sentence:
            with told(as_json):
                say(logging.ERROR if code else logging.INFO, sentence, exit_code=code)
        return code


def _outcome(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code, and what there is for this process to say."""
    from rankine.cli.launched import ToldError, is_first
    from rankine.ranks import RankError

    try:
        code, sentence = _ended(arguments)
    except ToldError as error:
        return error.exit_code, ""
    except RankError as error:  # said by the lowest rank that is left
        return error.exit_code, f"{error}{_go_on(arguments) if error.again else ''}"
    return code, sentence if is_first() else ""


def _go_on(arguments: Sequence[str]) -> str:
    from rankine.cli.launched import same_command

    return f"; what is done is kept, go on with: {same_command(arguments)}"


def _ended(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of the command, and what there is to say."""
    import typer

    from rankine.cli.app import app
    from rankine.cli.interrupt import StoppedError
    from rankine.errors import UserError
    from rankine.ranks import RankError

    try:
        code = app(list(arguments) or ["--help"], prog_name="rankine", standalone_mode=False)
    except RankError:
        raise
    except UserError as error:
        return error.exit_code, str(error)
    except typer.TyperException as error:
        return UserError.exit_code, error.format_message()
    except StoppedError as error:
        return error.exit_code, f"{error}{_go_on(arguments)}"
    except OSError as error:  # a disk that is full, a file that is not ours to read
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        return UserError.exit_code, f"expected files to read and write, found: {what}"
    if code == INTERRUPTED:  # typer turns KeyboardInterrupt into this code
        return INTERRUPTED, "interrupted"
    return code if isinstance(code, int) else 0, "done"
