"""Every family goes through compress, save and transformers' own loading, to the same bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import rankine
import tiny_models as tiny
from rankine import anatomy
from rankine.checkpoint import load, save
from rankine.checkpoint.contents import inspect
from rankine.checkpoint.export import merge
from rankine.errors import UserError
from rankine.metric import Metric
from rankine.modules import ExpertBank, conceal, expose, module_at
from rankine.patch import Patch, stored_bits
from rankine.statistics import as_walked
from rankine.structures import LowRank, Quantized, matrix
from rankine.structures.bank import full_shape
from rankine.tasks import FunctionTask

BUILD = {**tiny.MORE_LANGUAGE, **tiny.TRANSLATION}
SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe"]


def task(family: str) -> Any:
    return tiny.translated() if family in tiny.TRANSLATION else tiny.tokens(padded=True)


def logits(model: Any, family: str) -> torch.Tensor:
    batch = next(iter(task(family).batches("calibration")))
    with torch.no_grad():
        return model(**batch).logits


def auto(family: str) -> Any:
    seq2seq = family in tiny.TRANSLATION
    return tf.AutoModelForSeq2SeqLM if seq2seq else tf.AutoModelForCausalLM


@pytest.mark.parametrize("method", ["svd", "svd_llm", "auto"])
@pytest.mark.parametrize("family", sorted(BUILD))
def test_round_trip(family, method, tmp_path):
    model = BUILD[family]()
    before = anatomy.describe(model)
    out = tmp_path / "out"
    result = rankine.compress(
        model, method=method, keep=0.7, task=task(family), output=out, evaluate=False
    )
    assert result.patch.modules
    if family in SPARSE:
        assert any(path.endswith("_bank") for path in result.patch.modules)
    size = sum(w.size for w in before.linears)
    bits = stored_bits(result.model, *(w.path for w in before.linears))
    assert bits <= 0.7 * 16 * size
    saved, info = auto(family).from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(saved, family), logits(result.model, family))
    assert not torch.equal(logits(saved, family), logits(BUILD[family](), family))
    after = anatomy.describe(saved)
    assert after.family == before.family
    assert [(w.path, w.role, w.shape, w.copies, w.rows) for w in after.linears] == [
        (w.path, w.role, w.shape, w.copies, w.rows) for w in before.linears
    ]
    assert [(b.attention, b.cross, b.mlp) for b in after.blocks] == [
        (b.attention, b.cross, b.mlp) for b in before.blocks
    ]


def fitted(model: Any, rank: int | None, banks_only: bool = False) -> Patch:
    """Two factors of the given (None: the full) rank for every weight of the blocks."""
    patch = Patch()
    for weight in anatomy.describe(model).linears:
        if banks_only and weight.operator != "bank":
            continue
        structure = LowRank(min(weight.shape) if rank is None else min(rank, *weight.shape))
        w = matrix(module_at(model, weight.path)).detach()
        patch |= Patch.of(weight.path, structure, structure.encode(w, Metric()))
    return patch


@pytest.mark.parametrize("family", sorted(BUILD))
def test_full_rank_is_the_dense_model(family):
    model = BUILD[family]()
    dense = logits(model, family)
    fitted(model, None).apply(model)
    torch.testing.assert_close(logits(model, family), dense, rtol=1e-4, atol=1e-5)


# -- banks of experts -----------------------------------------------------------------------------
@pytest.mark.parametrize("family", SPARSE)
def test_exposed_experts_compute_the_same_and_can_be_put_back(family):
    model = BUILD[family]()
    dense, names = logits(model, family), set(model.state_dict())
    expose(model)
    assert any(isinstance(module, ExpertBank) for module in model.modules())
    torch.testing.assert_close(logits(model, family), dense)
    assert set(conceal(model).state_dict()) == names
    torch.testing.assert_close(logits(model, family), dense)


def test_one_bank_may_stay_dense_and_any_structure_may_stand_for_the_other(tmp_path):
    """What is not replaced is stored as transformers stores it: expert by expert."""
    path = "model.layers.0.mlp.experts.down_bank"
    for structure in (LowRank(5), Quantized(4, group=16), Quantized(8, axis=-2)):
        model = tiny.mixtral()
        w = matrix(module_at(model, path)).detach()
        patch = Patch.of(path, structure, structure.encode(w, Metric()))
        patch.apply(model)
        assert stored_bits(model, path) == patch.bits() == structure.bits(w.shape, w.dtype)
        out = save(model, tmp_path / type(structure).__name__ / str(structure)[-12:], patch)
        stored = set(load_file(out / "model.safetensors"))
        assert any(
            name.endswith("layers.0.block_sparse_moe.experts.0.w1.weight") for name in stored
        )
        again = load(out)
        assert torch.equal(logits(again, "mixtral"), logits(model, "mixtral"))
        assert stored_bits(again, path) == patch.bits()


def test_what_is_said_about_a_directory_of_experts(tmp_path):
    """Mixtral's files spell the path otherwise than its model does."""
    model = tiny.mixtral()
    patch = fitted(model, 5)
    patch.apply(model)
    told = inspect(save(model, tmp_path / "out", patch))
    for path, structure in patch.modules.items():
        assert told["modules"][path]["stored_bits"] == structure.bits(
            full_shape(model.get_submodule(path)), torch.float32
        )


def test_codes_and_pivots_beside_experts(tmp_path):
    """Plain codes stand for a bank too; a pivoted form does not, and leaves it two factors."""
    model = tiny.qwen2_moe()
    coded = rankine.compress(model, method="rtn", task=task("qwen2_moe"), evaluate=False)
    assert {s.kind for s in coded.patch.modules.values()} == {"quantized"}
    assert "model.layers.0.mlp.experts.down_bank" in coded.patch.modules
    mixed = rankine.compress(
        tiny.qwen2_moe(),
        method="auto",
        set={"structures": ("low_rank", "pivoted")},
        keep=0.7,
        task=task("qwen2_moe"),
        evaluate=False,
    )
    banks = [s for path, s in mixed.patch.modules.items() if path.endswith("_bank")]
    assert banks
    assert not any(bank.pivoted for bank in banks)


def test_a_method_without_banks_leaves_experts_dense():
    result = rankine.compress(
        tiny.mixtral(), method="lord", keep=0.7, task=task("mixtral"), evaluate=False
    )
    assert result.patch.modules
    assert not any("experts" in path for path in result.patch.modules)


def test_experts_among_the_baselines_and_in_the_plan(tmp_path):
    out = tmp_path / "out"
    result = rankine.compress(
        tiny.mixtral(), method="svd", keep=0.7, task=task("mixtral"), output=out
    )
    rows = {row["kind"]: row for row in result.report["rows"]}
    assert rows["dense"]["bytes"] > rows["result"]["bytes"]
    int8 = next(row for row in result.report["rows"] if row["name"].startswith("int8"))
    assert 0.5 < int8["keep"] < 0.75  # codes, and a float32 scale and minimum per group
    assert result.report["plan"]["bytes"] == pytest.approx(rows["result"]["bytes"], rel=0.1)
    assert {"gate_up", "down"} <= set(result.report["bytes"])


def test_experts_of_different_shapes_of_patches_compose():
    model = tiny.mixtral()
    first = fitted(model, 4, banks_only=True)
    again = first | fitted(model, 7, banks_only=True)
    again.apply(model)
    bank = model.get_submodule("model.layers.1.mlp.experts.gate_up_bank")
    assert tuple(bank.down.weight.shape) == (4, 7, 32)
    assert tuple(bank.weight.shape) == (4, 96, 32)
    with pytest.raises(UserError, match=r"one matrix at a time|two plain factors"):
        Patch({"model.layers.0.mlp.experts.down_bank": LowRank(3, pivoted=True)}).swap(model)


def test_factored_experts_train(tmp_path):
    model = tiny.mixtral()
    fitted(model, 4).apply(model)
    batch = next(iter(tiny.tokens().batches("calibration")))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    bank = model.get_submodule("model.layers.0.mlp.experts.down_bank")
    assert bank.down.weight.grad.abs().sum() > 0
    assert bank.up.weight.grad.abs().sum() > 0


def test_merged_experts_are_an_ordinary_model(tmp_path):
    model = tiny.mixtral()
    patch = fitted(model, 6)
    patch.apply(model)
    save(model, tmp_path / "factored", patch)
    compressed = load(tmp_path / "factored")
    want = logits(compressed, "mixtral")
    merged = merge(compressed)
    merged.save_pretrained(tmp_path / "dense")
    dense, info = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert not any(isinstance(module, ExpertBank) for module in dense.modules())
    torch.testing.assert_close(logits(dense, "mixtral"), want, rtol=1e-4, atol=1e-5)


READ = """
import sys, torch, rankine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
told = load_file(sys.argv[2])
with torch.no_grad():
    found = model(told["input_ids"], attention_mask=told["attention_mask"]).logits
assert torch.equal(found, told["logits"])
print("same", type(model.model.layers[0].mlp.experts).__name__)
"""


@pytest.mark.process
@pytest.mark.slow
def test_a_fresh_process_reads_experts(fresh, tmp_path):
    model = tiny.mixtral()
    patch = fitted(model, 6)
    patch.apply(model)
    save(model, tmp_path / "out", patch)
    batch = next(iter(task("mixtral").batches("calibration")))
    told = {**batch, "logits": logits(model, "mixtral")}
    save_file(told, tmp_path / "told.safetensors")
    assert "same ExpertBank" in fresh(READ, tmp_path / "out", tmp_path / "told.safetensors")


# -- what nobody described ------------------------------------------------------------------------
SMALL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2}
IMAGES = {"image_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ODD: dict[str, tuple[Any, Any, int]] = {
    "mamba2": (
        tf.Mamba2Config(**SMALL, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=4),
        tf.AutoModelForCausalLM,
        2,
    ),
    "rwkv": (tf.RwkvConfig(**SMALL, context_length=16), tf.AutoModelForCausalLM, 1),
    "falcon": (tf.FalconConfig(**SMALL, num_attention_heads=4), tf.AutoModelForCausalLM, 1),
    "gpt_oss": (
        tf.GptOssConfig(
            **SMALL,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            num_local_experts=4,
            head_dim=8,
        ),
        tf.AutoModelForCausalLM,
        2,
    ),
    "vit": (
        tf.ViTConfig(**IMAGES, hidden_size=32, intermediate_size=48, patch_size=8),
        tf.AutoModelForImageClassification,
        2,
    ),
    "swin": (
        tf.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
        ),
        tf.AutoModelForImageClassification,
        1,
    ),
}


def odd_task(auto: Any) -> FunctionTask:
    """Pulls all outputs to zero: any model has a gradient of that."""
    g = tiny.seeded(6)
    ids = {"input_ids": torch.randint(3, 48, (4, 8), generator=g)}
    pixels = {"pixel_values": torch.randn(4, 3, 16, 16, generator=g)}
    return FunctionTask(
        [pixels if auto is tf.AutoModelForImageClassification else ids],
        forward=lambda model, batch: model(**batch),
        loss=lambda out, batch: out.logits.square().flatten(1).mean(1),
    )


#: RWKV overwrites its state in place, so no gradient passes.
UNKNOWN = [(name, m) for name in sorted(ODD) for m in ("svd_llm", "auto")]
UNKNOWN.remove(("rwkv", "auto"))


@pytest.mark.parametrize(("name", "method"), UNKNOWN)
def test_unknown_families_round_trip(name, method, tmp_path):
    """Blocks that hand more than hidden states on (RWKV, Swin, Falcon) make the whole model one
    block; linear layers inside strangers' experts stay as they are."""
    config, auto_class, blocks = ODD[name]
    torch.manual_seed(0)
    model = auto_class.from_config(copy.deepcopy(config)).eval()
    assert anatomy.describe(model).family == "generic"
    assert len(anatomy.describe(model).blocks) == 2
    given = odd_task(auto_class)
    batch = next(iter(given.batches("calibration")))
    walked = as_walked(anatomy.describe(model), model, given, batch)
    assert len(walked.blocks) == blocks
    out: Path = tmp_path / "out"
    result = rankine.compress(
        model, method=method, keep=0.7, task=given, output=out, evaluate=False
    )
    saved = auto_class.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(saved(**batch).logits, result.model(**batch).logits)
    assert result.patch.modules


def test_a_layer_that_only_lends_its_weight_is_named():
    """Mamba reads one projection's weight and never calls it: nothing can be measured there."""
    torch.manual_seed(0)
    config = tf.MambaConfig(**SMALL, state_size=4, time_step_rank=4)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    given = odd_task(tf.AutoModelForCausalLM)
    with pytest.raises(UserError, match=r"dt_proj.*exclude"):
        rankine.compress(model, method="svd_llm", keep=0.7, task=given, evaluate=False)
    result = rankine.compress(
        model, method="svd_llm", keep=0.7, task=given, evaluate=False, exclude=["*.dt_proj"]
    )
    assert not any(path.endswith("dt_proj") for path in result.patch.modules)
