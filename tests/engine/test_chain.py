"""Stages compose: what one method leaves is what the next one takes."""

import json

import pytest
import torch

import rankine
import tiny_models as tiny
from rankine.checkpoint import patch_of
from rankine.engine.parts import with_parts
from rankine.engine.run import cast
from rankine.errors import UserError
from rankine.patch import stored_bits
from rankine.structures import LowRank, Quantized

LOW_RANK = {"method": "svd_llm", "keep": 0.5}
CODES = {"method": "rtn", "set": {"code_bits": 8, "group": 16}}


def bf16(model):
    return cast(model, torch.bfloat16)


def compress(model, *stages, **more):
    return rankine.compress(model, stages=stages, task=tiny.tokens(), evaluate=False, **more)


def logits(model):
    with torch.no_grad():
        return model(tiny.ids()).logits


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.qwen2])
def test_codes_of_the_factors(build, tmp_path):
    """The second stage finds `down` and `up` by itself; the checkpoint holds both stages."""
    model, first = bf16(build()), bf16(build())
    compress(first, LOW_RANK)
    result = compress(model, LOW_RANK, CODES)
    outer = {p: s for p, s in result.patch.modules.items() if isinstance(s, LowRank)}
    inner = {p: s for p, s in result.patch.modules.items() if isinstance(s, Quantized)}
    assert set(inner) == {f"{p}.{part}" for p in outer for part in ("down", "up")}
    close = logits(first).float(), logits(model).float()
    assert float((close[0] - close[1]).norm() / close[0].norm()) < 0.05
    rankine.save(model, tmp_path / "out", result.patch)
    again = rankine.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    for path in outer:
        bias = getattr(build().get_submodule(path), "bias", None)
        ours = model.get_submodule(path).bias
        assert (bias is None) == (ours is None)
        assert bias is None or torch.equal(ours, bias.bfloat16())


def test_a_chain_is_written_checked_and_reported(tmp_path):
    """`output=` reopens what it wrote: bits of nested structures, finite outputs, the report."""
    result = compress(bf16(tiny.llama()), LOW_RANK, CODES, output=tmp_path / "out")
    again = rankine.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(result.model))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["result"]["method"] == "svd_llm → rtn"
    assert report["budget"]["size"] is None or report["budget"]["size"] > 0
    assert {entry["structure"]["kind"] for entry in report["targets"]} >= {"low_rank", "quantized"}
    assert not (tmp_path / "out.rankine-work").exists()  # a finished run has nothing to resume


def test_keep_refers_to_the_original_model():
    result = compress(bf16(tiny.llama()), LOW_RANK, CODES)
    paths = [w.path for t in result.stages[0].targets for w in t.weights]
    stored = sum(stored_bits(result.model, path) for path in paths)
    dense = sum(p.numel() for n, p in tiny.llama().named_parameters() if n[:-7] in paths)
    measured = stored / (16 * dense)
    assert result.report["budget"]["keep"] == pytest.approx(measured)
    # half of the numbers, at 8 bits and a scale and a minimum per 16 (or fewer) of them
    assert 0.25 < measured < 0.5 * (8 + 32 / 6) / 16


def test_globs_name_the_parts():
    """A factored weight's own name stands for its parts; so one glob serves all stages."""
    result = compress(bf16(tiny.llama()), LOW_RANK, CODES, include="*.q_proj")
    q = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert set(result.patch.modules) == {p + part for p in q for part in ("", ".down", ".up")}
    model = bf16(tiny.llama())
    first = compress(model, LOW_RANK)
    standing = set(patch_of(model).modules)
    second = compress(model, CODES, include=("*.down_proj.up", "*.q_proj.*"))
    wanted = {f"model.layers.{n}.mlp.down_proj.up" for n in (0, 1)}
    wanted |= {f"model.layers.{n}.self_attn.q_proj.{p}" for n in (0, 1) for p in ("down", "up")}
    assert set(second.patch.modules) - standing == wanted
    assert isinstance(first.patch, type(second.patch))


def test_a_stage_on_a_saved_checkpoint(tmp_path):
    """The second stage in another run, on the directory of the first: the same function."""
    model = bf16(tiny.llama())
    first = compress(model, LOW_RANK)
    rankine.save(model, tmp_path / "one", first.patch)
    opened = rankine.load(tmp_path / "one")
    second = compress(opened, CODES)
    both = first.patch | second.patch
    rankine.save(opened, tmp_path / "two", both)
    chained = compress(bf16(tiny.llama()), LOW_RANK, CODES)
    again = rankine.load(tmp_path / "two")
    assert torch.equal(logits(again), logits(opened))
    assert torch.equal(logits(again), logits(chained.model))


def test_parts_of_a_step_read_what_the_step_read():
    model = tiny.llama()
    result = compress(model, LOW_RANK)
    run_order = with_parts(result.stages[0].run.anatomy, model).blocks[0].steps
    names = [[w.path.rpartition("layers.0.")[2] for w in step] for step in run_order]
    assert names[0] == [f"self_attn.{n}_proj.down" for n in "qkv"]
    assert names[1] == [f"self_attn.{n}_proj.up" for n in "qkv"]
    assert {w.reads for w in run_order[0]} == {"model.layers.0.self_attn.q_proj"}
    assert all(w.reads == w.path for w in run_order[1])
    rank = model.model.layers[0].self_attn.q_proj.structure.rank
    assert run_order[0][0].shape == (rank, 32)


def test_a_chain_that_cannot_work_fails_before_any_work():
    model = tiny.llama()
    model.forward = lambda *a, **k: pytest.fail("the model was run")
    with pytest.raises(UserError, match="svd cannot follow a quantization stage"):
        rankine.plan(model, stages=[CODES, {"method": "svd", "keep": 0.5}])


def test_a_chain_resumes_in_its_second_stage(tmp_path):
    whole = compress(bf16(tiny.llama()), LOW_RANK, CODES)
    seen = []

    def interrupt(stage, done, total):
        seen.append(stage)
        if stage == "solve" and total == 28 and done == 9:
            raise KeyboardInterrupt

    work = str(tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        compress(bf16(tiny.llama()), LOW_RANK, CODES, work=work, progress=interrupt)
    resumed = compress(bf16(tiny.llama()), LOW_RANK, CODES, work=work)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_codes_of_a_shared_basis(tmp_path):
    """Each layer gets codes of its own for it; to replace it in one layer alone is refused."""
    model = bf16(tiny.llama())
    result = compress(model, {"method": "basis_sharing", "keep": 0.5}, CODES)
    assert not result.patch.tied
    rankine.save(model, tmp_path / "out", result.patch)
    assert torch.equal(logits(rankine.load(tmp_path / "out")), logits(model))

    model = bf16(tiny.llama())
    first = compress(model, {"method": "basis_sharing", "keep": 0.5})
    assert first.patch.tied
    with pytest.raises(UserError, match=r"q_proj\.down, which share one matrix"):
        compress(model, CODES, exclude="*.1.self_attn.q_proj.down")
