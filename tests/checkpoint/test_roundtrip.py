"""A saved model is the same function, bit for bit, whoever reads it."""

import checkpoint_models as families
import pytest
import torch
import transformers
from safetensors.torch import load_file

from rankine.checkpoint import directory_bytes, load, save
from rankine.checkpoint.save import patch_of
from rankine.patch import Patch

READ = """
import sys, torch
import rankine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
for directory in sys.argv[1:]:
    is_bert = directory.endswith("bert")
    auto = AutoModelForSequenceClassification if is_bert else AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits = model(torch.arange(24).reshape(2, 12) % 64).logits
    assert torch.equal(logits, load_file(directory + ".logits.safetensors")["logits"]), directory
    print("same", directory)
"""


@pytest.mark.process
@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bits(saved, fresh):
    directories = [saved(name).directory for name in families.PATCHED]
    assert fresh(READ, *directories).count("same") == len(families.PATCHED)


@pytest.mark.parametrize("name", families.PATCHED)
def test_load_gives_the_class_of_the_config_and_the_same_bits(saved, name):
    model = load(saved(name).directory)
    assert type(model) is type(saved(name).model)
    assert not model.training
    assert torch.equal(families.logits(model), saved(name).logits)


@pytest.mark.parametrize("name", ["llama", "tables", "gpt2"])
def test_resaved_by_transformers_itself(saved, name, tmp_path):
    load(saved(name).directory).save_pretrained(tmp_path)
    assert torch.equal(families.logits(load(tmp_path)), saved(name).logits)


def test_resaved_by_us_without_naming_the_patch(saved, tmp_path):
    model = load(saved("llama").directory)
    save(model, tmp_path / "again")
    again = load(tmp_path / "again")
    assert patch_of(again).to_json() == saved("llama").patch.to_json()
    assert torch.equal(families.logits(again), saved("llama").logits)


def test_bits_of_the_files_are_the_bits_of_the_patch(saved):
    one = saved("factors")
    tensors = load_file(one.directory / "model.safetensors")
    inside = {n: t for n, t in tensors.items() if n in one.patch.tensors}
    assert sum(t.numel() * t.element_size() * 8 for t in inside.values()) == one.patch.bits()
    weights, everything = directory_bytes(one.directory)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < weights < everything


def test_shards_of_any_size(saved, tmp_path):
    one = saved("llama")
    save(one.model, tmp_path / "out", one.patch, max_shard_size="10KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert torch.equal(families.logits(load(tmp_path / "out")), one.logits)


def test_device_map(saved):
    model = load(saved("llama").directory, device_map="cpu")
    assert torch.equal(families.logits(model), saved("llama").logits)


def test_bf16_moves_the_floating_tensors_only(saved):
    one = saved("llama")
    model = load(one.directory, dtype=torch.bfloat16)
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    assert {d for n, d in dtypes.items() if n.endswith("codes")} == {torch.uint8}
    assert {d for n, d in dtypes.items() if n.endswith("pivots")} == {torch.int32}
    assert {d for n, d in dtypes.items() if n.endswith("weight")} == {torch.bfloat16}
    error = (families.logits(model).float() - one.logits).abs().max()
    assert 0 < error < 0.05 * one.logits.abs().max()


def test_bert_under_other_heads_and_back(saved, tmp_path):
    body = transformers.AutoModel.from_pretrained(saved("bert").directory)
    with torch.no_grad():
        want = saved("bert").model.bert(families.ids()).last_hidden_state
    assert torch.equal(families.logits(body), want)
    body.save_pretrained(tmp_path)
    again, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        assert torch.equal(again.bert(families.ids()).last_hidden_state, want)


def test_generate(saved):
    model = load(saved("gpt2").directory)
    out = model.generate(families.ids(), max_new_tokens=3, num_beams=2, pad_token_id=0)
    assert out.shape == (2, 15)


@pytest.mark.slow
def test_trainer_fine_tunes_all_of_it_and_its_checkpoint_loads(saved, tmp_path):
    model = load(saved("factors").directory)
    data = [{"input_ids": row, "labels": row} for row in families.ids().repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    trained = families.logits(model.eval())
    assert not torch.equal(trained, saved("factors").logits)
    assert torch.equal(families.logits(load(tmp_path / "checkpoint-2")), trained)


def test_lora_on_the_factors(saved):
    from peft import LoraConfig, get_peft_model

    model = load(saved("factors").directory)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["down", "up"]))
    trainable = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert any("down.lora_A" in n for n in trainable)
    assert torch.equal(families.logits(wrapped.eval()), saved("factors").logits)
    wrapped(families.ids(), labels=families.ids()).loss.backward()


def test_a_dense_model_is_an_ordinary_checkpoint(tmp_path):
    model = families.llama()
    save(model, tmp_path / "dense", Patch())
    assert not (tmp_path / "dense" / "modeling_rankine.py").exists()
    assert "rankine" not in (tmp_path / "dense" / "config.json").read_text()
    assert torch.equal(families.logits(load(tmp_path / "dense")), families.logits(model))


def test_loaded_factors_lie_where_torch_would_put_them(saved):
    """Else the same numbers may round differently than in the model that was saved."""
    model = load(saved("llama").directory)
    for path in saved("llama").patch.modules:
        for tensor in model.get_submodule(path).state_dict().values():
            assert tensor.data_ptr() % 64 == 0
