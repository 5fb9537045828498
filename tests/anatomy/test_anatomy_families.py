"""Each family's paths, roles, sizes and order, held against the model that runs."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf
from torch import nn

from rankine import anatomy

GATED_STEPS = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
PLAIN_STEPS = [["q", "k", "v"], ["o"], ["up"], ["down"]]
STEPS = {
    "llama": GATED_STEPS,
    "mistral": GATED_STEPS,
    "qwen2": GATED_STEPS,
    "qwen3": GATED_STEPS,
    "gpt2": [["qkv"], ["o"], ["up"], ["down"]],
    "opt": PLAIN_STEPS,
    "bert": PLAIN_STEPS,
}
ALL = sorted(STEPS)


@pytest.mark.parametrize("family", ALL)
def test_blocks_hold_every_weight_in_the_familys_steps(tiny, family):
    model = tiny(family)
    described = anatomy.describe(model)
    assert described.family == family
    assert [block.index for block in described.blocks] == [0, 1]
    for block in described.blocks:
        assert [[w.role for w in step] for step in block.steps] == STEPS[family]
        assert isinstance(model.get_submodule(block.path), nn.Module)
        inside = {
            name
            for name, module in model.named_modules()
            if name.startswith(block.path + ".")
            and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        }
        assert {w.path for w in block.weights} == inside
        assert {w.block for w in block.weights} == {block.index}
    assert described.linears + described.outside == described.weights


@pytest.mark.parametrize("family", ALL)
def test_shapes_operators_and_biases_are_those_of_the_modules(tiny, family):
    model = tiny(family)
    for weight in anatomy.describe(model).weights:
        module = model.get_submodule(weight.path)
        stored = tuple(module.weight.shape)
        transposed = weight.operator in ("conv1d", "embedding")
        assert weight.shape == (stored[::-1] if transposed else stored)
        assert weight.bias == (getattr(module, "bias", None) is not None)
        assert (weight.operator == "embedding") == isinstance(module, nn.Embedding)
        assert (weight.operator == "conv1d") == (type(module).__name__ == "Conv1D")


@pytest.mark.parametrize("family", ALL)
def test_steps_are_in_execution_order_and_share_what_they_read(tiny, ids, family):
    model = tiny(family)
    described = anatomy.describe(model)
    ran: list[str] = []
    inputs: dict[str, torch.Tensor] = {}

    def watch(path: str):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            ran.append(path)
            inputs[path] = args[0]

        return hook

    for weight in described.linears:
        model.get_submodule(weight.path).register_forward_pre_hook(watch(weight.path))
    with torch.no_grad():
        model(ids)
    assert ran == [weight.path for weight in described.linears]
    for block in described.blocks:
        for step in block.steps:
            assert {weight.reads for weight in step} == {step[0].path}
            assert all(inputs[weight.path] is inputs[weight.reads] for weight in step)
    assert len({weight.reads for weight in described.linears}) == sum(
        len(block.steps) for block in described.blocks
    )


@pytest.mark.parametrize("family", ALL)
def test_attention_and_mlp_records(tiny, family):
    model = tiny(family)
    for block in anatomy.describe(model).blocks:
        attention, mlp = block.attention, block.mlp
        kv_heads = getattr(model.config, "num_key_value_heads", 4)
        assert (attention.heads, attention.kv_heads) == (4, kv_heads)
        assert attention.head_dim == (16 if family == "qwen3" else 8)
        assert attention.scale == pytest.approx(attention.head_dim**-0.5)
        gated = STEPS[family] is GATED_STEPS
        assert attention.rotary == ("half" if gated else None)
        assert attention.rotary_fraction == (1.0 if gated else 0.0)
        assert attention.qk_norm == (family == "qwen3")
        assert attention.bias == (family in ("qwen2", "gpt2", "opt", "bert"))
        assert attention.window == (8 if family == "mistral" else None)
        assert mlp.width == 48
        assert (mlp.gate is not None) == gated
        by_path = {w.path: w.role for w in block.weights}
        assert by_path[mlp.up] == "up"
        assert by_path[mlp.down] == "down"
        assert by_path[attention.o] == "o"
        for part in (attention.path, mlp.path):
            model.get_submodule(part)


def test_windows_are_the_layers_own(tiny):
    model = tiny("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    windows = [block.attention.window for block in anatomy.describe(model).blocks]
    assert windows == [None, 4]


def test_gpt2_scale_by_layer_and_fused_rows(tiny):
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    first, second = anatomy.describe(model).blocks
    assert second.attention.scale == pytest.approx(first.attention.scale / 2)
    fused = first.steps[0][0]
    assert fused.rows == (("q", 0, 32), ("k", 32, 64), ("v", 64, 96))
    attention = first.attention
    assert attention.q == attention.k == attention.v == fused.path
    # The rows say what the model reads: q·k·v are the thirds of the fused output.
    module = model.get_submodule(attention.path)
    x = torch.randn(1, 3, 32)
    q, k, v = module.c_attn(x).split(module.split_size, dim=2)
    for (_, start, stop), part in zip(fused.rows, (q, k, v), strict=True):
        torch.testing.assert_close(module.c_attn(x)[..., start:stop], part)


@pytest.mark.parametrize(
    ("family", "head", "embedding", "norm"),
    [
        ("llama", "lm_head", "model.embed_tokens", "model.norm"),
        ("gpt2", "lm_head", "transformer.wte", "transformer.ln_f"),
        ("opt", "lm_head", "model.decoder.embed_tokens", "model.decoder.final_layer_norm"),
        ("bert", "cls.predictions.decoder", "bert.embeddings.word_embeddings", None),
    ],
)
def test_outside(tiny, family, head, embedding, norm):
    model = tiny(family)
    described = anatomy.describe(model)
    assert (described.head, described.embedding, described.norm) == (head, embedding, norm)
    assert described.weight(head).role == "head"
    assert described.weight(embedding).role == "embedding"
    assert {w.block for w in described.outside} == {-1}
    assert described.weight(head).tied_with == embedding + ".weight"
    assert described.weight(embedding).tied_with is None


def test_untied_head_is_not_tied(tiny):
    described = anatomy.describe(tiny("llama", tie_word_embeddings=False))
    assert described.weight("lm_head").tied_with is None


def test_opt_projections_stand_outside_and_learned_positions_are_no_table(tiny):
    described = anatomy.describe(tiny("opt", word_embed_proj_dim=16))
    roles = {w.path: w.role for w in described.outside}
    assert roles["model.decoder.project_in"] == "linear"
    assert roles["model.decoder.project_out"] == "linear"
    # Its forward takes a mask, not ids: nothing else could stand there.
    assert "model.decoder.embed_positions" not in roles


@pytest.mark.parametrize(
    ("family", "head", "prefix", "output"),
    [
        ("llama", tf.AutoModel, "", None),
        ("llama", tf.AutoModelForSequenceClassification, "model", "score"),
        ("llama", tf.AutoModelForQuestionAnswering, "transformer", "qa_outputs"),
        ("gpt2", tf.AutoModel, "", None),
        ("gpt2", tf.AutoModelForSequenceClassification, "transformer", "score"),
        ("opt", tf.AutoModel, "", None),
        ("bert", tf.AutoModel, "", None),
        ("bert", tf.AutoModelForSequenceClassification, "bert", "classifier"),
        ("bert", tf.AutoModelForCausalLM, "bert", "cls.predictions.decoder"),
    ],
)
def test_any_head_class(tiny, family, head, prefix, output):
    described = anatomy.describe(tiny(family, head))
    bare = anatomy.describe(tiny(family, tf.AutoModel))
    assert described.family == family
    assert described.head == output
    dotted = prefix + "." if prefix else ""
    assert [w.path for w in described.linears] == [dotted + w.path for w in bare.linears]
    assert described.embedding == dotted + bare.embedding
    assert described.prefix == (prefix or described.prefix)
    assert described.prefix


@pytest.mark.parametrize("family", ALL)
def test_on_meta_it_reads_the_same(tiny, family):
    with torch.device("meta"):
        model = tiny(family)
    assert all(p.is_meta for p in model.parameters())
    assert anatomy.describe(model) == anatomy.describe(tiny(family))


def test_a_renamed_attribute_falls_back_with_a_warning(tiny, caplog):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.query = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with caplog.at_level(logging.WARNING, logger="rankine.anatomy"):
        described = anatomy.describe(model)
    assert "model.layers.0.self_attn.q_proj" in caplog.text
    assert described.family == "generic"
    assert [b.path for b in described.blocks] == ["model.layers.0", "model.layers.1"]
    assert "model.layers.0.self_attn.query" in [w.path for w in described.linears]


def test_a_weight_the_layout_does_not_know_falls_back(tiny, caplog):
    described = anatomy.describe(tiny("gpt2", add_cross_attention=True))
    assert described.family == "generic"
    assert "crossattention" in caplog.text
