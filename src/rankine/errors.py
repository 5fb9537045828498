"""The one exception a user can cause: a sentence that says what was expected, found, and to do."""

from typing import Any


class UserError(Exception):
    """A user's mistake. The command line prints the message and exits with code 2."""

    exit_code = 2


class BudgetError(UserError):
    """A budget that no choice of sizes can meet. Exit code 3."""

    exit_code = 3


class AcceptanceError(UserError):
    """A request understood and tried, whose result does not hold what was asked. Exit code 3.

    `report` holds what was measured, where something was.
    """

    exit_code = 3

    def __init__(self, message: str, report: dict[str, Any] | None = None):
        super().__init__(message)
        self.report = report


def suggest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """`'; did you mean "svd"?'` or the list of what exists: the tail of an unknown-name error."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if near:
        return f'did you mean "{near[0]}"?'
    return "known: " + ", ".join(sorted(known))
