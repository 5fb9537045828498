"""The model in the package: what later claims rely on."""

import json

import pytest

from rankine.checkpoint import open_model
from rankine.evaluation.perplexity import perplexity
from rankine.pipeline import compress
from rankine.tasks.embedded import CALIBRATION_MODULES, EVALUATION_MODULES, embedded_model_dir


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer, _ = open_model("embedded", dtype="float32")
    return model, tokenizer


def test_its_shape(embedded):
    model, _ = embedded
    config = model.config
    assert 2.0e6 <= sum(p.numel() for p in model.parameters()) <= 2.5e6
    assert config.head_dim == 64
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.max_position_embeddings == 1024
    assert config.tie_word_embeddings


def test_evaluation_text_was_neither_trained_on_nor_calibrates():
    assert not set(EVALUATION_MODULES) & set(CALIBRATION_MODULES)
    corpus = json.loads((embedded_model_dir() / "corpus.json").read_text())
    paths = [path for path, _ in corpus["files"] if path.startswith("python-stdlib/")]
    assert len(paths) > 500
    for module in EVALUATION_MODULES:
        held = (f"python-stdlib/{module}.py", f"python-stdlib/{module}/")
        assert not [path for path in paths if path.startswith(held)]


@pytest.mark.slow
def test_it_is_well_trained(embedded):
    """Plain SVD at keep 0.7 must hurt, else every method looks alike."""
    model, tokenizer = embedded
    dense = perplexity(model, tokenizer, max_tokens=12_000)
    assert dense.perplexity < 12
    assert dense.bits_per_byte < 1.3
    cut = compress("embedded", method="svd", keep=0.7, evaluate=False)
    damaged = perplexity(cut.model, tokenizer, max_tokens=12_000)
    assert damaged.perplexity > 1.2 * dense.perplexity
