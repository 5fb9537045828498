"""A user's mistakes: one sentence, exit code 2, nothing written; 3 where nothing holds."""

import pytest
import yaml

from rankine import cli
from rankine.errors import AcceptanceError, BudgetError


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--keep", "0"], "keep"),
        (["--keep", "1.5"], "keep"),
        (["--keep", "70%"], "expected keep to be a number, found '70%': stored bits"),
        (["--keep", "0.5", "--eval-tokens", "1e3"], "eval_tokens to be a whole number"),
        (["--keep", "0.5", "--method", "SVD"], 'did you mean "svd"'),
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
        (["--keep", "0.5", "--method", "svd", "--memory", "lots"], "memory must be an amount"),
        (["--keep", "0.5", "--seed", "99999999999999999999"], "seed"),
        (["--keep", "0.5", "--threads", "0"], "threads"),
        (["--keep", "0.5", "--device", "tpu"], "cuda"),
        (["--keep", "0.5", "--dtype", "int3"], "bfloat16"),
        (["--keep", "0.5", "--tokens", "many"], "128x2048"),
        (["--keep", "0.5", "--max-loss", "tiny"], "1.02x"),
        (["--kep", "0.5"], "--keep"),
        (["--keep", "0.5", "--accept", "auc"], "auc>=0.80"),
        (["--keep", "0.5", "--accept", "auc>=high"], "auc>=0.80"),
        (["--keep", "0.5", "--accept", "auc>=nan"], "auc>=0.80"),
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


@pytest.mark.parametrize(
    ("method", "knob", "part"),
    [
        ("kfac_svd", "middle=7", "middle above 0"),
        ("kfac_svd", "clip=-1", "clip of at least 1"),
        ("kfac_svd", "shrink_out=2", "shrink_out between 0 and 1"),
        ("auto", "shrink_in=-3", "shrink_in between 0 and 1"),
        ("auto", "ridge=0", "ridge above 0"),
        ("auto", "epochs=0", "epochs"),
        ("auto", "lr=-1", "lr above 0"),
        ("auto", "solve=guess", "two_sided"),
        ("anchored_svd", "ridge=-1", "ridge above 0"),
        ("lord", "sweep=0.5,2", "sweep"),
        ("rtn", "code_bits=17", "code_bits"),
        ("rtn", "group=0", "group"),
        ("svd_llm", "ridge=1", "it has none"),
    ],
)
def test_knobs_out_of_range(rankine, tmp_path, method, knob, part):
    """Also where a plan, or a table of several, is all that was asked for."""
    size = [] if method == "rtn" else ["--keep", "0.5"]
    asked = ["embedded", "--method", method, *size, "--set", knob]
    for verb in (["compress", *asked, "-o", tmp_path / "out"], ["plan", *asked]):
        ran = rankine(*verb)
        assert ran.code == 2
        assert part in ran.sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stages", "part"),
    [
        ([{"method": "heal"}], "rankine heal"),
        ([{"method": "svd", "keep": 0.5}, {"method": "fused"}], "runs a finished model"),
        ([{"method": "rtn"}, {"method": "svd", "keep": 0.5}], "cannot follow a quantization"),
        ([{"method": "svd"}], "--keep 0.7"),
    ],
)
def test_chains_that_make_nothing_smaller(rankine, tmp_path, stages, part):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}))
    ran = rankine("compress", "embedded", "--recipe", file, "-o", tmp_path / "out")
    assert ran.code == 2
    assert part in ran.sentence
    assert list(tmp_path.iterdir()) == [file]


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
