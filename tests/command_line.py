"""Runs of the command line in this process, and what they need: fixtures that several rooms'
conftest files take over."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import byte_models
from rankine import cli


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The complaint: the last line on stderr, and the only one that is no progress."""
        *before, last = self.err.strip().splitlines()
        assert all(re.fullmatch(r".+: \d+ of \d+", line) for line in before), self.err
        assert last.startswith("rankine: ")
        return last.removeprefix("rankine: ")


@pytest.fixture
def rankine(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """rankine("compress", ...) in this process."""

    def run(*arguments: object) -> Ran:
        code = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama with a byte-level tokenizer, as a directory."""
    return byte_models.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some kilobytes of text."""
    lines = [f"def add_{n}(first, second): return first + {n} * second" for n in range(300)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines), "utf-8")
    return file


@pytest.fixture(scope="session")
def small(text: Path) -> list[str]:
    """Options that keep a run small and offline."""
    return [
        *("--calibration", str(text), "--evaluation", str(text)),
        *("--tokens", "4x32", "--eval-tokens", "200", "--threads", "1"),
    ]
