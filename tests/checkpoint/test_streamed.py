"""Weights that stay on the disk: same outputs, same patches, nothing left in memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models as tiny
from rankine.checkpoint import open_meta, open_model
from rankine.checkpoint.form import tensor_names
from rankine.checkpoint.shards import (
    Place,
    Spec,
    read_place,
    write_file,
    write_shards,
)
from rankine.checkpoint.streamed import Streamed, places_of
from rankine.metric import Metric
from rankine.patch import Patch
from rankine.structures import LowRank, matrix

FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gpt2": tiny.gpt2, "opt": tiny.opt}


@pytest.fixture(params=sorted(FAMILIES))
def saved(request, tmp_path):
    FAMILIES[request.param]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def streamed(directory, dtype=torch.float32):
    from rankine.anatomy import describe

    model, _, _ = open_meta(str(directory))
    blocks = [block.path for block in describe(model).blocks]
    places = places_of(model, directory)
    assert places is not None
    return Streamed(model, places, dtype, blocks)


def in_memory(model):
    return [n for n, t in model.state_dict(keep_vars=True).items() if not t.is_meta]


@torch.no_grad()
def test_it_computes_what_the_loaded_model_computes(saved):
    weights, (loaded, _, _) = streamed(saved), open_model(str(saved))
    assert in_memory(weights.model) == []
    found = weights.model(input_ids=tiny.ids()).logits
    assert torch.equal(found, loaded(input_ids=tiny.ids()).logits)
    assert in_memory(weights.model) == []


@torch.no_grad()
def test_tables_that_are_not_saved_are_not_rounded(tmp_path):
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path)
    loaded, _, _ = open_model(str(tmp_path))
    for tensor in loaded.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.float()
    weights = streamed(tmp_path)
    assert {spec.dtype for spec in weights.specs()} == {torch.bfloat16}
    expected = loaded(input_ids=tiny.ids()).logits
    assert torch.equal(weights.model(input_ids=tiny.ids()).logits, expected)


@torch.no_grad()
def test_only_one_block_is_in_memory_at_a_time(saved):
    weights = streamed(saved)
    held = []
    for block in weights.blocks:
        module = weights.model.get_submodule(block)
        module.register_forward_pre_hook(lambda *_: held.append(in_memory(weights.model)))
    weights.model(input_ids=tiny.ids())
    assert len(held) == len(weights.blocks)
    for block, names in zip(weights.blocks, held, strict=True):
        assert names
        assert all(name.startswith(block + ".") for name in names)


def test_standing_nests_and_reads_what_is_stored(saved):
    weights, (loaded, _, _) = streamed(saved), open_model(str(saved))
    block = weights.blocks[0]
    with weights.standing(block), weights.standing(block):
        assert in_memory(weights.model)
    assert in_memory(weights.model) == []
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(weights.read(name), tensor)


@torch.no_grad()
def test_a_patch_that_was_taken_comes_back_from_its_file(saved, tmp_path):
    weights, (loaded, _, _) = streamed(saved), open_model(str(saved))
    path = next(
        n
        for n, m in loaded.named_modules()
        if n.startswith(weights.blocks[1] + ".") and hasattr(m, "weight") and m.weight.dim() == 2
    )
    w_oi = matrix(loaded.get_submodule(path)).detach()
    patch = Patch.of(path, LowRank(3), LowRank(3).encode(w_oi, Metric()))
    save_file(dict(patch.tensors), tmp_path / "entry.safetensors")
    with weights.standing(path):
        patch.apply(weights.model)
        kept = weights.taken(patch, tmp_path / "entry.safetensors")
    assert not kept.tensors
    assert in_memory(weights.model) == []
    patch.apply(loaded)
    expected = loaded(input_ids=tiny.ids()).logits
    assert torch.equal(weights.model(input_ids=tiny.ids()).logits, expected)
    for spec in weights.specs():
        assert torch.equal(weights.read(spec.name), loaded.state_dict()[spec.name])


def test_an_error_in_the_forward_pass_leaves_nothing_behind(saved):
    weights = streamed(saved)

    def fails(*_):
        raise ZeroDivisionError

    weights.model.get_submodule(weights.blocks[0]).register_forward_hook(fails)
    with pytest.raises(ZeroDivisionError):
        weights.model(input_ids=tiny.ids())
    assert in_memory(weights.model) == []


def test_a_checkpoint_with_other_names_is_not_streamed(saved):
    file = saved / "model.safetensors"
    tensors = {f"other.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    model, _, _ = open_meta(str(saved))
    assert places_of(model, saved) is None


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_shards_are_what_safetensors_reads(tmp_path, limit):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{n}": torch.randn(n + 1, 7, generator=generator).to(dtype)
        for n, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    }
    tensors |= {"i": torch.arange(5, dtype=torch.int32), "empty": torch.zeros(0, 3)}
    tensors |= {"scalar": torch.tensor(2.5), "bool": torch.tensor([True, False])}
    specs = [Spec.of(name, tensor) for name, tensor in tensors.items()]
    write_shards(tmp_path, specs, tensors.__getitem__, limit)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        found.update(load_file(file))
        for name in tensor_names(file):
            assert torch.equal(read_place(Place(file, name)), tensors[name])
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit == 1)


def test_a_tensor_that_is_not_what_was_announced_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="announced"):
        write_file(tmp_path / "f", [Spec("a", torch.float32, (2,))], lambda _: torch.zeros(3))
