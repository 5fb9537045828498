"""A killed run goes on where it stopped; whatever is doubtful is done again."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from rankine.checkpoint import Journal
from rankine.errors import UserError
from rankine.metric import Metric
from rankine.patch import Patch
from rankine.structures import LowRank

FINGERPRINT = {"model": "a1", "data": "b2", "recipe": "c3", "threads": "1"}
LONG = "model.layers.0.self_attn.q_proj+" * 40

# Writes entries for ever, and is killed.
WRITER = """
import sys, torch
from rankine.checkpoint import Journal
journal = Journal.open(sys.argv[1], {"model": "a1", "data": "b2", "recipe": "c3", "threads": "1"})
for n in range(10**6):
    tensor = torch.full((2000,), float(n))
    journal.put("solve", str(n % 7), {"x": tensor, "y": tensor}, {"n": n})
    print(n, flush=True)
"""


@pytest.fixture
def journal(tmp_path):
    with Journal.open(tmp_path / "work", FINGERPRINT) as journal:
        yield journal


def test_what_was_put_is_got(journal):
    tensors = {"a": torch.randn(3, 4), "codes": torch.arange(5, dtype=torch.uint8)}
    journal.put("survey", LONG, tensors, {"count": 3})
    journal.put("survey", "other/unit", {}, {"count": 4})
    got, meta = journal.get("survey", LONG)
    assert meta == {"count": 3}
    assert all(torch.equal(got[k], tensors[k]) and got[k].dtype == tensors[k].dtype for k in got)
    assert journal.get("survey", "other/unit") == ({}, {"count": 4})
    assert journal.get("survey", "other_unit") is None
    assert journal.get("solve", LONG) is None


def test_a_patch_goes_in_and_comes_out(journal):
    structure = LowRank(3)
    patch = Patch.of("a.b", structure, structure.encode(torch.randn(6, 8), Metric()))
    journal.put_patch("solve", "a.b", patch | Patch(config={"tie_word_embeddings": False}))
    again = journal.get_patch("solve", "a.b")
    assert again.to_json()["config"] == {"tie_word_embeddings": False}
    assert again.modules == patch.modules
    assert all(torch.equal(again.tensors[n], t) for n, t in patch.tensors.items())
    assert journal.get_patch("solve", "none") is None


def test_shared_and_strided_tensors_are_taken(journal):
    base = torch.randn(4, 6)
    journal.put("s", "u", {"a": base.mT, "b": base[1:], "c": base})
    got, _ = journal.get("s", "u")
    assert torch.equal(got["a"], base.mT)
    assert torch.equal(got["b"], base[1:])


def entry_files(journal):
    (meta,) = journal.path.rglob("entries/*/*.json")
    (tensors,) = journal.path.rglob("entries/*/*.safetensors")
    return meta, tensors


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_a_damaged_entry_is_none(journal, suffix, harm):
    journal.put("solve", "u", {"x": torch.arange(100.0)}, {"rank": 111})
    file = next(f for f in entry_files(journal) if f.suffix == suffix)
    data = bytearray(file.read_bytes())
    place = data.find(b"111") if suffix == ".json" else len(data) - 9
    data[place] ^= 1
    spoiled = {"flip": data, "cut": data[: len(data) // 2], "empty": b""}
    file.unlink() if harm == "gone" else file.write_bytes(spoiled[harm])
    assert journal.get("solve", "u") is None
    journal.put("solve", "u", {"x": torch.arange(3.0)})
    assert journal.get("solve", "u") is not None


def test_a_changed_fingerprint_names_what_changed(tmp_path):
    with Journal.open(tmp_path, FINGERPRINT) as journal:
        journal.put("solve", "u", {"x": torch.ones(1)})
    changed = {**FINGERPRINT, "data": "other", "versions": "new"}
    with pytest.raises(UserError, match="found that data and versions changed") as caught:
        Journal.open(tmp_path, changed)
    assert "--fresh" in str(caught.value)
    with Journal.open(tmp_path, FINGERPRINT) as journal:
        assert journal.get("solve", "u") is not None
    with Journal.open(tmp_path, changed, fresh=True) as journal:
        assert journal.get("solve", "u") is None


def test_an_entry_of_other_work_is_none(tmp_path):
    """Copied by hand from another work directory, say."""
    for name, model in (("one", "a"), ("two", "b")):
        with Journal.open(tmp_path / name, {"model": model}) as journal:
            journal.put("solve", "u", {"x": torch.ones(1)})
    os.rename(tmp_path / "one" / "entries", tmp_path / "kept")
    os.rename(tmp_path / "two" / "entries", tmp_path / "one" / "entries")
    with Journal.open(tmp_path / "one", {"model": "a"}) as journal:
        assert journal.get("solve", "u") is None


def test_two_runs_do_not_share_a_directory(journal):
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        Journal.open(journal.path, FINGERPRINT)
    journal.close()
    Journal.open(journal.path, FINGERPRINT).close()


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        Journal.open(tmp_path, FINGERPRINT, fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{", "{}", '{"fingerprint": 5}', '{"fingerprint": ["model"]}'])
def test_a_damaged_head_asks_for_fresh(text, tmp_path):
    Journal.open(tmp_path, FINGERPRINT).close()
    (tmp_path / "journal.json").write_text(text)
    with pytest.raises(UserError, match="--fresh"):
        Journal.open(tmp_path, FINGERPRINT)
    Journal.open(tmp_path, FINGERPRINT, fresh=True).close()
    assert json.loads((tmp_path / "journal.json").read_text())["fingerprint"] == FINGERPRINT


@pytest.mark.process
@pytest.mark.slow
def test_killed_in_the_middle_every_entry_is_whole_or_none(tmp_path, fresh_environment):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path],
        env=fresh_environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in writer.stdout:
        if int(line) == 20:
            break
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    whole = 0
    with Journal.open(tmp_path, FINGERPRINT) as journal:
        for unit in range(7):
            found = journal.get("solve", str(unit))
            if found is not None:
                tensors, meta = found
                assert torch.equal(tensors["x"], torch.full((2000,), float(meta["n"])))
                whole += 1
    assert whole >= 6


def test_a_finished_run_removes_its_own_things_alone(tmp_path):
    """The work directory may be the user's: what else lies in it stays, and so does it."""
    (tmp_path / "work").mkdir()
    with Journal.open(tmp_path / "work", FINGERPRINT) as journal:
        journal.put("survey", "in-0", {"h": torch.eye(2)})
        (journal.scratch / "half").write_bytes(b"x")
        (tmp_path / "work" / "notes.txt").write_text("mine")
        journal.remove()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes.txt"]


def test_what_a_killed_run_left_in_scratch_goes_with_the_next(tmp_path):
    with Journal.open(tmp_path / "work", FINGERPRINT) as journal:
        (journal.scratch / "half").write_bytes(b"x")
        journal.put("survey", "in-0", {"h": torch.eye(2)})
    with Journal.open(tmp_path / "work", FINGERPRINT) as journal:
        assert journal.get("survey", "in-0") is not None
        assert not list(journal.scratch.iterdir())


def test_a_forgotten_entry_is_gone(tmp_path):
    with Journal.open(tmp_path / "work", FINGERPRINT) as journal:
        journal.put("survey", "in-0", {"h": torch.eye(2)})
        journal.forget("survey", "in-0")
        journal.forget("survey", "in-0")
        assert journal.get("survey", "in-0") is None
