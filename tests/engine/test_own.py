"""A user's own torch model: keywords make its task, and what is measured is what was written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import digits
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankine
import tiny_models as tiny
from rankine.checkpoint.given import skeleton
from rankine.errors import AcceptanceError, UserError
from rankine.recipe import Recipe

OWN = {"calibration": digits.batches, "loss": digits.loss, "evaluate": digits.metrics}
HERE = Path(digits.__file__).parent
METHODS = ["svd", "rtn", "svd_llm", "lord", "kfac_svd", "anchored_svd", "auto"]


@pytest.fixture(scope="module")
def trained():
    return digits.trained().state_dict()


@pytest.fixture
def net(trained):
    """A trained network of one's own."""
    model = digits.Net()
    model.load_state_dict(trained)
    return model.eval()


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """(directory, model, report) of one compression."""
    model = digits.Net()
    model.load_state_dict(trained)
    place = tmp_path_factory.mktemp("own") / "out"
    result = rankine.compress(model, method="auto", bits=6.0, output=place, **OWN)
    return place, model, result.report


def auc(rows, kind="result"):
    return next(row["metrics"]["auc"] for row in rows if row["kind"] == kind)


# -- the thirty lines of digits.py ----------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_keywords(net, method):
    size = {} if method == "rtn" else {"bits": 8.0}
    result = rankine.compress(net, method=method, **size, **OWN)
    assert 0.9 < auc(result.report["rows"]) <= 1
    assert auc(result.report["rows"]) == pytest.approx(digits_auc(net), abs=1e-6)
    assert "auc" in result.table().splitlines()[0]
    assert "perplexity" not in result.table()


def digits_auc(model):
    with torch.no_grad():
        return digits.metrics(model)["auc"]


def test_what_is_written_loads_into_a_fresh_module(written):
    place, model, report = written
    fresh = rankine.load(place, into=digits.Net())
    with torch.no_grad():
        assert torch.equal(fresh(digits.x), model(digits.x))
    on_disk = json.loads((place / "report.json").read_text())
    assert auc(on_disk["rows"]) == auc(report["rows"]) == pytest.approx(digits_auc(fresh))
    assert on_disk["recipe"]["evaluate"] == "<function metrics>"
    assert "auc" in (place / "report.html").read_text()
    card = (place / "README.md").read_text()
    assert 'rankine.load("out", into=Net(...))' in card
    assert "auc" in card
    assert sorted(p.name for p in place.parent.iterdir()) == ["out"]


def test_the_figures_are_those_of_the_files(net, tmp_path):
    """The last model measured is one that was loaded from the directory."""
    seen = []

    def metrics(model):
        seen.append(model)
        return digits.metrics(model)

    own = {**OWN, "evaluate": metrics}
    result = rankine.compress(net, method="svd", bits=6.0, output=tmp_path / "out", **own)
    assert all(model is not result.model for model in seen)
    last = seen[-1].state_dict()
    assert all(torch.equal(last[name], t) for name, t in result.model.state_dict().items())


def test_save_needs_no_patch(written, tmp_path):
    """In memory after a compression, or loaded: the module knows what stands in it."""
    place, model, _ = written
    for n, known in enumerate([model, rankine.load(place, into=digits.Net())]):
        rankine.save(known, tmp_path / str(n))
        again = rankine.load(tmp_path / str(n), into=digits.Net())
        assert torch.equal(again(digits.x), model(digits.x))
        files = [(d / "model.safetensors").read_bytes() for d in (place, tmp_path / str(n))]
        assert files[0] == files[1]


def test_the_skeleton_holds_no_weights(net):
    empty = skeleton(net)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert skeleton(tiny.llama()) is None


def test_eval_compare_and_plan(written, net):
    place, _, report = written
    found = rankine.evaluate(str(place), into=digits.Net, against=net, evaluate=digits.metrics)
    dense, result = found["rows"]
    assert (dense["kind"], result["kind"], found["difference"]) == ("dense", "result", None)
    assert auc(found["rows"]) == auc(report["rows"])
    assert result["bytes"] < dense["bytes"]
    rows = rankine.compare(net, methods=["svd", "svd_llm"], keep=[0.4], **OWN)
    assert sum(row["kind"] == "result" for row in rows) == 2
    assert all(0.5 < row["metrics"]["auc"] <= 1 for row in rows)
    plan = rankine.plan(net, method="svd_llm", keep=0.4, calibration=digits.batches)
    assert "ONNX Runtime" in plan.runs_on
    assert not any("vLLM" in place for place in plan.runs_on)
    with pytest.raises(UserError, match="figures of your own"):
        rankine.evaluate(net)


def test_healing(written, net, tmp_path):
    place, _, report = written
    knobs = {"kl_weight": 0.0, "steps": 30, "lr": 3e-3}
    healed = rankine.heal(
        str(place),
        into=digits.Net,
        data=digits.batches,
        loss=digits.loss,
        evaluate=digits.metrics,
        output=tmp_path / "healed",
        **knobs,
    )
    before, after = healed.report["rows"][-2:]
    assert auc([before]) == pytest.approx(auc(report["rows"]))
    assert after["metrics"]["auc"] != before["metrics"]["auc"]
    again = rankine.load(tmp_path / "healed", into=digits.Net())
    assert digits_auc(again) == pytest.approx(after["metrics"]["auc"])


def test_one_output_cannot_be_distilled(written, net):
    asked = {"into": digits.Net, "data": digits.batches, "loss": digits.loss, "evaluate": False}
    with pytest.raises(UserError, match="kl_weight=0"):
        rankine.heal(str(written[0]), teacher=net, steps=1, **asked)


# -- what a method needs --------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["svd", "rtn"])
def test_methods_without_data_need_none(net, method, tmp_path):
    size = {} if method == "rtn" else {"keep": 0.5}
    rankine.compress(net, method=method, **size, output=tmp_path / "out")
    assert torch.equal(rankine.load(tmp_path / "out", into=digits.Net())(digits.x), net(digits.x))


@pytest.mark.parametrize(
    ("method", "given", "wanted"),
    [
        ("svd_llm", {}, "calibration="),
        ("auto", {}, "calibration="),
        ("kfac_svd", {"calibration": digits.batches}, "loss="),
        ("auto", {"calibration": digits.batches}, "loss="),
        ("lord", {"calibration": digits.batches}, "loss="),
        ("svd_llm", {"calibration": digits.x}, "list"),
        ("svd_llm", {"calibration": {"x": digits.x}}, "list"),
        ("svd_llm", {"calibration": 5}, "iterable"),
        ("svd_llm", {"calibration": []}, "calibration="),
        ("svd", {"evaluate": lambda model: 0.5}, "names and numbers"),
        ("svd", {"loss": "loss"}, "package.module:name"),
        ("svd", {"forward": 3}, "a function"),
        ("svd", {"calibration": "notes.txt"}, "a tokenizer"),
    ],
)
def test_what_is_missing_is_one_sentence(net, method, given, wanted, tmp_path):
    with pytest.raises(UserError, match=wanted) as caught:
        rankine.compress(net, method=method, keep=0.5, output=tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_forward_and_generators(net):
    """Batches read only once, and a forward of one's own: the same choices as with the list."""
    plain = rankine.compress(net, method="svd_llm", bits=6.0, **OWN)
    other = digits.Net()
    other.load_state_dict(digits.trained().state_dict())
    given = {
        "calibration": ({"pixels": x, "even": y} for x, y in digits.batches),
        "forward": lambda model, batch: model(batch["pixels"]),
        "evaluate": False,
    }
    result = rankine.compress(other.eval(), method="svd_llm", bits=6.0, **given)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


def test_half_precision_models_get_their_batches_in_half(net):
    result = rankine.compress(net, method="svd_llm", keep=0.6, dtype="bfloat16", **OWN)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert auc(result.report["rows"]) > 0.9


# -- acceptance -----------------------------------------------------------------------------------
def test_accepted(net, tmp_path):
    conditions = ["auc>=0.9", "bytes<20000"]
    rankine.compress(
        net, method="auto", bits=6.0, output=tmp_path / "out", accept=conditions, **OWN
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_refused(net, tmp_path):
    """The sentence says how far off; nothing is written but the report, beside."""
    asked = {"method": "svd", "bits": 2.0, "accept": "auc>=0.999", **OWN}
    with pytest.raises(AcceptanceError, match=r"expected auc >= 0\.999, found 0\.9\d+ \(dense"):
        rankine.compress(net, output=tmp_path / "out", **asked)
    assert [p.name for p in tmp_path.iterdir()] == ["out.report"]
    report = json.loads((tmp_path / "out.report" / "report.json").read_text())
    assert auc(report["rows"]) < 0.999
    assert (tmp_path / "out.report" / "report.html").is_file()


def test_refused_in_memory_the_module_is_as_it_was(net):
    """Its tensors, their dtype, its modules and its mode; so it can be asked for otherwise."""
    net.train()
    before = {name: (t, t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    modules = list(net.modules())
    asked = {"method": "svd", "bits": 2.0, "accept": "auc>=0.999", "dtype": "bfloat16", **OWN}
    with pytest.raises(AcceptanceError, match="found 0"):
        rankine.compress(net, **asked)
    assert list(map(id, net.modules())) == list(map(id, modules))
    assert net.training
    after = net.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, value)
    assert not hasattr(net, "rankine_patch")
    rankine.compress(net, **{**asked, "accept": "auc>=0.1"})
    assert hasattr(net, "rankine_patch")


def test_a_comparison_says_which_results_are_accepted(net, tmp_path):
    asked = {"methods": ["svd"], "keep": [0.9, 0.06], "output": tmp_path / "arms", **OWN}
    rows = rankine.compare(net, accept="keep>0.5", **asked)
    held = {row["keep"] > 0.5: row["accepted"] for row in rows if row["kind"] == "result"}
    assert held == {True: True, False: False}
    assert {p.name for p in (tmp_path / "arms").iterdir()} == {"svd-0.9", "svd-0.06.report"}
    assert "accepted" not in rows[0]
    with pytest.raises(AcceptanceError, match="holds auc>=1 and bytes>0, found none among 2") as no:
        rankine.compare(net, accept=["auc>=1", "bytes>0"], **{**asked, "output": None})
    assert len(no.value.report["rows"]) == len(rows)


def test_a_figure_that_is_not_measured(net):
    """Said before any work."""
    stages = []
    asked = {"keep": 0.5, "progress": lambda stage, done, total: stages.append(stage), **OWN}
    with pytest.raises(UserError, match='did you mean "auc"') as caught:
        rankine.compress(net, method="svd_llm", accept="auk>=0.5", **asked)
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="evaluate"):
        rankine.compress(net, method="svd", accept="auc>=0.5", **{**asked, "evaluate": False})
    assert "survey" not in stages


def test_the_smallest_that_holds_a_loss_of_ones_own(net):
    held_out = [(digits.x[1200:], digits.y[1200:])]
    own = {"calibration": digits.batches, "loss": digits.loss, "evaluation": held_out}
    result = rankine.compress(net, method="svd_llm", max_loss="0.02", **own)
    dense, *_, last = result.report["rows"]
    assert last["loss"] - dense["loss"] <= 0.02
    assert len(result.report["search"]["tried"]) > 1
    assert result.model is net
    with pytest.raises(UserError, match="--accept"):
        rankine.compress(digits.Net(), method="svd", max_loss="0.02", evaluate=digits.metrics)


# -- other architectures --------------------------------------------------------------------------
class Pictures(nn.Module):
    """A small convolution, a normalisation with moving statistics, a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = {"classes": 10}  # no transformers config
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, image):
        return self.head(self.features(image).flatten(1))


def test_a_convolution_with_a_linear_head(tmp_path):
    model = Pictures().eval()
    model.features[1].running_mean += 0.1
    images = digits.x.view(-1, 1, 8, 8)
    rankine.compress(
        model,
        method="svd_llm",
        keep=0.5,
        calibration=[{"image": images[:64]}],
        output=tmp_path / "out",
        include="head",
    )
    again = rankine.load(tmp_path / "out", into=Pictures()).eval()
    assert torch.equal(again(images[:5]), model(images[:5]))
    assert hasattr(again.head, "down")
    assert type(again.features[0]) is nn.Conv2d


class Clicks(nn.Module):
    """Two tables of ids, tied to nothing, and one that is the output's weight too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item = nn.Embedding(60, 16), nn.Embedding(40, 16, padding_idx=0)
        self.hidden = nn.Linear(32, 16)
        self.item_scores = nn.Linear(16, 40, bias=False)
        self.item_scores.weight = self.item.weight

    def forward(self, user, item):
        both = torch.cat([self.user(user), self.item(item)], -1)
        return self.item_scores(torch.tanh(self.hidden(both)))


def clicks(count=32):
    g = tiny.seeded(0)
    user = torch.randint(0, 60, (count,), generator=g)
    item = torch.randint(0, 40, (count,), generator=g)
    return {"user": user, "item": item}


@pytest.mark.parametrize(("method", "include"), [("svd", ("user", "hidden")), ("auto", "hidden")])
def test_tables_of_ids(method, include, tmp_path):
    model, batch = Clicks().eval(), clicks()
    task = {"calibration": [batch], "loss": lambda out, b: F.cross_entropy(
        out, b["item"], reduction="none"), "evaluation": [clicks(8)]}  # fmt: skip
    result = rankine.compress(
        model, method=method, bits=10.0, output=tmp_path / "out", include=include, **task
    )
    assert {row["kind"] for row in result.report["rows"]} >= {"dense", "result"}
    assert "loss" in result.table().splitlines()[0]
    again = rankine.load(tmp_path / "out", into=Clicks()).eval()
    assert torch.equal(again(**batch), model(**batch))
    assert again.item_scores.weight is again.item.weight


# -- elsewhere ------------------------------------------------------------------------------------
@pytest.mark.parametrize("example", [(digits.x[:3],), {"x": digits.x[:1]}])
def test_onnx(written, example, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    place, model, _ = written
    given = {"into": digits.Net} if isinstance(example, tuple) else {}
    source = str(place) if given else model
    path = rankine.export(source, tmp_path / "net.onnx", example_inputs=example, **given)
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: digits.x[:7].numpy()})
    with torch.no_grad():
        assert abs(found - model(digits.x[:7]).numpy()).max() < 1e-4


def test_dense_again(written, tmp_path):
    from safetensors.torch import load_file

    _, model, _ = written
    rankine.export(model, tmp_path / "dense")
    plain = digits.Net()
    plain.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    with torch.no_grad():
        assert (plain(digits.x) - model(digits.x)).abs().max() < 1e-4
    assert hasattr(model.second, "down"), "the model in memory stays as it is"


# -- recipes --------------------------------------------------------------------------------------
def test_a_recipe_that_is_written_names_what_cannot_be_written(tmp_path):
    recipe = Recipe.of(keep=0.5, calibration=digits.batches, loss=digits.loss, into="digits:Net")
    recipe.write(tmp_path / "recipe.yaml")
    assert "<function loss>" in (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="given in Python"):
        Recipe.read(tmp_path / "recipe.yaml", allow_code=True)
    named = Recipe.of(keep=0.5, calibration="digits:batches", loss="digits:loss")
    named.write(tmp_path / "named.yaml")
    assert Recipe.read(tmp_path / "named.yaml", allow_code=True) == named


def test_names_are_the_same_as_objects(net):
    named = {"calibration": "digits:batches", "loss": "digits:loss", "evaluate": "digits:metrics"}
    one = rankine.compress("digits:trained", method="auto", bits=6.0, **named)
    other = rankine.compress(net, method="auto", bits=6.0, **OWN)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, one.model.state_dict()[name])


def test_an_edited_loss_is_not_resumed(net, tmp_path):
    def twice(outputs, batch):
        return 2 * digits.loss(outputs, batch)

    asked = {"method": "kfac_svd", "bits": 6.0, "work": str(tmp_path / "work"), "evaluate": False}
    data = {"calibration": digits.batches}
    rankine.compress(net, loss=digits.loss, **asked, **data)
    again = digits.trained()
    rankine.compress(again, loss=digits.loss, **asked, **data)
    with pytest.raises(UserError, match="that functions changed"):
        rankine.compress(digits.trained(), loss=twice, **asked, **data)


@pytest.mark.process
@pytest.mark.slow
def test_killed_and_resumed_in_fresh_processes(net, tmp_path):
    """The same bytes as without the kill, and they load where nothing was compressed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**environment, "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    assert run(digits.__file__, tmp_path / "out", "solve", "1").returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == ["out.rankine-work"]
    assert list(tmp_path.glob("out.rankine-work/entries/solve-*/*.json"))
    ran = run(digits.__file__, tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    digits.compressed(net, tmp_path / "whole")
    for name in ("model.safetensors", "patch.json", "SHA256SUMS"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    loading = "import digits, rankine, sys; net = rankine.load(sys.argv[1], into=digits.Net())"
    ran = run("-c", f"{loading}; print(net(digits.x[:9]).tolist())", tmp_path / "out")
    assert json.loads(ran.stdout) == net(digits.x[:9]).tolist(), ran.stderr
