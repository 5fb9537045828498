"""What we write for others is read by them."""

import importlib.util
import json

import checkpoint_models as families
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from rankine.checkpoint import load, save
from rankine.checkpoint.export import export_dense, export_peft
from rankine.checkpoint.formats import export
from rankine.checkpoint.gguf import export_gguf_lora
from rankine.checkpoint.onnx import export_onnx
from rankine.errors import UserError
from rankine.patch import Patch
from rankine.structures import LowRank


# -- dense --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "tables", "gpt2", "bert", "factors"])
def test_merging_keeps_the_function_and_leaves_no_trace(saved, tmp_path, name):
    out = export_dense(saved(name).directory, tmp_path / "dense")
    text = (out / "config.json").read_text()
    assert "rankine" not in text
    assert not (out / "modeling_rankine.py").exists()
    assert "needs nothing else" in (out / "README.md").read_text()
    merged = load(out)
    assert (families.logits(merged) - saved(name).logits).abs().max() < 1e-5
    ordinary = {n: t.shape for n, t in type(merged)(merged.config).state_dict().items()}
    assert {n: t.shape for n, t in merged.state_dict().items()} == ordinary


def test_dequantize_is_the_same(saved):
    model = load(saved("gpt2").directory).dequantize()
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert not hasattr(model.config, "quantization_config")
    assert (families.logits(model) - saved("gpt2").logits).abs().max() < 1e-5
    model.half()


def test_what_the_architecture_cannot_hold_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down.*\(32, 24\)") as caught:
        export_dense(saved("qwen2").directory, tmp_path / "out")
    assert "no ordinary dense form" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_added_bias_and_a_function_inside_have_no_ordinary_form(tmp_path):
    for n, structure in enumerate((LowRank(4, bias=True), LowRank(4, act="silu"))):
        model = families.llama()
        path = "model.layers.0.mlp.up_proj"
        patch = families.fitted(model, path, LowRank(4))
        patch = Patch({path: structure}, patch.tensors)
        save(patch.apply(model), tmp_path / str(n), patch)
        assert torch.equal(families.logits(load(tmp_path / str(n))), families.logits(model))
        with pytest.raises(UserError, match=r"no ordinary dense form|no dense weight"):
            export_dense(tmp_path / str(n), tmp_path / "dense")


def test_the_verb_knows_its_formats(saved, tmp_path):
    assert export(saved("factors").directory, tmp_path / "dense") == tmp_path / "dense"
    with pytest.raises(UserError, match='did you mean "dense"'):
        export(saved("factors").directory, tmp_path / "other", to="dence")


# -- PEFT ---------------------------------------------------------------------------------------
@pytest.fixture
def residuals():
    """Factors of different ranks for some modules, and the dense model they belong to."""
    model = families.llama()
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for rank, path in enumerate(families.linear_paths(model), start=1):
        if rank % 5 == 0:
            continue
        o, i = model.get_submodule(path).weight.shape
        b = torch.randn(o, rank, generator=generator) / 8
        factors[path] = b, torch.randn(rank, i, generator=generator) / 8
    return model, factors


def added(model, factors):
    with torch.no_grad():
        for path, (b, a) in factors.items():
            model.get_submodule(path).weight += b @ a
    return families.logits(model)


def test_a_lora_folder_is_read_by_peft_and_by_transformers(residuals, tmp_path):
    from peft import PeftModel

    model, factors = residuals
    model.save_pretrained(tmp_path / "base")
    out = export_peft(factors, tmp_path / "lora", base=str(tmp_path / "base"))
    want = added(families.llama(), factors)
    assert (families.logits(PeftModel.from_pretrained(model, out)) - want).abs().max() < 1e-5
    through = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (families.logits(through) - want).abs().max() < 1e-5
    merged = PeftModel.from_pretrained(load(tmp_path / "base"), out).merge_and_unload()
    assert (families.logits(merged) - want).abs().max() < 1e-5


def test_lora_patterns_match_one_module_each(tmp_path):
    """An unanchored path would also match a longer one that ends with it."""
    from peft import PeftModel

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.q(x)

    class Outer(Inner):
        def __init__(self):
            super().__init__()
            self.tower = Inner()

        def forward(self, x):
            return self.tower(self.q(x))

    torch.manual_seed(0)
    model, x = Outer(), torch.randn(2, 6)
    factors = {
        "q": (torch.randn(6, 1), torch.randn(1, 6)),
        "tower.q": (torch.randn(6, 3), torch.randn(3, 6)),
    }
    out = export_peft(factors, tmp_path / "lora")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^q": 1, r"^tower\.q": 3}
    weights = [model.get_submodule(p).weight + b @ a for p, (b, a) in factors.items()]
    want = x @ weights[0].T @ weights[1].T
    with torch.no_grad():
        assert torch.allclose(PeftModel.from_pretrained(model, out)(x), want, atol=1e-4)


def test_factors_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected factors"):
        export_peft({"q": (torch.ones(4, 2), torch.ones(3, 4))}, tmp_path / "lora")
    with pytest.raises(UserError, match="found none"):
        export_peft({}, tmp_path / "lora")


# -- ONNX ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_onnx_runtime_agrees_at_other_shapes(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = families.llama(num_hidden_layers=1)
    patch = families.mixed(model)
    save(patch.apply(model), tmp_path / "small", patch)
    path = export(tmp_path / "small", tmp_path / "small.onnx", to="onnx")
    ids = torch.arange(15).reshape(3, 5)
    with torch.no_grad():
        want = model(ids).logits.numpy()
    (found,) = runtime.InferenceSession(str(path)).run(None, {"input_ids": ids.numpy()})
    assert abs(found - want).max() < 1e-4


def test_onnx_leaves_each_module_in_its_mode(tmp_path):
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    net[0].eval()
    with pytest.raises(UserError, match="example"):
        export_onnx(net, tmp_path / "net.onnx")
    assert (net.training, net[0].training, net[1].training) == (True, False, True)


def test_onnx_of_a_plain_module(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    families.fitted_all(model, {"0": LowRank(3), "2": LowRank(2, pivoted=True)}).apply(model)
    path = export_onnx(model, tmp_path / "net.onnx", torch.randn(2, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    x = torch.randn(5, 8)
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert abs(found - model(x).numpy()).max() < 1e-5
    with pytest.raises(UserError, match="expected a new output file"):
        export_onnx(model, path, torch.randn(2, 8))


EXTRAS = {
    "onnx": ("onnxscript", lambda out: export_onnx(nn.Linear(2, 2), out, torch.ones(2, 2))),
    "gguf": ("gguf", lambda out: export_gguf_lora({}, out, "llama", 2)),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_one_sentence(monkeypatch, tmp_path, extra):
    package, write = EXTRAS[extra]
    real = importlib.util.find_spec

    def without(name, *rest):
        return None if name == package else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UserError, match=rf'pip install "rankine\[{extra}\]"'):
        write(tmp_path / "out")


# -- GGUF ---------------------------------------------------------------------------------------
def test_a_gguf_adapter_reads_back(residuals, tmp_path):
    gguf = pytest.importorskip("gguf")
    _, factors = residuals
    path = export_gguf_lora(factors, tmp_path / "lora.gguf", "llama", 2)
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(tensors) == 2 * len(factors)
    b, a = factors["model.layers.1.mlp.gate_proj"]
    stem = "blk.1.ffn_gate.weight"
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    update = tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"] * alpha / a.shape[0]
    assert torch.allclose(update, b @ a, atol=1e-5)


def test_gguf_refuses_what_llama_cpp_does_not_know(residuals, tmp_path):
    pytest.importorskip("gguf")
    elsewhere = {"elsewhere": (torch.ones(2, 1), torch.ones(1, 2))}
    with pytest.raises(UserError, match="found elsewhere"):
        export_gguf_lora(elsewhere, tmp_path / "x", "llama", 2)
    with pytest.raises(UserError, match="expected an architecture"):
        export_gguf_lora(residuals[1], tmp_path / "x", "no such", 2)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_what_was_given(residuals, tmp_path):
    _, factors = residuals
    out = export_peft(factors, tmp_path / "lora")
    tensors = load_file(out / "adapter_model.safetensors")
    for path, (b, a) in factors.items():
        assert torch.equal(tensors[f"base_model.model.{path}.lora_A.weight"], a)
        assert torch.equal(tensors[f"base_model.model.{path}.lora_B.weight"], b)
