"""Any module, in place: a plain network with a task of ten lines, and what a run leaves behind."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankine
import tiny_models as tiny
from rankine.engine.run import cast
from rankine.errors import UserError
from rankine.method import get
from rankine.patch import stored_bits
from rankine.tasks import FunctionTask

METHODS = ["svd", "svd_llm", "basis_sharing", "afm", "lord", "kfac_svd", "anchored_svd", "auto"]


def task():
    """What the dense network gives, and a little noise: it is hard to beat there."""
    g = tiny.seeded(5)
    x, noise = torch.randn(64, 12, generator=g), torch.randn(64, 5, generator=g)
    with torch.no_grad():
        y = tiny.mlp()(x)
    return tiny.vectors(x, y + 0.1 * noise, batch=16)


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_network(method, tmp_path):
    """Compressed in place, written with its report, loaded into a fresh module."""
    model, x = tiny.mlp(), torch.randn(7, 12, generator=tiny.seeded(1))
    result = rankine.compress(
        model, method=method, bits=20.0, task=task(), output=tmp_path / "out", seed=0
    )
    assert result.model is model
    assert result.report["budget"]["bits"] <= 20.0
    assert {r["kind"] for r in result.report["rows"]} >= {"dense", "result"}
    rows = {r["kind"]: r for r in result.report["rows"]}
    assert rows["result"]["loss"] > rows["dense"]["loss"]
    fresh = rankine.load(tmp_path / "out", into=tiny.Mlp())
    assert torch.equal(fresh(x), model(x))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["budget"]["bits"] == result.report["budget"]["bits"]
    assert "result" in result.table() or method in result.table()


def test_refinement_of_a_plain_network():
    errors = {}
    for refine in (False, True):
        model, dense = tiny.mlp(), tiny.mlp()
        knobs = {"refine": refine, "epochs": 30}
        rankine.compress(
            model, method="auto", set=knobs, bits=16.0, task=task(), evaluate=False, seed=0
        )
        x = torch.cat([b[0] for b in task().batches("calibration")])
        with torch.no_grad():
            errors[refine] = float((model(x) - dense(x)).square().sum())
    assert errors[True] < 0.8 * errors[False]


class Residual(nn.Module):
    """Blocks with an addition between them: walked as a whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_that_are_no_chain(method):
    model, dense = Residual(), Residual()
    rankine.compress(model, method=method, bits=22.0, task=task(), evaluate=False)
    x = torch.cat([b[0] for b in task().batches("calibration")])
    with torch.no_grad():
        error = (model(x) - dense(x)).square().sum() / dense(x).square().sum()
    assert 0 < float(error) < 0.5
    assert all(f"layers.{n}.0" in dict(model.named_modules()) for n in range(3))


def test_a_classifier_of_transformers():
    model = tiny.bert()
    result = rankine.compress(model, method="auto", bits=20.0, task=tiny.classified(), seed=0)
    assert result.report["model"]["family"] == "bert"
    assert {r["kind"]: r["loss"] for r in result.report["rows"]}.keys() >= {"dense", "result"}
    roles = {entry["role"] for entry in result.report["targets"]}
    assert roles == {"q", "k", "v", "o", "up", "down"}


@pytest.mark.parametrize("method", ["kfac_svd", "anchored_svd"])
def test_a_users_own_language_task_with_the_cache_on(method):
    """`model(**batch)` as it comes: transformers makes a cache at every call."""
    batches = [{"input_ids": part} for part in tiny.ids().split(2)]

    def loss(outputs, batch):
        logits, targets = outputs.logits[:, :-1], batch["input_ids"][:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)

    ours = FunctionTask(batches, loss=loss)
    results = [
        rankine.compress(tiny.llama(), method=method, bits=14.0, task=t, evaluate=False)
        for t in (ours, tiny.tokens())
    ]
    ours, theirs = (r.patch.modules for r in results)
    assert ours == theirs  # losses differ by a factor, shares of the budget do not
    for path in ours:
        one, other = (r.model.get_submodule(path).weight for r in results)
        assert torch.allclose(one, other, atol=1e-4)


def test_methods_that_need_a_loss_say_so():
    bare = FunctionTask([torch.randn(8, 12)])
    rankine.compress(tiny.mlp(), method="svd_llm", bits=20.0, task=bare, evaluate=False)
    with pytest.raises(UserError, match="loss"):
        rankine.compress(tiny.mlp(), method="kfac_svd", bits=20.0, task=bare, evaluate=False)


# -- what the caller gets back -----
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_stays_after_evaluation(dtype):
    """Scores are computed in float32 on a CPU; the result is not."""
    model = cast(tiny.mlp(), dtype)
    double = FunctionTask(
        task().batches("calibration"),
        forward=lambda m, b: m(b[0].to(next(m.parameters()).dtype)),
        loss=lambda out, b: (out.float() - b[1]).square().mean(-1),
        evaluation=task().batches("calibration"),
    )
    result = rankine.compress(model, method="svd", bits=12.0, task=double)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert {r["kind"] for r in result.report["rows"]} >= {"result"}
    for path, structure in result.patch.modules.items():
        module = result.model.get_submodule(path)
        shape = (module.out_features, module.in_features)
        assert stored_bits(result.model, path) == structure.bits(shape, dtype)


def test_another_dtype_is_what_the_files_will_hold(tmp_path):
    """Rotary tables are not rounded on the way: in memory and reloaded are one function."""
    asked = {"method": "svd", "keep": 0.6, "dtype": "bfloat16"}
    result = rankine.compress(tiny.llama(), task=tiny.tokens(), evaluate=False, **asked)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    rankine.save(result.model, tmp_path / "out", result.patch)
    x = tiny.ids()
    with torch.no_grad():
        again = rankine.load(tmp_path / "out")
        assert torch.equal(again(x).logits, result.model(x).logits)


def test_an_interrupted_run_leaves_the_model_and_no_directory(tmp_path):
    model, before = tiny.llama(), tiny.llama().state_dict()

    def interrupt(stage, done, total):
        if stage == "solve":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rankine.compress(
            model,
            method="auto",
            bits=12.0,
            task=tiny.tokens(),
            output=tmp_path / "out",
            progress=interrupt,
        )
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"out.rankine-work"}  # so that the same command goes on there


def test_a_work_directory_of_another_recipe_is_refused(tmp_path):
    work = str(tmp_path / "work")
    asked = {"method": "svd_llm", "task": tiny.tokens(), "evaluate": False, "work": work}
    rankine.compress(tiny.llama(), bits=12.0, **asked)
    with pytest.raises(UserError, match=r"recipe changed|recipe"):
        rankine.compress(tiny.llama(), bits=11.0, **asked)
    rankine.compress(tiny.llama(), bits=11.0, fresh=True, **asked)


def test_a_comparison_starts_from_the_same_model_each_time(tmp_path):
    """Every method at every size, with a journal of its own in the work directory given."""
    model, before = tiny.mlp(), tiny.mlp().state_dict()
    asked = {"methods": ["svd_llm"], "task": task(), "work": str(tmp_path / "work")}
    rows = rankine.compare(model, keep=[0.5, 0.9], **asked)
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"svd_llm-0.5", "svd_llm-0.9"}
    results = {row["name"]: row["loss"] for row in rows if row["kind"] == "result"}
    assert len(results) == 2
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    alone = rankine.compress(tiny.mlp(), method="svd_llm", keep=0.9, task=task())
    (row,) = [r for r in alone.report["rows"] if r["kind"] == "result"]
    assert results[row["name"]] == row["loss"]


def test_activations_that_explode_behind_the_compressed_prefix_name_the_layer():
    """Finite where the dense model walked, not where the compressed one does."""
    model = tiny.llama()
    plain = model.model.layers[1].mlp.act_fn

    class Cliff(nn.Module):
        dense = None

        def forward(self, x):
            if Cliff.dense is None:
                Cliff.dense = x.detach().clone()
            same = x.shape == Cliff.dense.shape and torch.allclose(x, Cliff.dense)
            return plain(x) if same else plain(x) * float("nan")

    model.model.layers[1].mlp.act_fn = Cliff()
    one = tiny.tokens(2, 10)
    with pytest.raises(UserError) as caught:
        rankine.compress(model, method="anchored_svd", bits=10.0, task=one, evaluate=False)
    assert "model.layers.1.mlp.down_proj" in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_knobs_come_as_text_too(name):
    for knob, value in get(name).knobs().items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert getattr(get(name, {knob: text}), knob) == value
