"""Compressed models, unknown models, and models that users describe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers as tf
from torch import nn

from rankine import anatomy
from rankine.anatomy import Anatomy, Block
from rankine.anatomy.layouts import BART_DECODER, BART_ENCODER, LLAMA
from rankine.errors import UserError
from rankine.metric import Metric
from rankine.patch import Patch
from rankine.structures import LowRank, Quantized, Structure, Sum, matrix


def compress(model: nn.Module, path: str, structure: Structure) -> None:
    w = matrix(model.get_submodule(path)).detach()
    Patch.of(path, structure, structure.encode(w, Metric())).apply(model)


# -- compressed -----------------------------------------------------------------------------------
READS = ["llama", "qwen2", "gpt2", "opt", "bert", "gemma2", "gpt_neox", "phi", "phi3"]


@pytest.mark.parametrize("family", [*READS, "t5", "t5_gated", "bart"])
def test_a_compressed_model_reads_as_before(tiny, family):
    model = tiny(family)
    before = anatomy.describe(model)
    first, second = before.blocks[0], before.blocks[-1]
    compress(model, first.weights[0].path, LowRank(4))
    compress(model, first.weights[-1].path, LowRank(6, pivoted=True))
    compress(model, second.weights[0].path, Sum(base=Quantized(8), low_rank=LowRank(2)))
    after = anatomy.describe(model)
    assert after.family == before.family

    def but_operator(described: Anatomy) -> list[tuple]:
        return [
            (w.path, w.role, w.block, w.shape, w.reads, w.rows, w.bias, w.tied_with)
            for w in described.weights
        ]

    assert but_operator(after) == but_operator(before)
    assert after.weight(first.weights[0].path).operator == "linear"
    assert [b.attention for b in after.blocks] == [b.attention for b in before.blocks]
    assert [b.mlp for b in after.blocks] == [b.mlp for b in before.blocks]


def test_a_factored_table_is_still_an_embedding(tiny):
    model = tiny("bert")
    compress(model, "bert.embeddings.position_embeddings", LowRank(4, view="table"))
    weight = anatomy.describe(model).weight("bert.embeddings.position_embeddings")
    assert (weight.operator, weight.role, weight.shape) == ("embedding", "embedding", (32, 16))


def test_a_basis_shared_between_layers_is_reported_as_tied(tiny):
    model = tiny("llama")
    early, late = (f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
    compress(model, early, LowRank(4))
    compress(model, late, LowRank(4))
    shared = {f"{late}.down.weight": f"{early}.down.weight"}
    Patch(tied=shared).apply(model)
    described = anatomy.describe(model)
    assert described.weight(late).tied_with == f"{early}.down.weight"
    assert described.weight(early).tied_with is None


class Latent(nn.Module):
    """A structured module that is no matrix: what latent attention looks like from outside."""

    def __init__(self):
        super().__init__()
        self.structure = LowRank(4)
        self.q_proj = nn.Linear(32, 32)


def test_a_replaced_attention_leaves_its_block_readable(tiny):
    model = tiny("llama")
    model.model.layers[1].self_attn = Latent()
    first, second = anatomy.describe(model).blocks
    assert first.attention is not None
    assert second.attention is None
    assert [w.role for w in second.weights] == ["gate", "up", "down"]
    assert second.mlp is not None


def test_the_generic_walk_does_not_descend_into_structures():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    compress(model, "0", LowRank(2))
    described = anatomy.describe(model)
    assert [(w.path, w.shape) for w in described.linears] == [("0", (8, 8)), ("2", (4, 8))]


# -- unknown --------------------------------------------------------------------------------------
def test_a_plain_stack_is_one_block():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    described = anatomy.describe(model)
    (block,) = described.blocks
    assert (described.family, block.path, block.index) == ("generic", "", 0)
    assert [[w.path for w in step] for step in block.steps] == [["1"], ["3"]]
    assert [(w.path, w.role, w.block) for w in described.outside] == [("0", "embedding", -1)]
    assert {w.role for w in described.linears} == {"linear"}
    assert all(w.reads == w.path for w in described.weights)
    assert described.embedding == "0"


def test_a_classifier_inside_the_only_block_is_no_head():
    model = nn.Sequential()
    model.hidden, model.classifier = nn.Linear(8, 8), nn.Linear(8, 2)
    described = anatomy.describe(model)
    assert described.head is None
    assert described.weight("classifier").role == "linear"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.route = nn.Linear(8, 5)
        self.experts = nn.ModuleList([Expert() for _ in range(5)])


class Model(nn.Module):
    def __init__(self, layer: type[nn.Module] = Layer, layers: int = 3):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(9)])
        self.towers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
        self.trunk = nn.ModuleList([layer() for _ in range(layers)])
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.table.weight


def test_the_longest_list_of_layers_gives_the_blocks():
    described = anatomy.describe(Model())
    assert [b.path for b in described.blocks] == ["trunk.0", "trunk.1", "trunk.2"]
    assert [w.path for w in described.blocks[1].weights] == ["trunk.1.wide", "trunk.1.narrow"]
    outside = {w.path: w.role for w in described.outside}
    assert outside == {
        "table": "embedding",
        "towers.0.0": "linear",
        "towers.1.0": "linear",
        "lm_head": "head",
    }
    assert described.weight("lm_head").tied_with == "table.weight"


def test_experts_are_not_blocks():
    described = anatomy.describe(Model(Routed))
    assert [b.path for b in described.blocks] == ["trunk.0", "trunk.1", "trunk.2"]
    assert len(described.blocks[0].weights) == 6


def test_an_unknown_model_of_transformers():
    config = tf.CodeGenConfig(vocab_size=48, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    described = anatomy.describe(tf.AutoModelForCausalLM.from_config(config))
    assert described.family == "generic"
    assert [b.path for b in described.blocks] == ["transformer.h.0", "transformer.h.1"]
    assert all(len(b.weights) == 4 for b in described.blocks)


def test_torchs_own_attention_is_left_alone():
    # nn.MultiheadAttention reads its projections' tensors and never calls them.
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    described = anatomy.describe(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    assert [b.path for b in described.blocks] == ["layers.0", "layers.1"]
    assert [w.path for w in described.blocks[0].weights] == ["layers.0.linear1", "layers.0.linear2"]


def test_a_module_used_twice_is_one_weight_at_its_first_path():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(nn.ReLU(), shared))
    assert [w.path for w in anatomy.describe(model).weights] == ["0.0"]


def test_a_shared_bias_ties_no_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    assert [w.tied_with for w in anatomy.describe(model).weights] == [None, None]


def test_of_two_equal_stacks_the_first_gives_the_blocks():
    model = nn.Sequential()
    model.encoder = nn.ModuleList([Layer() for _ in range(3)])
    model.decoder = nn.ModuleList([Layer() for _ in range(3)])
    described = anatomy.describe(model)
    assert [b.path for b in described.blocks] == ["encoder.0", "encoder.1", "encoder.2"]
    assert len(described.outside) == 6


def test_a_table_inside_a_block_is_chosen_only_by_name():
    class Tabled(Layer):
        def __init__(self):
            super().__init__()
            self.position = nn.Embedding(4, 8)

    described = anatomy.describe(Model(Tabled))
    table = described.weight("trunk.0.position")
    assert (table.role, table.block) == ("embedding", 0)
    assert table.path not in {t.id for t in anatomy.weight_targets(described)}
    (target,) = anatomy.weight_targets(described, include=["trunk.0.position"], tables=True)
    assert target.weights == (table,)


def test_a_model_without_weights_has_nothing_to_compress():
    described = anatomy.describe(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    assert described.weights == ()
    with pytest.raises(UserError, match="no linear layer"):
        anatomy.weight_targets(described)


# -- described by the user ------------------------------------------------------------------------
@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(anatomy, "_registered", {})


@pytest.mark.usefixtures("registry")
def test_a_registered_class_is_described_by_its_function():
    class Mine(Model):
        pass

    def describe(model: nn.Module) -> Anatomy:
        walked = anatomy.generic(model)
        return Anatomy("mine", walked.blocks[:1], embedding="table")

    anatomy.register(Mine, describe)
    assert anatomy.describe(Mine()).family == "mine"
    assert len(anatomy.describe(Mine()).blocks) == 1
    assert anatomy.describe(Model()).family == "generic"
    assert anatomy.describe(type("Child", (Mine,), {})()).family == "mine"


@pytest.mark.usefixtures("registry")
def test_a_registered_layout_describes_a_model_type():
    config = tf.StableLmConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=48,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    assert anatomy.describe(model).family == "generic"
    anatomy.register("stablelm", LLAMA)
    described = anatomy.describe(model)
    assert described.family == "stablelm"
    assert described.norm == "model.norm"
    # A quarter of each head turns: a layout says where things are, the model how large.
    assert described.blocks[0].attention.rotary_fraction == pytest.approx(0.25)


@pytest.mark.usefixtures("registry")
def test_a_registration_wins_over_a_built_in_family(tiny):
    anatomy.register("llama", lambda model: Anatomy("ours", (Block("", 0, None, None, ()),)))
    assert anatomy.describe(tiny("llama")).family == "ours"


@pytest.mark.usefixtures("registry")
def test_an_encoder_decoder_registers_both_its_stacks():
    config = tf.MBartConfig(
        vocab_size=48, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    model = tf.AutoModelForSeq2SeqLM.from_config(config)
    assert anatomy.describe(model).family == "generic"
    anatomy.register("mbart", (BART_ENCODER, BART_DECODER))
    described = anatomy.describe(model)
    assert described.family == "mbart"
    assert [b.stack for b in described.blocks] == [0, 0, 1, 1, 1]
    assert [b.cross is not None for b in described.blocks] == [False, False, True, True, True]


@pytest.mark.usefixtures("registry")
def test_the_documented_registrations_work():
    text = (Path(__file__).parents[2] / "docs" / "anatomy.md").read_text(encoding="utf-8")
    layout, function, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(layout, {})
    assert "my_model_type" in anatomy._registered

    class TwoTowers(Model):
        pass

    exec(function, {"TwoTowers": TwoTowers})
    described = anatomy.describe(TwoTowers())
    assert described.family == "two towers"
    assert [w.path for w in described.outside] == ["towers.0.0", "towers.1.0"]
