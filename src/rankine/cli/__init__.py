"""The command line: a thin face of the Python verbs. Nothing here computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rankine.threads import be_passive

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 a user's mistake, 3 no result that holds what was
    asked, 130 interrupted."""
    be_passive()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command; every mistake becomes one sentence on stderr, here."""
    import typer

    from rankine.cli.app import app
    from rankine.errors import UserError

    try:
        code = app(list(arguments) or ["--help"], prog_name="rankine", standalone_mode=False)
    except UserError as error:
        return _complain(str(error), error.exit_code)
    except typer.TyperException as error:
        return _complain(error.format_message(), UserError.exit_code)
    if code == INTERRUPTED:  # typer turns KeyboardInterrupt into this code
        return _complain("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _complain(sentence: str, code: int) -> int:
    sys.stdout.flush()
    print("rankine: " + " ".join(sentence.split()), file=sys.stderr)
    return code
