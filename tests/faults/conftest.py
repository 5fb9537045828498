"""Small models and texts to spoil, and the command line that must bear it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import rankine as library
from command_line import rankine, small, text, tiny

__all__ = ["compressed", "directory", "rankine", "refused", "small", "text", "tiny"]


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
