"""A user's own code on the command line: `package.module:name`, from the current directory."""

import json
import sys

import pytest

from rankine import own
from rankine.errors import UserError
from rankine.recipe import Recipe

NETS = """
import torch
from torch import nn
import torch.nn.functional as F

generator = torch.Generator().manual_seed(0)
x, y = torch.randn(96, 12, generator=generator), torch.randint(0, 3, (96,), generator=generator)
batches = [(x[:32], y[:32]), (x[32:64], y[32:64])]
held_out = [(x[64:], y[64:])]
example = x[:2]

def build():
    torch.manual_seed(0)
    first, second, last = nn.Linear(12, 40), nn.Linear(40, 40), nn.Linear(40, 3)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)

def loss(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")

def metrics(model):
    return {"hits": float((model(x).argmax(-1) == y).float().mean()), "zero": 0.0}

def number(model):
    return 0.5

not_a_model = 3
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A current directory with a package of the user's; what it imported is forgotten after."""
    place = tmp_path / "home"
    (place / "shop").mkdir(parents=True)
    (place / "shop" / "nets.py").write_text(NETS)
    monkeypatch.chdir(place)
    before, path = set(sys.modules), list(sys.path)
    yield place
    assert sys.path == path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "shop":
            del sys.modules[name]


DATA = ("--calibration", "shop.nets:batches", "--loss", "shop.nets:loss")
OWN = (*DATA, "--evaluate", "shop.nets:metrics", "--threads", "1")


def test_from_plan_to_export(rankine, home):
    """Every verb that makes sense for a module of one's own, in the order of use."""
    asked = ("--model", "shop.nets:build", "--method", "auto", "--bits", "10", *OWN)
    ran = rankine("plan", *asked)
    assert (ran.code, ran.err) == (0, "")
    assert "rankine.load(DIR, into=module)" in ran.out
    ran = rankine("compress", *asked, "-o", "small", "--accept", "hits>=0.0")
    assert ran.code == 0, ran.err
    assert {"hits", "zero"} <= set(ran.out.splitlines()[0].split())
    assert sorted(p.name for p in home.iterdir() if p.name != "__pycache__") == ["shop", "small"]

    into = ("--into", "shop.nets:build")
    metrics = ("--evaluate", "shop.nets:metrics", "--threads", "1")
    ran = rankine("eval", "small", *into, "--against", "shop.nets:build", *metrics, "--json")
    dense, small = json.loads(ran.out)["rows"]
    assert small["bytes"] < dense["bytes"]
    assert set(small["metrics"]) == {"hits", "zero"}
    assert "--accept" not in rankine("eval", "small", *into, *metrics, "--accept", "zero<=0").err
    refused = rankine("eval", "small", *into, *metrics, "--accept", "zero>=1")
    assert (refused.code, refused.sentence) == (3, "expected zero >= 1, found 0")
    assert "hits" in refused.out
    assert "low_rank" in rankine("inspect", "small").out
    ran = rankine(
        "heal", "small", *into, "--teacher", "shop.nets:build", "--data", "shop.nets:batches",
        *OWN[2:], "--set", "steps=3", "-o", "healed",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "hits" in ran.out
    ran = rankine("compress", "healed", *into, "--method", "rtn", "-o", "smaller", *metrics)
    assert ran.code == 0, ran.err
    assert "quantized" in rankine("inspect", "smaller").out
    ran = rankine("export", "small", *into, "-o", "dense")
    assert ran.code == 0, ran.err
    assert json.loads(rankine("inspect", "dense", "--json").out)["modules"] == {}
    ran = rankine("export", "small", *into, "-o", "net.onnx")
    assert ran.code == 2
    assert "--example-inputs" in ran.sentence


@pytest.mark.slow
def test_onnx(rankine, home):
    rankine("compress", "shop.nets:build", "--method", "svd", "--bits", "10", "-o", "small")
    into = ("--into", "shop.nets:build")
    inputs = ("--example-inputs", "shop.nets:example")
    ran = rankine("export", "small", *into, *inputs, "-o", "net.onnx")
    assert ran.code == 0, ran.err
    assert (home / "net.onnx").stat().st_size > 1000


def test_compare_shows_the_users_figures(rankine, home):
    ran = rankine("compare", "shop.nets:build", "--methods", "svd,svd_llm", "--keep", "0.7", *OWN)
    assert ran.code == 0, ran.err
    assert "hits" in ran.out.splitlines()[0]
    assert len(ran.out.splitlines()) == 6


def test_compare_says_what_is_accepted(rankine, home):
    asked = ("shop.nets:build", "--methods", "svd", "--keep", "0.7", *OWN)
    ran = rankine("compare", *asked, "--accept", "hits>=0")
    assert ran.code == 0, ran.err
    assert "accepted" in ran.out.splitlines()[0]
    assert ran.out.count("yes") == 1
    ran = rankine("compare", *asked, "--accept", "hits>=0", "--accept", "zero>=1")
    assert ran.code == 3
    assert "holds hits>=0 and zero>=1, found none among 1" in ran.sentence
    assert " no" in ran.out


def test_a_language_model_has_figures_of_its_users_too(rankine, home, tiny, text):
    (home / "shop" / "figures.py").write_text(
        "def depth(model):\n    return {'blocks': len(model.model.layers)}\n"
    )
    ran = rankine(
        "compress", tiny, "--method", "svd", "--keep", "0.6", "--evaluation", text,
        "--eval-tokens", "200", "--threads", "1", "--evaluate", "shop.figures:depth",
        "--calibration", text, "--tokens", "4x32", "--accept", "blocks>=2", "-o", "small",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert {"perplexity", "blocks"} <= set(ran.out.splitlines()[0].split())


def test_what_is_not_accepted_exits_with_3(rankine, home):
    """The table on stdout, one sentence on stderr, the report beside, no output."""
    asked = ("shop.nets:build", "--method", "svd", "--bits", "6", *OWN, "-o", "small")
    ran = rankine("compress", *asked, "--accept", "zero >= 0.5", "--accept", "hits >= 0")
    assert ran.code == 3
    assert "expected zero >= 0.5, found 0 (dense 0)" in ran.sentence
    assert "small.report" in ran.sentence
    assert "svd" in ran.out
    assert sorted(p.name for p in home.iterdir()) == ["shop", "small.report"]
    assert {p.name for p in (home / "small.report").iterdir()} == {"report.html", "report.json"}
    data = json.loads(rankine("compress", *asked, "--accept", "zero>0", "--json").out)
    assert data["rows"][-1]["metrics"]["zero"] == 0


def test_a_recipe_names_them_too(rankine, home):
    lines = [
        "model: shop.nets:build",
        "method: svd_llm",
        "bits: 10",
        "calibration: shop.nets:batches",
    ]
    (home / "recipe.yaml").write_text(
        "\n".join([*lines, "evaluate: shop.nets:metrics", "threads: 1"])
    )
    ran = rankine("compress", "--recipe", "recipe.yaml", "--allow-code", "-o", "small")
    assert ran.code == 0, ran.err
    assert "hits" in ran.out


@pytest.mark.parametrize(
    "text",
    [
        "keep: 0.5\nmethod: svd\nmodel: shop.evil:build",
        "bits: 9\nmethod: svd\nevaluate: shop.evil:metrics",
        "keep: 0.5\nset: {structures: [shop.evil:name]}",
        "stages: [{method: svd, keep: 0.5}, {method: heal, set: {teacher: 'shop.evil:build'}}]",
    ],
)
def test_a_strangers_recipe_imports_nothing(rankine, home, text):
    """Wherever it names code; what the user types instead, or allows, is imported."""
    (home / "shop" / "evil.py").write_text("open('ran', 'w').close()\n")
    (home / "recipe.yaml").write_text(text)
    for verb in (["plan"], ["compress", "-o", "small"]):
        ran = rankine(*verb, "--recipe", "recipe.yaml")
        assert ran.code == 2
        assert "shop.evil:" in ran.sentence
        assert "--allow-code" in ran.sentence
        assert not (home / "ran").exists()
    with pytest.raises(UserError, match="--allow-code"):
        Recipe.read(home / "recipe.yaml")
    assert Recipe.read(home / "recipe.yaml", allow_code=True)


def test_what_is_typed_over_a_recipe_needs_no_leave(rankine, home):
    (home / "recipe.yaml").write_text("model: shop.evil:build\nmethod: svd\nbits: 10\n")
    ran = rankine("plan", "shop.nets:build", "--recipe", "recipe.yaml", *OWN)
    assert ran.code == 0, ran.err


def test_a_recipe_file_does_not_allow_pickles(rankine, home):
    (home / "recipe.yaml").write_text("allow_pickle: true\nmethod: svd\nbits: 10\n")
    ran = rankine("plan", "--recipe", "recipe.yaml")
    assert (ran.code, "--allow-pickle beside --recipe" in ran.sentence) == (2, True)
    assert rankine("plan", "--recipe", "recipe.yaml", "--allow-pickle").code == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("shop.nest:build",), 'no module "shop.nest"'),
        (("shopp.nets:build",), 'no module "shopp"'),
        (("shop.nets:biuld",), 'did you mean "build"'),
        (("shop.nets:not_a_model",), "returns a torch module, found int"),
        (("shop.nets:build", "--calibration", "shop.nets:not_a_model"), "iterable"),
        (("shop.nets:build", "--calibration", "shop.nets:x"), "in a list"),
        (("shop.nets:build", "--evaluate", "shop.nets:x"), "function"),
        (("shop.nets:build", "--evaluate", "shop.nets:number"), "names and numbers"),
        (("shop.nets:build", "--evaluate", "shop.nets:metrics", "--accept", "hit>0"), '"hits"'),
        (("shop.nets:build", "--evaluate", "no", "--accept", "hits>0"), "evaluate"),
    ],
)
def test_mistakes(rankine, home, arguments, part):
    ran = rankine("compress", *arguments, "--method", "svd", "--keep", "0.5", "-o", "out")
    assert ran.code == 2
    assert part in ran.sentence
    assert not (home / "out").exists()


def test_a_plain_directory_wants_to_know_what_it_goes_into(rankine, home):
    rankine("compress", "shop.nets:build", "--method", "svd", "--bits", "10", "-o", "small")
    ran = rankine("eval", "small", "--evaluate", "shop.nets:metrics")
    assert ran.code == 2
    assert "--into package.module:factory" in ran.sentence
    ran = rankine("eval", "smal/l", "--into", "shop.nets:build", "--evaluate", "shop.nets:metrics")
    assert ran.code == 2
    assert "patch.json" in ran.sentence


def test_the_current_directory_is_importable_only_where_code_is_named(home):
    """It may hold a stranger's files, such as a downloaded checkpoint."""
    with pytest.raises(UserError, match="no module"):
        own.find("shop.nets:build", "a model")
    with (
        own.current_directory_importable(False),
        pytest.raises(UserError, match="run in the directory"),
    ):
        own.find("shop.nets:build", "a model")
    with own.current_directory_importable():
        assert own.find("shop.nets:build", "a model")() is not None


def test_an_error_in_the_users_own_file_is_shown_whole(home):
    (home / "shop" / "broken.py").write_text("import no_such_package\n")
    with own.current_directory_importable(), pytest.raises(ModuleNotFoundError, match="no_such"):
        own.find("shop.broken:build", "a model")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nets:build", True),
        ("shop.nets:Net.build", True),
        ("owner/name:config", False),
        ("embedded", False),
        ("notes.txt", False),
        ("C:\\models", False),
        ("a b:c", False),
        (":c", False),
    ],
)
def test_names(text, named):
    assert own.is_name(text) is named


def test_code_is_known_by_what_it_does():
    def one(outputs, batch):
        return outputs - batch in {1, 2, 3}

    def same(outputs, batch):
        return outputs - batch in {1, 2, 3}

    def other(outputs, batch):
        return outputs + batch in {1, 2, 3}

    assert own.code(one) == own.code(same)
    assert len({own.code(one), own.code(other), own.code(one, one), own.code(None)}) == 4
