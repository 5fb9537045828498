"""The dry run: what it says, and that it comes true."""

import json

import pytest
import torch
from safetensors.torch import load_file

import rankine
import tiny_models as tiny
from rankine.checkpoint import directory_bytes
from rankine.engine.plan import _flops_per_second
from rankine.engine.run import cast
from rankine.errors import BudgetError, UserError
from rankine.patch import stored_bits


def bf16(model):
    return cast(model, torch.bfloat16)


def wide(**overrides):
    """Wide enough that one rank is a small step, and a header is no matter."""
    return bf16(tiny.llama(hidden_size=128, intermediate_size=256, **overrides))


def plan(model, **fields):
    return rankine.plan(model, **fields)


def compressed(model, directory, **fields):
    """(result, bytes of the weights on disk)."""
    result = rankine.compress(model, task=tiny.tokens(), evaluate=False, **fields)
    rankine.save(result.model, directory, result.patch)
    return result, directory_bytes(directory)[0]


def test_the_fields_and_how_they_are_shown():
    model = wide()
    found = plan(model, method="svd", keep=0.5)
    weights = sum(
        p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2
    )
    assert (found.family, found.method, found.targets) == ("llama", "svd", 14)
    assert found.weights == weights
    others = sum(p.numel() * 2 for p in model.parameters()) - 2 * weights
    assert found.bytes_before == others + 2 * weights
    assert found.bytes_before > found.bytes_after > weights + others
    assert found.seconds > 0
    assert found.memory > found.bytes_before
    lines = "\n".join(found.lines())
    assert "svd on 14 weights" in lines
    assert "transformers" in lines
    assert json.loads(json.dumps(found.to_json()))["bytes"] == found.bytes_after


@pytest.mark.parametrize("method", ["asvd", "lord"])
def test_a_search_takes_its_time(method):
    """Each probe is a forward pass over 32 sequences at most."""
    model, uniform = wide(), {"allocation": "uniform"}
    asked = {"method": method, "keep": 0.5, "tokens": "32x256"}
    searched, plain = plan(model, **asked).seconds, plan(model, **asked, set=uniform).seconds
    probes = 14 * 9 if method == "asvd" else 7 * 9
    weights = plan(model, **asked).weights
    assert searched - plain == pytest.approx(
        2.0 * 32 * 256 * weights * probes / _flops_per_second(), rel=1e-6
    )
    longer = plan(model, **{**asked, "tokens": "500x256"}, set=uniform).seconds
    assert plan(model, **{**asked, "tokens": "500x256"}).seconds - longer == pytest.approx(
        searched - plain, rel=1e-6
    )


def test_nothing_is_touched_and_meta_tensors_suffice():
    model = wide()
    with torch.device("meta"):
        hollow = type(model)(model.config).to(torch.bfloat16)
    a, b = (plan(m, method="svd", keep=0.5) for m in (model, hollow))
    assert (a.bytes_before, a.bytes_after, a.weights) == (b.bytes_before, b.bytes_after, b.weights)
    assert not hasattr(model.model.layers[0].mlp.up_proj, "structure")


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "kfac_svd", "keep": 0.6},
        {"method": "kfac_svd", "bits": 7.0},
        {"method": "auto", "keep": 0.3, "set": {"structures": ("pivoted",)}},
        {"method": "rtn", "set": {"code_bits": 4}},
        {"method": "rtn", "set": {"code_bits": 3, "group": 32}},
    ],
    ids=lambda asked: "-".join(str(v) for v in asked.values()),
)
def test_the_predicted_size_is_within_one_percent(asked, tmp_path):
    predicted = plan(wide(), **asked).bytes_after
    _, found = compressed(wide(), tmp_path / "out", **asked)
    assert found == pytest.approx(predicted, rel=0.01)


def notes(model, **fields):
    return " / ".join(plan(model, **fields).notes)


def test_notes_say_what_a_user_should_know():
    assert "float32" in notes(tiny.llama(), method="svd", keep=0.5)
    assert "float32" not in notes(wide(), method="svd", keep=0.5)
    assert "paper ratio 0.2" in notes(wide(), method="svd", paper_ratio=0.2)
    assert "plain int8" in notes(wide(), method="svd", keep=0.6)
    assert "plain int4" in notes(wide(), method="svd", keep=0.3)
    assert "plain int" not in notes(wide(), method="svd", keep=0.25)
    assert "smaller, not faster here" in notes(wide(), method="svd", keep=0.5)
    assert "smaller, not faster" not in notes(wide(), method="rtn")


@pytest.fixture
def medium():
    """Wide enough for the compiled products, too narrow for torch's in bfloat16."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    with torch.device("meta"):
        return bf16(tiny.llama(**sizes))


def test_notes_know_the_dtype_and_the_form_that_runs(medium, monkeypatch):
    monkeypatch.setattr("rankine.evaluation.linears.missing", lambda: None)
    asked = {"method": "svd", "keep": 0.5}
    assert "1536 two small bfloat16 products" in notes(medium, **asked)
    assert "--fused" in notes(medium, **asked)
    assert "faster" not in notes(medium, **asked, fused=True)
    assert "not faster" not in notes(medium.float(), **asked)
    assert "384 two small bfloat16 products" in notes(wide(), **asked, fused=True)
    assert "--fused" not in notes(wide(), **asked)  # too narrow for either


def test_without_a_compiler_the_plan_says_so(medium, monkeypatch):
    for module in ("rankine.evaluation.linears", "rankine.engine.plan"):
        monkeypatch.setattr(f"{module}.missing", lambda: "no C compiler was found")
    found = notes(medium, method="svd", keep=0.5, fused=True)
    assert "no C compiler" in found
    assert "1536" in found


# -- budgets on disk -----
@pytest.mark.parametrize("method", ["svd", "kfac_svd", "auto"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_size_is_met_on_disk(method, share, tmp_path):
    dense = rankine.save(wide(), tmp_path / "dense")
    asked = int(share * directory_bytes(dense)[0])
    _, found = compressed(wide(), tmp_path / "out", method=method, size=asked)
    assert found <= asked
    assert found > 0.95 * asked


def test_a_size_may_be_written_with_a_unit(tmp_path):
    _, found = compressed(wide(), tmp_path / "out", method="kfac_svd", size="0.4MB")
    assert 0.97 * 400_000 < found <= 400_000


def test_bits_are_the_mean_stored_bits_per_targeted_weight(tmp_path):
    result, _ = compressed(wide(), tmp_path / "out", method="kfac_svd", bits=5.0)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    paths = [w.path for t in result.stages[0].targets for w in t.weights]
    bits = sum(
        t.numel() * t.element_size() * 8
        for name, t in saved.items()
        if any(name.startswith(path + ".") for path in paths)
    )
    count = result.report["plan"]["weights"]
    assert 4.95 < bits / count <= 5.0
    assert result.report["budget"]["bits"] == pytest.approx(bits / count)


def test_float32_weights_cost_32_bits_each():
    result = rankine.compress(
        tiny.llama(), method="svd", bits=32.0, task=tiny.tokens(), evaluate=False
    )
    assert not result.patch.modules  # what the dense weights take
    assert result.report["budget"]["keep"] == 2.0


@pytest.mark.parametrize("asked", [{"keep": 0.01}, {"bits": 0.1}, {"size": 22_000}])
def test_a_budget_below_the_minimum_says_what_is_possible(asked):
    (unit,) = asked
    with pytest.raises(BudgetError) as caught:
        rankine.compress(wide(), method="svd", task=tiny.tokens(), evaluate=False, **asked)
    text = str(caught.value)
    assert "svd" in text
    assert "\n" not in text
    words = text.split()
    possible = float(words[len(words) - words[::-1].index(unit)].strip(";,"))
    result = rankine.compress(
        wide(),
        method="svd",
        task=tiny.tokens(),
        evaluate=False,
        **{unit: type(asked[unit])(possible)},
    )
    assert all(s.rank == 1 for s in result.patch.modules.values())


def test_a_size_that_the_untouched_tensors_exceed():
    with pytest.raises(BudgetError, match="not compressed"):
        plan(wide(), method="svd", size=1000)


def test_no_budget_at_all():
    with pytest.raises(UserError, match=r"--keep 0\.7"):
        rankine.compress(wide(), method="svd", task=tiny.tokens(), evaluate=False)


# -- which weights -----
def test_include_and_exclude():
    model, dense = wide(), wide()
    result = rankine.compress(
        model,
        method="svd",
        keep=0.5,
        include=("*.mlp.*",),
        exclude="*layers.1*",
        task=tiny.tokens(),
        evaluate=False,
    )
    wanted = {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert set(result.patch.modules) == wanted
    assert result.report["budget"]["keep"] <= 0.5  # of what is targeted
    for name, tensor in dense.state_dict().items():
        if not any(name.startswith(path) for path in wanted):
            assert torch.equal(model.get_parameter(name), tensor)


@pytest.mark.parametrize("method", ["svd", "svd_llm", "kfac_svd", "anchored_svd", "auto"])
def test_the_head_may_be_included(method, tmp_path):
    """It reads what the last block wrote; a tied embedding keeps its own weight then."""
    model = bf16(tiny.llama())
    table = model.model.embed_tokens.weight.clone()
    result = rankine.compress(
        model,
        method=method,
        keep=0.6,
        include="lm_head",
        task=tiny.tokens(),
        evaluate=False,
    )
    assert "lm_head" in result.patch.modules
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert stored_bits(model, "lm_head") < 48 * 32 * 16
    rankine.save(model, tmp_path / "out", result.patch)
    again = rankine.load(tmp_path / "out")
    with torch.no_grad():
        x = tiny.ids()
        assert torch.equal(again(x).logits, model(x).logits)


def test_fast_leaves_narrow_weights_dense():
    result = rankine.compress(
        wide(), method="svd", bits=16.0, fast=True, task=tiny.tokens(), evaluate=False
    )
    assert not result.patch.modules  # nothing here is wide enough to get faster


def test_fast_asks_for_the_form_that_will_run(monkeypatch):
    """Weights of 512 x 512 in bfloat16 decode faster through the compiled products only."""
    monkeypatch.setattr("rankine.evaluation.linears.missing", lambda: None)

    def compress(**asked):
        model = bf16(tiny.llama(hidden_size=512, intermediate_size=16, num_hidden_layers=1))
        asked |= {"include": "*.q_proj", "fast": True, "task": tiny.tokens(), "evaluate": False}
        return rankine.compress(model, method="svd", keep=0.9, **asked).patch.modules

    assert set(compress(fused=True)) == {"model.layers.0.self_attn.q_proj"}
    with pytest.raises(BudgetError, match="keep 1;"):  # it stays dense
        compress()


def test_experts_that_stay_as_they_are_are_told():
    """A method that takes none, a family whose experts nobody takes, one that all is well with."""
    import transformers as tf

    def notes(model, method):
        return " ".join(rankine.plan(model, method=method, keep=0.5).notes)

    oss = tf.GptOssConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=64, num_local_experts=8,
    )  # fmt: skip
    with torch.device("meta"):
        oss = tf.AutoModelForCausalLM.from_config(oss)
    assert "no method takes experts that are stored transposed" in notes(oss, "svd")
    assert "lord takes no banks of experts here (" in notes(tiny.mixtral(), "lord")
    assert "experts" not in notes(tiny.mixtral(), "svd")
    assert "experts" not in notes(tiny.llama(), "svd")
