"""Runs of the command line: in this process where that shows the same, in a fresh one else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from command_line import Ran, rankine, small, text, tiny

__all__ = ["fresh", "rankine", "small", "text", "tiny"]


@pytest.fixture
def fresh() -> Callable[..., Ran]:
    """The same in a fresh Python; `code` there replaces the command line."""

    def run(*arguments: object, code: str | None = None) -> Ran:
        program = ["-c", code] if code else ["-m", "rankine", *map(str, arguments)]
        done = subprocess.run(
            [sys.executable, *program],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            timeout=120,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
