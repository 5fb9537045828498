"""Small models and texts to spoil, and the command line that must bear it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import command_line as shared
import rankine as library
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
def refused(rankine) -> Callable[..., str]:
    """The one sentence with which a command ends that must fail; it says what was expected."""

    def run(*arguments: object) -> str:
        ran = rankine(*arguments)
        assert ran.code == 2, (ran.code, ran.out, ran.err)
        sentence = ran.sentence
        assert "expected" in sentence or "unknown" in sentence, sentence
        assert sentence.isprintable()
        return sentence

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


@pytest.fixture(scope="session")
def compressed(tiny, text, tmp_path_factory) -> Path:
    """A Rankine checkpoint of `tiny`: two factors everywhere."""
    out = tmp_path_factory.mktemp("compressed") / "model"
    fields = {"method": "svd", "keep": 0.6, "calibration": str(text), "evaluation": str(text)}
    library.compress(str(tiny), output=out, tokens="4x32", evaluate=False, **fields)
    return out


@pytest.fixture
def directory(compressed, tmp_path) -> Path:
    """A copy of it to spoil, without the hashes that would tell."""
    copy = shutil.copytree(compressed, tmp_path / "model")
    (copy / "SHA256SUMS").unlink()
    return copy
