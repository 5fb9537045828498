"""What goes wrong where a quantization method meets transformers, each seen, each held here."""

import importlib
import json

import checkpoint_models as families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from rankine.checkpoint import hf, load, save
from rankine.checkpoint.export import export_dense
from rankine.errors import UserError
from rankine.patch import Patch
from rankine.structures import LowRank

WITHOUT_IMPORT = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
directory, resaved, merged, merged_logits = sys.argv[1:]
want = load_file(directory + ".logits.safetensors")["logits"]
ids = torch.arange(24).reshape(2, 12) % 64
with torch.no_grad():
    ordinary = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert torch.allclose(ordinary, load_file(merged_logits)["logits"], atol=1e-5)
    garbage = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
assert "rankine" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(ids).logits, want)
assert type(model).__name__ == "LlamaForCausalLM"
model.save_pretrained(resaved)
again = AutoModelForCausalLM.from_pretrained(resaved, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(ids).logits, want)
print("garbage without import:", not torch.allclose(garbage, want))
"""

WITHOUT_PACKAGE = """
import sys
sys.modules["rankine"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.mark.process
@pytest.mark.slow
def test_1_without_import_the_code_in_the_directory_loads_it(saved, fresh, tmp_path):
    """transformers alone only warns and fills in random numbers; a merged one needs nothing."""
    directory, gpt2 = saved("llama").directory, saved("gpt2").directory
    merged = export_dense(gpt2, tmp_path / "merged")
    arguments = (directory, tmp_path / "again", merged, f"{gpt2}.logits.safetensors")
    assert "garbage without import: True" in fresh(WITHOUT_IMPORT, *arguments)
    assert (tmp_path / "again" / "modeling_rankine.py").is_file()
    card = (directory / "README.md").read_text()
    assert "import rankine" in card
    assert "trust_remote_code=True" in card


@pytest.mark.process
@pytest.mark.slow
def test_1_without_the_package_it_fails_loudly(saved, fresh, tmp_path):
    done = fresh(WITHOUT_PACKAGE, saved("llama").directory, path=str(tmp_path), check=False)
    assert done.returncode != 0
    assert "rankine" in done.stderr.splitlines()[-1]


def test_1_the_code_in_the_directory_is_constant(saved):
    code = {(saved(n).directory / "modeling_rankine.py").read_bytes() for n in families.PATCHED}
    assert len(code) == 1
    auto_map = json.loads((saved("bert").directory / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForSequenceClassification"] == (
        "modeling_rankine.BertForSequenceClassification"
    )
    assert auto_map["AutoModel"] == "modeling_rankine.BertModel"


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_1_a_missing_factor_is_named(saved, tmp_path, shard):
    one = saved("llama")
    out = save(one.model, tmp_path / "out", one.patch, max_shard_size=shard)
    gone = max(name for name in one.patch.tensors if name.endswith("up.weight"))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if gone not in tensors:
            continue
        del tensors[gone]
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"expected the tensor {gone} in the checkpoint"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


def test_2_a_second_config_is_ignored_with_a_warning(saved):
    with pytest.warns(UserWarning, match="will be used"):
        model = load(saved("factors").directory, quantization_config=hf.RankineConfig())
    assert torch.equal(families.logits(model), saved("factors").logits)


def test_2_a_dense_model_is_not_compressed_by_a_config(tmp_path):
    families.llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"found a dense one: compress it"):
        load(tmp_path, quantization_config=hf.RankineConfig())


def test_3_registering_twice_is_quiet(saved):
    before = AUTO_QUANTIZATION_CONFIG_MAPPING["rankine"], AUTO_QUANTIZER_MAPPING["rankine"]
    hf.register()
    reloaded = importlib.reload(hf)
    try:
        after = AUTO_QUANTIZATION_CONFIG_MAPPING["rankine"], AUTO_QUANTIZER_MAPPING["rankine"]
        assert after == before
        assert torch.equal(
            families.logits(load(saved("factors").directory)), saved("factors").logits
        )
    finally:
        reloaded.RankineConfig, reloaded.RankineQuantizer = before


def test_4_to_casts_where_half_refuses(saved):
    model = load(saved("factors").directory)
    with pytest.raises(ValueError, match=r"half"):
        model.half()
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert ".half()" in (saved("factors").directory / "README.md").read_text()


def test_5_shared_tensors_are_stored_once_and_shared_again(saved, tmp_path):
    one = saved("llama")
    target, source = next(iter(one.patch.tied.items()))
    names = set(load_file(one.directory / "model.safetensors"))
    assert source in names
    assert target not in names
    model = load(one.directory)
    assert model.get_parameter(target) is model.get_parameter(source)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.get_parameter(target) is again.get_parameter(source)


def test_5_shared_tensors_without_tied_embeddings(tmp_path):
    model = families.llama(tie_word_embeddings=False)
    layers = [f"model.layers.{n}.mlp.gate_proj" for n in (0, 1)]
    patch = families.shared_basis(model, *layers)
    patch.apply(model)
    save(model, tmp_path / "out", patch)
    again = load(tmp_path / "out")
    first, second = (again.get_submodule(path).down.weight for path in layers)
    assert first is second
    assert torch.equal(families.logits(again), families.logits(model))


def test_6_paths_without_the_base_prefix(saved):
    """Ties, too: AutoModel drops "model." from every name."""
    body = transformers.AutoModel.from_pretrained(saved("llama").directory)
    layers = body.layers
    assert layers[0].mlp.down_proj.down.weight is layers[1].mlp.down_proj.down.weight
    with torch.no_grad():
        want = saved("llama").model.model(families.ids()).last_hidden_state
    assert torch.equal(families.logits(body), want)


@pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens"])
def test_7_one_factored_end_of_tied_embeddings_unties_them(tmp_path, path):
    model = families.llama()
    view = "table" if "embed" in path else "channel"
    patch = families.fitted(model, path, LowRank(8, view=view))
    patch.apply(model)
    save(model, tmp_path / "out", patch)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert torch.equal(families.logits(load(tmp_path / "out")), families.logits(model))


def test_7_the_other_ties_hold(tmp_path):
    """BERT ties its decoder's bias as well, and transformers would forget both at once."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**families.SMALL, num_hidden_layers=1, num_attention_heads=4)
    model = transformers.BertForMaskedLM(config).eval()
    path = "bert.embeddings.word_embeddings"
    patch = families.fitted(model, path, LowRank(8, view="table"))
    save(patch.apply(model), tmp_path / "out", patch)
    again, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias
    assert torch.equal(families.logits(again), families.logits(model))


def test_7_both_ends_may_share_one_table(saved):
    model = load(saved("tables").directory)
    assert model.lm_head.up.weight is model.model.embed_tokens.down.weight


def test_8_weight_is_there_for_who_insists(saved):
    for name in ("llama", "tables", "gpt2"):
        model = load(saved(name).directory)
        for path in saved(name).patch.modules:
            weight = model.get_submodule(path).weight
            assert weight.ndim == 2
    head = load(saved("tables").directory).lm_head
    assert torch.allclose(head.weight, head.up.weight @ head.down.weight)


def test_9_nothing_is_initialised_at_random(saved):
    for name in families.PATCHED:
        _, info = load(saved(name).directory, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]


def test_10_loading_says_nothing_of_its_own(saved, capsys):
    transformers.utils.logging.disable_progress_bar()
    try:
        load(saved("factors").directory)
    finally:
        transformers.utils.logging.enable_progress_bar()
    assert capsys.readouterr().out == ""


def test_a_patch_without_modules_but_ties_is_kept():
    assert Patch.from_json(hf.RankineConfig.of(Patch(tied={"a.weight": "b.weight"})).to_dict()).tied
