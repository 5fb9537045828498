"""`rankine new-method` refuses before it writes. (What it writes: tests/packaging.)"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["My-SVD", "class", "1st", "", "svd llm", "../svd"])
def test_names_that_are_no_names(rankine, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    ran = rankine("new-method", name)
    assert ran.code == 2
    assert "my_svd" in ran.sentence


def test_a_name_that_is_taken(rankine, monkeypatch):
    monkeypatch.chdir(ROOT)
    ran = rankine("new-method", "svd_llm")
    assert ran.code == 2
    assert "svd_llm.py" in ran.sentence


def test_outside_a_checkout(rankine, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = rankine("new-method", "my_svd")
    assert ran.code == 2
    assert "rankine.methods" in ran.sentence
    assert list(tmp_path.iterdir()) == []
