"""Every family goes through compress, save and transformers' own loading, to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import rankine
import tiny_models as tiny
from rankine import anatomy
from rankine.patch import stored_bits

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
