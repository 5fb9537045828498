"""A user's mistakes: one sentence, exit code 2, nothing written; 3 where nothing holds."""

import pytest

from rankine import cli
from rankine.errors import AcceptanceError, BudgetError


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--keep", "0"], "keep"),
        (["--keep", "1.5"], "keep"),
        (["--keep", "much"], "keep"),
        (["--size", "4 elephants"], "4GB"),
        (["--keep", "0.5", "--bits", "3"], "one"),
        ([], "--keep 0.7"),
        (["--keep", "0.5", "--method", "svd_lm"], 'did you mean "svd_llm"'),
        (["--keep", "0.5", "--method", "zzz"], "known: "),
        (["--keep", "0.5", "--method", "auto", "--set", "rigde=1"], 'did you mean "ridge"'),
        (["--keep", "0.5", "--method", "svd", "--set", "rank=1"], "it has none"),
        (["--keep", "0.5", "--set", "ridge"], "NAME=VALUE"),
        (["--keep", "0.5", "--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["--keep", "0.5", "--seed", "x"], "seed"),
        (["--keep", "0.5", "--threads", "0"], "threads"),
        (["--keep", "0.5", "--device", "tpu"], "cuda"),
        (["--keep", "0.5", "--dtype", "int3"], "bfloat16"),
        (["--keep", "0.5", "--tokens", "many"], "128x2048"),
        (["--keep", "0.5", "--max-loss", "tiny"], "1.02x"),
        (["--kep", "0.5"], "--keep"),
        (["--keep", "0.5", "--accept", "auc"], "auc>=0.80"),
        (["--keep", "0.5", "--accept", "auc>=high"], "auc>=0.80"),
        (["--keep", "0.5", "--loss", "loss.py"], "package.module:name"),
        (["--keep", "0.5", "--evaluate", "<function auc>"], "given in Python"),
        (["--keep", "0.5", "--model", "another"], "name it once"),
    ],
)
def test_wrong_options(rankine, tmp_path, arguments, part):
    output = tmp_path / "out"
    ran = rankine("compress", "embedded", *arguments, "-o", output)
    assert ran.code == 2
    assert part in ran.sentence
    assert list(tmp_path.iterdir()) == []


def test_no_output(rankine):
    ran = rankine("compress", "embedded", "--keep", "0.5")
    assert ran.code == 2
    assert "-o DIR" in ran.sentence


def test_unknown_verb_suggests(rankine):
    ran = rankine("comprss")
    assert ran.code == 2
    assert "compress" in ran.sentence


@pytest.mark.parametrize(
    ("error", "code"),
    [(BudgetError("no room"), 3), (AcceptanceError("too much"), 3), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(rankine, monkeypatch, error, code):
    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("rankine.cli.known.catalogue", fails)
    ran = rankine("methods")
    assert ran.code == code
    assert ran.sentence


def test_an_unexpected_error_is_not_hidden(monkeypatch):
    def fails():
        raise ZeroDivisionError

    monkeypatch.setattr("rankine.cli.known.catalogue", fails)
    with pytest.raises(ZeroDivisionError):
        cli.run(["methods"])
