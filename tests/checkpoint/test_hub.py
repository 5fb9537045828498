"""A hub id in the local cache is a directory like any other; nobody is asked for it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import byte_models
import rankine
from rankine.checkpoint import hub
from rankine.errors import UserError

ID, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    place = byte_models.write(tmp_path_factory.mktemp("models") / "tiny")
    (place / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    return place


@pytest.fixture
def snapshot(model, tmp_path, monkeypatch) -> Path:
    """A hub cache as huggingface_hub lays it out: blobs, a reference, links to the blobs."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    home = tmp_path / "cache" / "models--someone--tiny"
    place = home / "snapshots" / COMMIT
    for part in (home / "blobs", home / "refs", place):
        part.mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for file in model.iterdir():
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (place / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return place


@pytest.fixture
def asked(tmp_path) -> dict:
    text = str(tmp_path / "text.txt")
    Path(text).write_text("\n".join(f"def add_{n}(a, b): return a + {n} * b" for n in range(300)))
    fields = {"method": "svd", "keep": 0.6, "tokens": "4x32", "eval_tokens": 200}
    return {**fields, "calibration": text, "evaluation": text}


def test_it_is_loaded_planned_inspected_and_exported(snapshot, model, asked, tmp_path):
    loaded, same = rankine.load(ID), rankine.load(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), same.parameters()))
    assert rankine.plan(ID, **asked).bytes_before == rankine.plan(str(model), **asked).bytes_before
    assert rankine.inspect(ID)["architecture"] == "LlamaForCausalLM"
    assert rankine.export(ID, tmp_path / "dense").joinpath("tokenizer.json").is_file()
    (row,) = rankine.evaluate(ID, evaluation=asked["evaluation"], eval_tokens=200)["rows"]
    assert (row["name"], row["bytes"]) == (ID, (model / "model.safetensors").stat().st_size)


@pytest.mark.parametrize("memory", [None, "1KB"], ids=["in memory", "from the disk"])
def test_it_is_compressed_as_a_directory_is(memory, snapshot, model, asked, tmp_path):
    """Same tensors; what does not fit stays in the cache's files. The card says what it is of."""
    result = rankine.compress(ID, output=tmp_path / "hub", memory=memory, **asked)
    rankine.compress(str(model), output=tmp_path / "directory", evaluate=False, **asked)
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("hub", "directory")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert result.report["model"]["name"] == ID
    assert any("from the disk" in warning for warning in result.report["warnings"]) is bool(memory)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"base_model: {ID}" in card
    assert "license: mit" in card
    assert COMMIT not in card


def test_its_headers_are_checked(snapshot):
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(UserError, match="of the sizes that its"):
        rankine.load(ID)


def test_links_lead_to_the_blobs_and_nowhere_else(snapshot, tmp_path):
    (snapshot / "notes.txt").symlink_to(tmp_path)
    (snapshot / "secret.txt").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"secret\.txt, a link to another place"):
        rankine.load(ID)


def test_a_half_downloaded_one_is_none(snapshot):
    """A shard is missing: that is not in the cache; offline this is one sentence."""
    tensors = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    shard = "model-00001-of-00002.safetensors"
    save_file(tensors, snapshot / shard)
    places = {"a": shard, "b": "model-00002-of-00002.safetensors"}
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert hub.cached(ID) is None
    with pytest.raises(UserError, match="no such files"):
        rankine.load(ID)


@pytest.mark.parametrize("spec", ["someone/else", "no such name", "a--b", "x" * 200])
def test_what_is_not_there_is_one_sentence_offline(spec, snapshot, asked, tmp_path):
    for verb in (
        lambda: rankine.load(spec),
        lambda: rankine.compress(spec, output=tmp_path / "out", **asked),
        lambda: rankine.plan(spec, **asked),
        lambda: rankine.inspect(spec),
    ):
        with pytest.raises(UserError, match=r"expected .*hub id") as caught:
            verb()
        assert spec in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_pickles_are_refused_there_too(snapshot, model):
    torch.save(load_file(model / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--allow-pickle"):
        rankine.load(ID)
    assert rankine.load(ID, allow_pickle=True) is not None


def test_only_a_models_own_files_are_asked_for(monkeypatch, tmp_path, model):
    """No code, no other programs' weights, no folders; pickles only where they are allowed."""
    from huggingface_hub.utils import filter_repo_objects

    from rankine.limits import allowing_pickles

    there = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "LICENSE.txt"]
    others = ["modeling_evil.py", "onnx/model.safetensors", "consolidated.safetensors", "tf.h5"]
    asked = []

    def download(spec, *, local_files_only=False, allow_patterns=None, ignore_patterns=None):
        if local_files_only:
            raise FileNotFoundError
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        asked.append(list(filter_repo_objects([*there, *others, "pytorch_model.bin"], **patterns)))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.fetched(ID) == model
    with allowing_pickles(True):
        hub.fetched(ID)
    hub.described(ID)
    light = [name for name in there if not name.endswith(".safetensors")]
    assert asked == [there, [*there, "pytorch_model.bin"], light]


def test_a_plan_downloads_no_weights(snapshot, asked):
    """It does with the config and the tokenizer, whose weights are not in the cache."""
    (snapshot / "model.safetensors").unlink()
    assert hub.cached(ID) is None
    assert rankine.plan(ID, **asked).targets == 14
    with pytest.raises(UserError, match="no such files"):
        rankine.load(ID)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/c/models--someone--tiny/snapshots/0ab", "someone/tiny"),
        ("/c/models--gpt2/snapshots/0ab", "gpt2"),
        ("/c/models--a-b--c-d.e/snapshots/0ab", "a-b/c-d.e"),
        ("/c/models/tiny", None),
    ],
)
def test_a_snapshot_knows_its_id(path, found):
    assert hub.id_of(Path(path)) == found
