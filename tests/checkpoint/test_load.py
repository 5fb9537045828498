"""What cannot be opened is said in one sentence."""

import json
import os

import checkpoint_models as families
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import byte_models
from rankine.checkpoint import directory_bytes, load, open_given, open_meta, open_model, save
from rankine.errors import UserError
from rankine.patch import Patch


@pytest.fixture
def directory(tmp_path):
    """A dense checkpoint to spoil."""
    return save(families.llama(), tmp_path / "model", Patch(), max_shard_size="30KB")


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    """A model with its tokenizer."""
    return byte_models.write(tmp_path_factory.mktemp("home") / "tiny")


def shard(directory):
    return max(directory.glob("*.safetensors"), key=lambda p: p.stat().st_size)


def truncate(directory):
    file = shard(directory)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_header(directory):
    data = bytearray(shard(directory).read_bytes())
    data[12] ^= 0x80
    shard(directory).write_bytes(data)


def flip_weight(directory):
    data = bytearray(shard(directory).read_bytes())
    data[-5] ^= 0x40
    shard(directory).write_bytes(data)


def other_sizes(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))


def lose_shard(directory):
    shard(directory).unlink()


def lose_config(directory):
    (directory / "config.json").unlink()


def break_config(directory):
    (directory / "config.json").write_text('{"model_type": "llama"')


def list_config(directory):
    (directory / "config.json").write_text("[]")


def pickled_only(directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02}.")


def unknown_type(directory):
    (directory / "config.json").write_text('{"model_type": "no_such_model"}')


SPOILED = {
    truncate: "a damaged one",
    flip_header: "a damaged one",
    flip_weight: "found other bytes",
    other_sizes: "of the sizes that its config.json states",
    lose_shard: "expected the weight file",
    lose_config: r"found no config\.json",
    break_config: "a damaged file",
    list_config: "expected a JSON object",
    pickled_only: "--allow-pickle",
    unknown_type: "no_such_model",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda f: f.__name__)
def test_a_spoiled_directory_is_one_sentence(directory, spoil):
    spoil(directory)
    with pytest.raises(UserError, match=SPOILED[spoil]) as caught:
        load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(directory):
    shard(directory).chmod(0)
    with pytest.raises(UserError, match=r"safetensors"):
        load(directory)


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all", ""])
def test_a_missing_path_is_no_hub_id(spec):
    with pytest.raises(UserError, match="check the path"):
        open_model(spec)


def test_a_file_is_no_directory(directory):
    with pytest.raises(UserError, match="found the file"):
        open_model(str(directory / "config.json"))


@pytest.mark.parametrize("spec", ["someone/never-existed", "never-existed"])
def test_a_hub_id_offline(spec, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set") as caught:
        open_model(spec)
    assert "\n" not in str(caught.value)


def test_open_model_brings_the_tokenizer_and_the_patch(saved, tmp_path):
    vocabulary = {f"t{n}": n for n in range(64)}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="t0")
    one = saved("factors")
    out = save(one.model, tmp_path / "out", one.patch, tokenizer=tokenizer)
    model, found, info = open_model(str(out), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert found("t3")["input_ids"] == [3]
    assert (info.name, info.directory) == ("out", out)
    assert info.patch.to_json() == one.patch.to_json()


def test_a_home_directory_is_written_out(tiny_directory, monkeypatch):
    """Recipes and Python have no shell that would."""
    monkeypatch.setenv("HOME", str(tiny_directory.parent))
    for opened in (open_model, open_meta):
        _, tokenizer, info = opened("~/tiny")
        assert tokenizer is not None
        assert info.directory == tiny_directory


def test_a_home_directory_of_a_plain_module(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    net = torch.nn.Linear(4, 4)
    save(net, tmp_path / "net")
    opened, _, info = open_given("~/net", into=lambda: torch.nn.Linear(4, 4))
    assert torch.equal(opened.weight, net.weight)
    assert info.directory == tmp_path / "net"


def test_a_tensor_that_a_plain_checkpoint_lacks(tmp_path):
    """The module's own, drawn at random, may not stay where the file has none."""
    save(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "net")
    deeper = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"expected the tensor 1\.weight"):
        load(tmp_path / "net", into=deeper)


def test_a_model_without_a_tokenizer(saved):
    assert open_model(str(saved("factors").directory))[1] is None


def test_an_unknown_dtype(saved):
    with pytest.raises(UserError, match="expected a dtype"):
        open_model(str(saved("factors").directory), dtype="float17")


def test_weights_in_another_layout_are_not_counted(directory):
    """As Mistral's come: `consolidated.safetensors` beside the shards."""
    weights, everything = directory_bytes(directory)
    assert weights == sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    (directory / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors"):
        (directory / name).write_bytes(b"x" * 1000)
    assert directory_bytes(directory) == (weights, everything + 2000)


def test_architectures_missing_from_the_config(directory):
    config = json.loads((directory / "config.json").read_text())
    del config["architectures"]
    (directory / "config.json").write_text(json.dumps(config))
    assert type(load(directory)).__name__ == "LlamaForCausalLM"


def test_saved_anew_into_the_same_place_by_transformers(saved, tmp_path):
    """The old hashes are no longer true: the sentence says what to do."""
    one = saved("factors")
    model = load(save(one.model, tmp_path / "out", one.patch))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match="delete SHA256SUMS if you changed the weights yourself"):
        load(tmp_path / "out")
    (tmp_path / "out" / "SHA256SUMS").unlink()
    assert torch.equal(families.logits(load(tmp_path / "out")), families.logits(model))


def test_an_adapter_alone_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="found a PEFT adapter, which is none by itself: merge"):
        load(tmp_path)
