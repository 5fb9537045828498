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
FUSED_STEPS = [["qkv"], ["o"], ["up"], ["down"]]
SPARSE_STEPS = [["q", "k", "v"], ["o"], ["gate_up"], ["down"]]
SHARED_STEPS = [
    *SPARSE_STEPS[:2],
    ["shared_gate", "shared_up"],
    ["shared_down"],
    *SPARSE_STEPS[2:],
    ["shared_route"],
]
CROSS = [["cross_q"], ["cross_k", "cross_v"], ["cross_o"]]


def encoder_decoder(steps: list[list[str]]) -> list[list[list[str]]]:
    """Two blocks that encode, three that decode."""
    return [steps] * 2 + [[*steps[:2], *CROSS, *steps[2:]]] * 3


#: family → the roles of each block's steps.
STEPS = {
    "llama": [GATED_STEPS] * 2,
    "mistral": [GATED_STEPS] * 2,
    "qwen2": [GATED_STEPS] * 2,
    "qwen3": [GATED_STEPS] * 2,
    "gemma": [GATED_STEPS] * 2,
    "gemma2": [GATED_STEPS] * 2,
    "gemma3_text": [GATED_STEPS] * 2,
    "gpt2": [FUSED_STEPS] * 2,
    "gpt_neox": [FUSED_STEPS] * 2,
    "phi": [PLAIN_STEPS] * 2,
    "phi3": [[["qkv"], ["o"], ["gate_up"], ["down"]]] * 2,
    "opt": [PLAIN_STEPS] * 2,
    "bert": [PLAIN_STEPS] * 2,
    "mixtral": [SPARSE_STEPS] * 2,
    "olmoe": [SPARSE_STEPS] * 2,
    "qwen2_moe": [SHARED_STEPS, GATED_STEPS],
    "qwen3_moe": [SPARSE_STEPS] * 2,
    "t5": encoder_decoder(PLAIN_STEPS),
    "t5_gated": encoder_decoder(GATED_STEPS),
    "bart": encoder_decoder(PLAIN_STEPS),
}
ALL = sorted(STEPS)
SPARSE = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
TWO_STACKS = ["bart", "t5", "t5_gated"]


WIDE_HEADS = ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text")
SCALE = {"gemma2": 24**-0.5, "gemma3_text": 24**-0.5, "t5": 1.0, "t5_gated": 1.0}
BIASED = ("qwen2", "qwen2_moe", "gpt2", "gpt_neox", "phi", "opt", "bert", "bart")


def is_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def stored(model: nn.Module, weight: anatomy.Weight) -> torch.Tensor:
    """The tensor a weight stands for: a bank's parameter, a module's weight."""
    if weight.operator == "bank":
        return model.get_parameter(weight.path.replace("_bank", "_proj"))
    return model.get_submodule(weight.path).weight


@pytest.mark.parametrize("family", ALL)
def test_blocks_hold_every_weight_in_the_familys_steps(tiny, family):
    model = tiny(family)
    described = anatomy.describe(model)
    assert described.family == model.config.model_type
    assert [block.index for block in described.blocks] == list(range(len(STEPS[family])))
    stacks = [0, 0, 1, 1, 1] if family in TWO_STACKS else [0, 0]
    assert [block.stack for block in described.blocks] == stacks
    for block, steps in zip(described.blocks, STEPS[family], strict=True):
        assert [[w.role for w in step] for step in block.steps] == steps
        assert isinstance(model.get_submodule(block.path), nn.Module)
        inside = {n for n, m in model.named_modules() if is_weight(m)}
        banks = [n for n, p in model.named_parameters() if p.ndim == 3]
        inside |= {name.replace("_proj", "_bank") for name in banks}
        assert {w.path for w in block.weights} == {
            name for name in inside if name.startswith(block.path + ".")
        }
        assert {w.block for w in block.weights} == {block.index}
    assert described.linears + described.outside == described.weights


@pytest.mark.parametrize("family", ALL)
def test_shapes_operators_and_biases_are_those_of_the_modules(tiny, family):
    model = tiny(family)
    for weight in anatomy.describe(model).weights:
        tensor = stored(model, weight)
        if weight.operator == "bank":
            assert tuple(tensor.shape) == (weight.copies, *weight.shape)
            assert weight.size == tensor.numel()
            assert weight.tied_with is None
            continue
        module = model.get_submodule(weight.path)
        transposed = weight.operator in ("conv1d", "embedding")
        assert weight.shape == (tuple(tensor.shape)[::-1] if transposed else tuple(tensor.shape))
        assert (weight.copies, weight.size) == (1, tensor.numel())
        assert weight.bias == (getattr(module, "bias", None) is not None)
        assert (weight.operator == "embedding") == isinstance(module, nn.Embedding)
        assert (weight.operator == "conv1d") == (type(module).__name__ == "Conv1D")


def inputs_of(family: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model is called with; a decoder gets other ids than its encoder."""
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids.flip(-1)[:, :5]} if family in TWO_STACKS else {}
    )


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

    modules = [w for w in described.linears if w.operator != "bank"]
    for weight in modules:
        model.get_submodule(weight.path).register_forward_pre_hook(watch(weight.path))
    with torch.no_grad():
        model(**inputs_of(family, ids))
    assert ran == [weight.path for weight in modules]
    for block in described.blocks:
        for step in block.steps:
            assert {weight.reads for weight in step} == {step[0].path}
            plain = [weight for weight in step if weight.operator != "bank"]
            assert all(inputs[weight.path] is inputs[weight.reads] for weight in plain)
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
        assert attention.head_dim == (16 if family in WIDE_HEADS else 8)
        assert attention.scale == pytest.approx(SCALE.get(family, attention.head_dim**-0.5))
        turning = "rope_parameters" in model.config.to_dict()
        assert attention.rotary == ("half" if turning else None)
        fraction = {"gpt_neox": 0.25, "phi": 0.5}.get(family, 1.0)
        assert attention.rotary_fraction == (fraction if turning else 0.0)
        assert attention.qk_norm == (family in ("qwen3", "qwen3_moe", "gemma3_text", "olmoe"))
        assert attention.bias == (family in BIASED)
        if family not in ("gemma2", "gemma3_text"):
            assert attention.window == (8 if family in ("mistral", "phi3") else None)
        assert mlp.width == (
            24 if "moe" in family and mlp.experts > 1 and family != "olmoe" else 48
        )
        by_path = {w.path: w.role for w in block.weights}
        fused = "gate_up" in by_path.values()
        assert (mlp.gate is not None) == (fused or "gate" in by_path.values())
        assert (mlp.gate == mlp.up) == fused
        assert by_path[mlp.up] == ("gate_up" if fused else "up")
        assert by_path[mlp.down] == "down"
        assert by_path[attention.o] == "o"
        assert mlp.experts == (4 if fused and family != "phi3" else 1)
        for part in (attention.path, mlp.path):
            model.get_submodule(part)


def test_what_only_some_families_have(tiny):
    assert [b.parallel for b in anatomy.describe(tiny("gpt_neox")).blocks] == [True, True]
    serial = tiny("gpt_neox", use_parallel_residual=False)
    assert [b.parallel for b in anatomy.describe(serial).blocks] == [False, False]
    assert all(b.parallel for b in anatomy.describe(tiny("phi")).blocks)
    gemma = anatomy.describe(tiny("gemma2"))
    assert gemma.softcap == 30.0
    assert [b.attention.softcap for b in gemma.blocks] == [20.0, 20.0]
    for family in ("gemma2", "gemma3_text"):
        windows = [b.attention.window for b in anatomy.describe(tiny(family)).blocks]
        assert windows == [8, None]
    bases = [b.attention.rotary_base for b in anatomy.describe(tiny("gemma3_text")).blocks]
    assert bases == [10_000.0, 1_000_000.0]
    shared = anatomy.describe(tiny("qwen2_moe")).blocks[0].shared
    assert (shared.path, shared.width) == ("model.layers.0.mlp.shared_expert", 40)
    for block in anatomy.describe(tiny("t5")).blocks:
        assert (block.cross is not None) == (block.stack == 1)


@pytest.mark.parametrize("family", ALL)
def test_norms_multiply_by_their_weight_plus_the_offset(tiny, family):
    model = tiny(family)
    blocks = anatomy.describe(model).blocks
    assert all(block.norms for block in blocks)
    for block in blocks:
        inside = {n for n, m in model.named_modules() if n.startswith(block.path + ".")}
        named = {n for n in inside if n.rpartition(".")[2].lower().endswith("norm")}
        named = {n for n in named if n.rpartition(".")[2] not in ("q_norm", "k_norm")}
        named |= {n for n in inside if n.rpartition(".")[2] in ("ln_1", "ln_2")}
        assert {norm.path for norm in block.norms} == named
        for norm in block.norms:
            module = model.get_submodule(norm.path)
            x = torch.randn(1, 3, 32)
            mean = x.mean(-1, keepdim=True) if norm.kind == "layer" else 0.0
            centred = x - mean
            unit = centred / centred.square().mean(-1, keepdim=True).sqrt()
            bias = getattr(module, "bias", None)
            with torch.no_grad():
                wanted = unit * (module.weight + norm.offset) + (0.0 if bias is None else bias)
                torch.testing.assert_close(module(x), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "bart", "phi"])
def test_norms_stand_where_they_are_said_to(tiny, ids, family):
    """An output norm's input comes straight from its part; an input norm's output goes into it."""
    model = tiny(family)
    block = anatomy.describe(model).blocks[-1]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(path: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen[path] = (given, out[0] if isinstance(out, tuple) else out)

        return hook

    place = {"attention": block.attention.path, "mlp": block.mlp.path}
    if block.cross is not None:
        place["cross"] = block.cross.path
    if block.mlp.path == block.path:
        place["mlp"] = block.mlp.up
    for path in {*place.values(), *(norm.path for norm in block.norms)}:
        model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True)
    with torch.no_grad():
        model(**inputs_of(family, ids))
    for norm in block.norms:
        read, wrote = seen[norm.path]
        part_read, part_wrote = seen[place[norm.part]]
        if norm.where == "input":
            assert torch.equal(wrote, part_read)
        elif norm.where == "output":
            assert torch.equal(read, part_wrote)
        else:
            assert not torch.equal(read, part_wrote)
            assert not torch.equal(wrote, part_read)


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
        ("t5", "lm_head", "shared", "decoder.final_layer_norm"),
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


def test_fused_rows_are_what_the_model_reads(tiny, ids):
    """GPT-NeoX groups the rows by head, Phi-3 by role with fewer key-value rows: zeroing the v rows
    of every head silences the attention, zeroing those of q and k does not."""
    for family in ("gpt_neox", "phi3"):
        for role, silent in (("v", True), ("q", False), ("k", False)):
            model = tiny(family)
            block = anatomy.describe(model).blocks[0]
            (fused,) = block.steps[0]
            module = model.get_submodule(fused.path)
            heard: list[torch.Tensor] = []
            model.get_submodule(block.attention.o).register_forward_pre_hook(
                lambda _, args, heard=heard: heard.append(args[0])
            )
            with torch.no_grad():
                for part, start, stop in fused.rows:
                    if part == role:
                        module.weight[start:stop] = 0
                        if module.bias is not None:
                            module.bias[start:stop] = 0
                model(ids)
            assert bool((heard[0] == 0).all()) == silent
            sizes = {"q": 32, "k": 32 if family == "gpt_neox" else 16}
            for part, rows in sizes.items():
                assert sum(b - a for r, a, b in fused.rows if r == part) == rows


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
        ("bart", tf.AutoModelForSequenceClassification, "model", None),
        ("mixtral", tf.AutoModelForSequenceClassification, "model", "score"),
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
