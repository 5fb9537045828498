"""The verb, and healing as a stage of a chain: files, rows, refusals."""

import copy
import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch
from training_models import compressed, counting, llama, task_of

import byte_models
import rankine
from rankine.checkpoint import load, save
from rankine.engine.healed import OPTIONS, command
from rankine.errors import AcceptanceError, UserError
from rankine.recipe import Recipe
from rankine.structures import LowRank

KNOBS = {"steps": 20, "lr": 5e-3}


def logits(model):
    with torch.no_grad():
        return model(counting(4, 9)).logits


@pytest.fixture
def pair(dense, tmp_path):
    """(teacher's directory, compressed directory)."""
    student, patch = compressed(dense, [LowRank(4)])
    save(dense, tmp_path / "dense")
    save(student, tmp_path / "small", patch)
    return str(tmp_path / "dense"), str(tmp_path / "small")


def test_the_healed_directory_is_an_ordinary_checkpoint_with_an_honest_table(pair, task, tmp_path):
    teacher, small = pair
    result = rankine.heal(small, teacher=teacher, task=task, output=tmp_path / "healed", **KNOBS)
    rows = result.report["rows"]
    assert [row["kind"] for row in rows] == ["dense", "result", "result"]
    dense, before, after = (row["loss"] for row in rows)
    assert dense < after < before
    assert rows[1]["bytes"] == rows[2]["bytes"]
    assert rows[1]["keep"] == rows[2]["keep"]
    assert (tmp_path / "healed" / "report.html").is_file()
    healed = load(tmp_path / "healed")
    assert torch.equal(logits(healed), logits(result.model))
    assert task.score(healed)["loss"] == pytest.approx(after)
    assert not (tmp_path / "healed.rankine-work").exists()
    assert "healed" in result.table()


def test_without_a_teacher_the_text_alone_heals(pair, task, tmp_path):
    result = rankine.heal(pair[1], task=task, **KNOBS)
    before, after = (row["loss"] for row in result.report["rows"])
    assert after < before


def test_refused_in_memory_the_model_is_as_it_was(dense, task):
    student, patch = compressed(dense, [LowRank(4)])
    before = {name: t.clone() for name, t in student.state_dict().items()}
    config = dict(vars(student.config))
    with pytest.raises(AcceptanceError):
        rankine.heal(student, patch=patch, task=task, accept="loss<0", **KNOBS)
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert vars(student.config) == config


def test_a_killed_heal_goes_on(pair, task, tmp_path, monkeypatch):
    from rankine.training import loop

    monkeypatch.setattr(loop.train, "__kwdefaults__", {**loop.train.__kwdefaults__, "every": 0.0})
    teacher, small = pair
    asked = {"teacher": teacher, "task": task, **KNOBS}
    rankine.heal(small, output=tmp_path / "whole", **asked)

    class KilledError(Exception):
        pass

    def progress(stage, done, total):
        if stage == "heal" and done == 12:
            raise KilledError

    with pytest.raises(KilledError):
        rankine.heal(small, output=tmp_path / "killed", progress=progress, **asked)
    seen = []
    rankine.heal(
        small,
        output=tmp_path / "killed",
        progress=lambda stage, done, total: seen.append((stage, done)),
        **asked,
    )
    assert next(done for stage, done in seen if stage == "heal") == 12
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_command_of_the_report_has_the_options_of_the_verb(tmp_path):
    """No more of them, and none where an object was given that no option can name."""
    import typer

    from rankine.cli.app import app

    options = {p.name for p in typer.main.get_command(app).commands["heal"].params}
    elsewhere = {"model", "named_model", "teacher", "data", "mode", "adapter", "set", "help"}
    places = {"work", "fresh", "force", "output", "json"}
    assert options - elsewhere - places == OPTIONS
    recipe = Recipe.of(model="small", calibration="a b.txt", accept=("loss<3", "keep<0.7"))
    said = command(recipe, {"mode": "lora", "teacher": "big", "lr": 0.1}, True, tmp_path)
    assert said == (
        "rankine heal small --data 'a b.txt' --teacher big --mode lora --accept 'loss<3' "
        f"--accept 'keep<0.7' --set lr=0.1 --adapter -o {tmp_path}"
    )
    assert command(recipe, {}, False, None) is None
    assert command(Recipe.of(loss=lambda out, batch: out), {}, False, tmp_path) is None
    assert command(Recipe.of(include="*.q"), {}, False, tmp_path) is None


def test_an_adapter_folder_belongs_to_the_compressed_model(pair, task, tmp_path):
    from peft import PeftModel

    teacher, small = pair
    result = rankine.heal(
        small,
        teacher=teacher,
        task=task,
        output=tmp_path / "adapter",
        adapter=True,
        mode="lora",
        **KNOBS,
    )
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    applied = PeftModel.from_pretrained(load(small), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(applied), logits(result.model), atol=1e-5, rtol=1e-4)


def test_a_module_is_healed_in_place(dense, task):
    student, patch = compressed(dense, [LowRank(4)])
    before = task.score(student)["loss"]
    result = rankine.heal(student, teacher=dense, task=task, patch=patch, **KNOBS)
    assert result.model is student
    assert task.score(student)["loss"] < before


def test_a_chain_ends_in_healing_with_its_own_input_as_teacher(dense, task, tmp_path):
    save(dense, tmp_path / "dense")
    stages = [{"method": "svd", "keep": 0.3}, {"method": "heal", "set": KNOBS}]
    asked = {"task": task, "dtype": "bfloat16"}
    plain = rankine.compress(str(tmp_path / "dense"), method="svd", keep=0.3, **asked)
    chain = rankine.compress(
        str(tmp_path / "dense"), stages=stages, output=tmp_path / "out", **asked
    )
    assert chain.report["result"]["method"] == "svd → heal"
    assert chain.report["budget"]["keep"] == plain.report["budget"]["keep"]
    assert chain.report["rows"][-1]["loss"] < plain.report["rows"][-1]["loss"]
    healed = load(tmp_path / "out")
    assert torch.equal(logits(healed), logits(chain.model))
    assert rankine.plan(dense, stages=stages).method == "svd → heal"


def test_codes_inside_factors_are_healed_and_stored_as_they_count(dense, task, tmp_path):
    cut = [{"method": "svd", "keep": 0.6}, {"method": "rtn", "set": {"code_bits": 3}}]
    heal = {"method": "heal", "set": {"steps": 20, "lr": 5e-3}}
    asked = {"task": task, "dtype": "bfloat16", "force": True, "output": tmp_path / "out"}
    losses = [
        rankine.compress(copy.deepcopy(dense), stages=stages, **asked).report["rows"][-1]["loss"]
        for stages in (cut, [*cut, heal])
    ]
    assert losses[1] < losses[0]


def test_an_earlier_reports_baselines_stay_while_the_teacher_is_the_same_model(
    dense, task, tmp_path
):
    save(dense, tmp_path / "dense")
    asked = {"task": task, "eval_tokens": 99}
    rankine.compress(
        str(tmp_path / "dense"), method="svd", keep=0.3, output=tmp_path / "small", **asked
    )
    few = {**asked, "steps": 2, "lr": 1e-3}
    result = rankine.heal(tmp_path / "small", teacher=tmp_path / "dense", **few)
    names = [row["name"] for row in result.report["rows"]]
    assert names[0] == "dense (teacher)"
    assert [n.endswith("(plain)") for n in names[1:]] == [True, True, False, False]
    assert names[-1] == names[-2] + " healed"
    assert result.report["targets"]  # what stands where is still told
    other = rankine.heal(tmp_path / "small", teacher=llama(), **few).report["rows"]
    assert [row["kind"] for row in other] == ["dense", "result", "result"]


def test_what_cannot_work_is_one_sentence(pair, dense, task, tmp_path):
    teacher, small = pair
    other = llama(vocab_size=40)
    with pytest.raises(UserError, match="40 against 32 tokens"):
        rankine.heal(small, teacher=other, task=task, **KNOBS)
    with pytest.raises(UserError, match="did you mean"):
        rankine.heal(small, task=task, step=4)
    with pytest.raises(UserError, match="mode lora"):
        rankine.heal(small, task=task, adapter=True)
    with pytest.raises(UserError, match="to heal"):
        rankine.heal(task=task)
    with pytest.raises(UserError, match="rankine heal"):
        rankine.compress(copy.deepcopy(dense), method="heal", task=task)
    with pytest.raises(UserError, match="new output"):
        rankine.heal(small, task=task, output=tmp_path / "small")
    with pytest.raises(UserError, match="factors to train"):
        rankine.heal(teacher, task=task_of(), **KNOBS)


def test_a_strangers_report_beside_the_model(pair, task):
    """What it says is taken over where it says something."""
    report = Path(pair[1], "report.json")
    report.write_text('{"schema": "1.0", "model": {}, "rows": [{}, {"kind": "result", "name": 5}]}')
    healed = rankine.heal(pair[1], task=task, steps=1)
    assert healed.report["rows"][-1]["name"] == "5 healed"
    assert healed.report["model"]["family"] == "llama"
    report.write_text('{"schema": "1.0", "model": {}, "rows": 5}')
    with pytest.raises(UserError, match='a list in "rows" of the report'):
        rankine.heal(pair[1], task=task, steps=1)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A directory with a model, its tokenizer, and a text file."""
    place = tmp_path_factory.mktemp("spoken")
    save(llama(vocab_size=257), place / "dense", tokenizer=byte_models.tokenizer())
    lines = "".join(f"total_{n} = total_{n - 1} + {n * n}\n" for n in range(600))
    (place / "text.txt").write_text(lines)
    return place


def test_a_text_file_heals_and_its_held_out_windows_score(spoken, tmp_path):
    text = str(spoken / "text.txt")
    asked = {"evaluation": text, "eval_tokens": 512, "tokens": "64x32"}
    small = tmp_path / "small"
    cut = {"method": "svd", "keep": 0.5, "calibration": text, "evaluate": False}
    rankine.compress(str(spoken / "dense"), output=small, **cut, **asked)
    result = rankine.heal(small, data=text, lr=1e-2, output=tmp_path / "healed", **asked)
    before, after = (row["perplexity"] for row in result.report["rows"][-2:])
    assert after < before
    assert result.report["healing"]["steps"] == 8
    assert result.report["recipe"]["tokens"] == "64x32"
    assert result.report["recipe"]["set"] == {"steps": 8, "lr": 1e-2}
    assert result.report["healing"]["recipe_before"]["method"] == "svd"
    words = shlex.split(result.report["command"])
    assert words[:5] == ["rankine", "heal", str(small), "--data", text]
    assert words[-2:] == ["-o", str(tmp_path / "healed")]
    pairs = list(itertools.pairwise(words))
    assert {("--tokens", "64x32"), ("--eval-tokens", "512"), ("--set", "lr=0.01")} <= set(pairs)
    compressed_report = json.loads((small / "report.json").read_text())
    assert set(compressed_report) - {"plan"} <= set(result.report)
    assert "`rankine heal` with these settings" in (tmp_path / "healed" / "README.md").read_text()
    assert result.report["samples"][0]["after"] is not None
    assert load(tmp_path / "healed").config.vocab_size == 257


def test_a_teacher_with_other_tokens_of_the_same_number_is_refused(spoken, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(spoken / "dense", other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="other tokens"):
        rankine.heal(
            str(spoken / "dense"), teacher=str(other), data=str(spoken / "text.txt"), mode="all"
        )
