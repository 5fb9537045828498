"""Embeddings as targets: factored in place, and what shares their storage goes on sharing it."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import rankine
import tiny_models as tiny
from rankine.anatomy import describe, weight_targets
from rankine.engine.run import cast
from rankine.errors import UserError
from rankine.patch import stored_bits
from rankine.structures import LowRank
from rankine.tasks import FunctionTask

TABLES = {
    "llama": (tiny.llama, "model.embed_tokens"),
    "gpt2": (tiny.gpt2, "transformer.wte"),
    "opt": (tiny.opt, "model.decoder.embed_tokens"),
}


def compress(model, method, include, **more):
    asked = {"keep": 0.7, "task": tiny.tokens(padded=True), "evaluate": False, **more}
    return rankine.compress(model, method=method, include=include, **asked)


def bf16(model):
    return cast(model, torch.bfloat16)


def logits(model):
    with torch.no_grad():
        return model(tiny.ids()).logits


@pytest.mark.parametrize("method", ["svd", "afm"])
@pytest.mark.parametrize("family", TABLES)
def test_a_tied_output_layer_shares_the_thin_table(family, method, tmp_path):
    """Within the budget of the one table; after loading and resaving, too."""
    build, path = TABLES[family]
    model = bf16(build(tie_word_embeddings=True))
    result = compress(model, method, path, output=tmp_path / "out")
    (target,) = result.stages[0].targets
    assert target.members == (path, "lm_head")
    assert result.patch.modules[path].view == "table"
    assert result.report["budget"]["keep"] <= 0.7
    stored = load_file(tmp_path / "out" / "model.safetensors")
    bits = sum(16 * t.numel() for n, t in stored.items() if n.startswith((path, "lm_head")))
    assert bits == result.stages[0].choices[target.id].bits == stored_bits(model, *target.members)
    loaded = rankine.load(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    for one in (loaded, rankine.load(tmp_path / "again")):
        assert one.get_submodule(path).down.weight is one.lm_head.up.weight
        assert torch.equal(logits(one), logits(model))
    table, head = (m.weight.detach().float() for m in (model.get_submodule(path), model.lm_head))
    assert float((table - head).norm()) <= 0.01 * float(table.norm())


@pytest.mark.parametrize("method", ["svd", "afm"])
def test_an_untied_table_leaves_the_output_layer_alone(method, tmp_path):
    model = bf16(tiny.llama(tie_word_embeddings=False))
    head = model.lm_head.weight.clone()
    include = ["model.embed_tokens", "*.q_proj"]
    result = compress(model, method, include, output=tmp_path / "out")
    assert set(result.patch.modules) == {
        "model.embed_tokens",
        *(f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)),
    }
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(logits(rankine.load(tmp_path / "out")), logits(model))
    assert isinstance(model.model.embed_tokens.structure, LowRank)
    bias = getattr(model.model.embed_tokens.up, "bias", None)
    assert (bias is not None) == (method == "afm")


def test_one_table_under_three_embeddings_and_a_head(tmp_path):
    """T5: whichever of them is named."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    config = tf.T5Config(**sizes, num_heads=4, decoder_start_token_id=0)
    model = tf.T5ForConditionalGeneration(config).eval()
    anatomy = describe(model)
    named = [weight_targets(anatomy, [p], tables=True) for p in ("shared", "decoder.embed_tokens")]
    assert named[0] == named[1]
    both = weight_targets(anatomy, ["shared", "*.embed_tokens", "lm_head"], tables=True)
    assert both == named[0]

    batches = [{"input_ids": part, "labels": part} for part in tiny.ids().split(2)]
    task = FunctionTask(batches, loss=lambda out, b: out.loss.expand(2))
    asked = {"bits": 20.0, "task": task, "evaluate": False, "output": tmp_path / "out"}
    rankine.compress(model, method="svd", include="shared", **asked)
    loaded = rankine.load(tmp_path / "out")
    table = loaded.shared.down.weight
    for path in ("encoder.embed_tokens.down", "decoder.embed_tokens.down", "lm_head.up"):
        assert loaded.get_submodule(path).weight is table
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)


def test_half_of_a_shared_table():
    with pytest.raises(UserError, match=r"share a matrix.*exclude both or neither"):
        compress(tiny.llama(), "svd", "model.embed_tokens", exclude="lm_head")


@pytest.mark.parametrize("method", ["svd_llm", "lord", "auto", "basis_sharing", "rtn"])
def test_methods_that_take_layers_only_say_so(method):
    size = {"keep": None} if method == "rtn" else {}
    with pytest.raises(UserError, match=r"found the embedding model\.embed_tokens.*afm or svd"):
        compress(tiny.llama(), method, ["model.embed_tokens", "*.q_proj"], **size)


def test_codes_leave_a_shared_table_alone(tmp_path):
    """A later stage takes the parts that are layers; the table and the head still share it."""
    model = bf16(tiny.llama())
    stages = ({"method": "svd", "keep": 0.7}, {"method": "rtn", "set": {"group": 16}})
    asked = {"include": ["model.embed_tokens", "lm_head"], "task": tiny.tokens()}
    rankine.compress(model, stages=stages, evaluate=False, output=tmp_path / "out", **asked)
    loaded = rankine.load(tmp_path / "out")
    assert loaded.model.embed_tokens.down.weight is loaded.lm_head.up.weight
    assert torch.equal(logits(loaded), logits(model))
