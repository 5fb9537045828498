"""Runs of the command line: in this process where that shows the same, in a fresh one else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from rankine import cli


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on stderr."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("rankine: ")
        return lines[0].removeprefix("rankine: ")


@pytest.fixture
def rankine(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """rankine("compress", ...) in this process."""

    def run(*arguments: object) -> Ran:
        code = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run


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
