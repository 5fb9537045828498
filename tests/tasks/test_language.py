"""Language modelling: disjoint seeded splits, losses per window."""

import pytest
import torch

from rankine.errors import UserError
from rankine.tasks import LanguageModelling, Task, context_length, language, parse_tokens


@pytest.fixture
def task(tokenizer, lines):
    return LanguageModelling(tokenizer, lines, lines[:50], sequences=8, length=32, window=32)


def rows(windows):
    return {tuple(row) for row in windows.ids_nt.tolist()}


def test_is_a_task(task):
    assert isinstance(task, Task)


def test_calibration_is_drawn_by_seed(tokenizer, lines, task):
    def sample(seed):
        return LanguageModelling(tokenizer, lines, [], sequences=8, length=32, seed=seed)

    assert task.windows("calibration").ids_nt.shape == (8, 32)
    assert sample(0).fingerprint() == task.fingerprint()
    assert sample(1).fingerprint() != task.fingerprint()
    assert len(rows(task.windows("calibration"))) == 8


def test_splits_of_one_source_are_disjoint(tokenizer, lines):
    task = LanguageModelling(tokenizer, lines, None, sequences=8, length=32)
    calibration, evaluation = rows(task.windows("calibration")), rows(task.windows("evaluation"))
    train = rows(task.windows("train"))
    assert len(calibration) == len(evaluation) == 8
    assert not calibration & evaluation
    assert not train & (calibration | evaluation)
    everything = LanguageModelling(tokenizer, lines, None, sequences=10_000, length=32)
    whole = rows(everything.windows("calibration")) | rows(everything.windows("evaluation"))
    assert calibration | evaluation | train == whole


def test_the_same_file_for_both_is_split(tokenizer, lines, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    task = LanguageModelling(tokenizer, path, str(path), sequences=8, length=32)
    assert not rows(task.windows("calibration")) & rows(task.windows("evaluation"))


def test_the_same_list_for_both_is_split(tokenizer, lines):
    task = LanguageModelling(tokenizer, lines, lines, sequences=8, length=32)
    assert not rows(task.windows("calibration")) & rows(task.windows("evaluation"))


def test_what_is_evaluated_on_is_not_trained_on(tokenizer, lines):
    other = lines[:200]
    with pytest.raises(UserError, match="other text to train on"):
        LanguageModelling(tokenizer, lines, other, other, sequences=8, length=32)
    LanguageModelling(tokenizer, lines, "embedded", "embedded")  # has splits of its own


def test_a_sample_of_a_stream_reads_only_its_start(tokenizer, lines):
    read = []

    class Endless:
        def __iter__(self):
            for n in range(10**9):
                read.append(n)
                yield lines[n % 400]

    task = LanguageModelling(tokenizer, Endless(), lines, sequences=4, length=32)
    assert len(task.windows("calibration")) == 4
    assert len(read) < 400
    batches = iter(task.batches("train"))
    language_batch = next(batches)
    assert language_batch["input_ids"].shape[1] == 32


def test_batches_cover_the_windows_in_order(tokenizer, lines):
    task = LanguageModelling(tokenizer, lines, lines, sequences=7, length=32, batch_size=3)
    batches = list(task.batches("calibration"))
    assert [len(b["input_ids"]) for b in batches] == [3, 3, 1]
    found = torch.cat([b["input_ids"] for b in batches])
    assert torch.equal(found, task.windows("calibration").ids_nt)


def test_training_order_is_seeded_and_complete(tokenizer, lines, monkeypatch):
    monkeypatch.setattr(language, "SHUFFLE", 16)

    def order(seed):
        task = LanguageModelling(
            tokenizer, lines, lines, lines[:200], sequences=1, length=32, seed=seed
        )
        return task.windows("train").ids_nt

    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    assert sorted(order(0).tolist()) == sorted(order(1).tolist())


def test_loss_is_the_mean_over_a_window(task, model):
    batch = next(iter(task.batches("calibration")))
    outputs = task.run(model, batch)
    losses = task.loss(outputs, batch)
    assert losses.shape == (8,)
    assert losses.dtype == torch.float64
    log_p = outputs.logits[:, :-1].double().log_softmax(-1)
    expected = -log_p.gather(-1, batch["input_ids"][:, 1:, None]).mean((1, 2))
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    losses.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad(set_to_none=True)


def test_padding_neither_counts_nor_changes_anything(tokenizer, lines, model):
    task = LanguageModelling(tokenizer, lines, lines[:3], sequences=2, length=32, window=32)
    windows = task.windows("evaluation")
    short = int(windows.length_n[-1])
    assert 2 <= short < 32
    together = windows.batch()
    alone = windows[-1:].batch()
    assert task.mask(together).sum(1).tolist() == windows.length_n.tolist()
    assert task.mask(alone).all()
    with torch.no_grad():
        a = task.loss(task.run(model, together), together)[-1:]
        b = task.loss(task.run(model, alone), alone)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_bf16_logits_are_read_in_float32(task, model):
    batch = next(iter(task.batches("calibration")))
    logits = task.run(model, batch).logits.detach()
    exact = task.loss(logits.bfloat16().float(), batch)
    assert torch.equal(task.loss(logits.bfloat16(), batch), exact)


def test_score(task, model):
    score = task.score(model)
    figures = {"perplexity", "perplexity_interval", "bits_per_byte", "accuracy", "tokens"}
    assert set(score) == figures
    low, high = score["perplexity_interval"]
    assert low < score["perplexity"] < high
    assert score["perplexity"] == pytest.approx(400, rel=0.3)  # random weights: about uniform


def test_length_is_clamped_to_the_context(tokenizer, lines, model):
    assert context_length(model.config) == 64
    task = LanguageModelling(tokenizer, lines, lines, sequences=2, context=64)
    assert task.windows("calibration").ids_nt.shape == (2, 64)
    assert task.windows("evaluation").ids_nt.shape[1] == 64


def test_fewer_sequences_than_asked_are_noted(tokenizer, lines):
    task = LanguageModelling(tokenizer, lines[:20], lines, sequences=1000, length=32)
    assert "sequences of 32 tokens, not 1000" in task.notes[0]
    assert LanguageModelling(tokenizer, lines, lines, sequences=2, length=32).notes == []


def test_too_little_text(tokenizer, lines):
    with pytest.raises(UserError, match=r"at least 32 tokens .* found 2"):
        LanguageModelling(tokenizer, ["a"], lines, length=32).windows("calibration")
    with pytest.raises(UserError, match="another text for evaluation"):
        LanguageModelling(tokenizer, lines[:2], None, length=32).windows("calibration")
    task = LanguageModelling(tokenizer, lines[:20], lines, sequences=1000, length=32)
    with pytest.raises(UserError, match="beyond the calibration sample"):
        task.windows("train")
    with pytest.raises(UserError, match="unknown split"):
        list(LanguageModelling(tokenizer, lines, lines).batches("test"))


def test_parse_tokens():
    assert parse_tokens("128x2048") == (128, 2048)
    for wrong in ("128", "0x2048", "4x1", "axb", "1x2x3", ""):
        with pytest.raises(UserError, match="128x2048"):
            parse_tokens(wrong)
