"""Runs of the command line: in this process where that shows the same, in a fresh one else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import command_line as shared
from command_line import Ran
from rankine import cli


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random two-block Llama with a byte-level tokenizer, as a directory."""
    return shared.write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Some kilobytes of text."""
    return shared.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def small(text) -> list[str]:
    """Options that keep a run small and offline."""
    return shared.small_run(text)
