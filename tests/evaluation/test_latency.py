"""Latency and memory: figures that mean what they say."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rankine.evaluation.latency import (
    decode_speed,
    faster_from,
    measure_latency,
    parameter_bytes,
    pays,
    peak_memory,
)
from rankine.evaluation.linears import (
    BLOCK_1B,
    FASTER_FROM,
    FUSED_FASTER_FROM,
    crossing,
    interleave,
    measure_linears,
    rank_for,
    ranks_for,
)
from rankine.kernels.fused import missing
from rankine.structures import decoding

needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))
WIDTHS = Path(__file__).parents[2] / "benchmarks" / "results" / "factored_linears.json"


class Slow(nn.Module):
    """A model that takes `seconds` longer."""

    def __init__(self, model, seconds):
        super().__init__()
        self.model, self.seconds, self.config = model, seconds, model.config

    def forward(self, **kwargs):
        time.sleep(self.seconds)
        return self.model(**kwargs)


def test_a_slower_model_is_slower(llama):
    model = llama()
    found = measure_latency({"dense": model, "slow": Slow(model, 0.05)}, 8, new_tokens=3, repeats=2)
    assert found["dense"].speedup == 1
    assert found["slow"].speedup < 0.9
    assert found["slow"].tokens_per_second < 20
    assert found["slow"].prefill > 0.05
    assert found["slow"].bytes == found["dense"].bytes


def test_decode_speed_decodes(llama):
    calls = []
    model = llama()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert decode_speed(model, 5, new_tokens=4) > 0
    assert calls == ([5] + [1] * 4) * 4  # one warm-up and three repeats


def test_interleaved():
    order = []
    arms = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert {k: len(v) for k, v in interleave(arms, 3).items()} == {"a": 3, "b": 3}
    assert order == ["a", "b"] * 4


def test_parameter_bytes_count_shared_storage_once(llama):
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert parameter_bytes(untied) - parameter_bytes(tied) == 257 * 32 * 4


def test_parameter_bytes_of_views():
    whole = torch.zeros(10, 10)
    module = nn.Module()
    module.a, module.b = nn.Parameter(whole[:5]), nn.Parameter(whole[5:])
    assert parameter_bytes(module) == 400


def test_peak_memory_sees_a_large_tensor():
    found = peak_memory(lambda: torch.ones(1 << 24).sum())
    if found is None:
        pytest.skip("the resident peak cannot be read here")
    assert 48 << 20 < found < 512 << 20


# -- linear layers ---------------------------------------------------------------------------------
def test_ranks_stay_within_the_budget():
    for o, i in BLOCK_1B:
        for keep in (0.7, 0.5, 0.3):
            rank = rank_for(o, i, keep)
            assert rank * (o + i) <= keep * o * i
            assert rank % 32 == 0
            assert (rank + 32) * (o + i) > keep * o * i
    assert rank_for(16, 16, 0.5) == 4  # too small for whole cache lines


def test_spared_layers_are_paid_for_by_the_others():
    ranks = ranks_for(BLOCK_1B, 0.5, align=1, width=1024)
    assert [r is None for r in ranks] == [False, True, True, False, False, False, False]
    total = sum(o * i for o, i in BLOCK_1B)
    stored = sum(o * i if r is None else r * (o + i) for (o, i), r in zip(BLOCK_1B, ranks))
    assert 0.49 * total < stored <= 0.5 * total


@pytest.mark.parametrize("layout", ["rows", "columns", "packed", "fused"])
def test_bytes_and_limits(layout):
    rows = measure_linears(
        ((64, 128), (128, 64)), (0.5,), layers=2, repeats=1, align=1, layout=layout
    )
    found = {row.name: row for row in rows}
    weights = 2 * 2 * 64 * 128
    rank = rank_for(64, 128, 0.5, 1)
    assert found["dense"].bytes == 4 * weights
    assert found["keep 0.5"].bytes == 4 * 4 * rank * (64 + 128)
    assert found["int8"].bytes == weights + 4 * 2 * (64 + 128)
    assert found["int4"].bytes == weights // 2 + 2 * 4 * weights // 64
    for row in rows:
        assert row.limit == found["dense"].bytes / row.bytes
        assert row.share == row.speedup / row.limit


def test_crossing():
    assert crossing({128: 0.5, 256: 0.9, 512: 1.1, 1024: 1.3}) == 512
    assert crossing({128: 1.2, 256: 0.9, 512: 1.1}) == 512
    assert crossing({128: 1.2, 256: 1.1}) == 128
    assert crossing({128: 0.2, 256: 0.3}) == 512


def test_small_layers_do_not_pay():
    assert faster_from(torch.bfloat16) >= faster_from(torch.float32)
    assert pays(2048, 2048, torch.bfloat16)
    assert not pays(192, 512)
    assert not pays(192, 512, fused=True)


@needs_compiler
def test_through_the_compiled_form_narrower_layers_pay():
    for dtype in (torch.float32, torch.bfloat16):
        width = faster_from(dtype, fused=True)
        assert width < faster_from(dtype)
        assert pays(width, width, dtype, fused=True)
        assert not pays(width, width, dtype)
        assert not pays(width - 1, width, dtype, fused=True)
    assert faster_from(torch.float16, fused=True) == faster_from(torch.float16)


def test_without_a_compiler_the_compiled_form_changes_nothing(monkeypatch):
    monkeypatch.setattr("rankine.evaluation.linears.missing", lambda: "none here")
    assert faster_from(torch.bfloat16, fused=True) == faster_from(torch.bfloat16)
    assert not pays(512, 512, torch.bfloat16, fused=True)


def test_the_widths_are_the_measured_ones():
    """What `factored_linears.py --widths` wrote is what plans are made with."""
    found = json.loads(WIDTHS.read_text())["widths, threads 1"]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        assert FASTER_FROM[dtype] == found[f"{name} rows"]["faster_from"]
        assert FUSED_FASTER_FROM[dtype] == found[f"{name} fused"]["faster_from"]


@needs_compiler
def test_decoding_is_timed_through_the_compiled_form_where_asked(llama, monkeypatch):
    model, seen = llama(), []
    monkeypatch.setattr(
        decoding, "fused_linear", lambda x, *rest: seen.append(x) or F.linear(x, *rest)
    )
    measure_latency({"dense": model}, 8, new_tokens=2, repeats=1, fused=True)
    assert seen
    seen.clear()
    measure_latency({"dense": model}, 8, new_tokens=2, repeats=1)
    assert not seen
