"""Weights in pickles: refused; allowed, their tensors are read and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rankine as library
from rankine.limits import allowing_pickles, pickles_allowed


@pytest.fixture
def pickled(tiny, tmp_path) -> Path:
    """`tiny` as torch.save would have left it years ago."""
    copy = shutil.copytree(tiny, tmp_path / "model")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    (copy / "LICENSE").write_text("A licence")
    return copy


def in_shards(directory: Path) -> None:
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    (directory / "pytorch_model.bin").unlink()
    names, places = sorted(tensors), {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in some}, directory / file)
        places |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def other_name(directory: Path) -> None:
    (directory / "pytorch_model.bin").rename(directory / "weights.pt")
    torch.save([1, 2], directory / "training_args.bin")


def inside_a_dictionary(directory: Path) -> None:
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    torch.save({"state_dict": tensors, "epoch": 3}, directory / "pytorch_model.bin")


def old_format(directory: Path) -> None:
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    file = directory / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "how", [None, in_shards, other_name, inside_a_dictionary, old_format],
    ids=lambda f: getattr(f, "__name__", "one file"),
)  # fmt: skip
def test_refused_unless_allowed_and_then_the_same_model(how, pickled, tiny):
    if how is not None:
        how(pickled)
    with pytest.raises(library.UserError, match="--allow-pickle takes the tensors in it"):
        library.load(pickled)
    model, same = library.load(pickled, allow_pickle=True), library.load(tiny)
    assert model.state_dict().keys() == same.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))
    assert not pickles_allowed()


def test_on_the_command_line(pickled, small, rankine, refused, tmp_path):
    run = ["compress", pickled, "--method", "svd", "--keep", "0.7", *small, "-o", tmp_path / "out"]
    assert "pytorch_model.bin" in refused(*run)
    assert not (tmp_path / "out").exists()
    assert rankine(*run, "--evaluate", "no", "--allow-pickle").code == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "A licence"
    assert rankine("generate", tmp_path / "out", "-p", "x", "--max-tokens", "1").code == 0
    assert sorted(file.name for file in pickled.glob("*.safetensors")) == []


def test_export_and_inspect_take_the_option_too(pickled, rankine, refused, tmp_path):
    for run in (["inspect", pickled], ["export", pickled, "-o", tmp_path / "dense"]):
        assert "--allow-pickle" in refused(*run)
        ran = rankine(*run, "--allow-pickle")
        assert ran.code == 0, ran.err
    assert str(pickled) in rankine("inspect", pickled, "--allow-pickle").out
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    assert not pickles_allowed()


def test_safetensors_beside_pickles_are_what_is_read(pickled, tiny):
    shutil.copy(tiny / "model.safetensors", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"whatever")
    assert library.load(pickled).num_parameters() == library.load(tiny).num_parameters()


def test_an_index_of_pickles_that_were_left_behind_is_no_reason(pickled, tiny):
    """As the hub has it for many models, and a download without *.bin leaves it."""
    in_shards(pickled)
    for file in pickled.glob("*.bin"):
        file.unlink()
    shutil.copy(tiny / "model.safetensors", pickled)
    assert library.load(pickled).num_parameters() == library.load(tiny).num_parameters()


class Runs:
    """Unpickled, it makes a directory."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def huge() -> dict[str, torch.Tensor]:
    """One number, seen as 10¹⁸ of them."""
    return {"a": torch.zeros(1).expand(10**9, 10**9)}


HOSTILE = {
    "code": lambda file: file.write_bytes(pickle.dumps({"a": Runs()})),
    "code in torch": lambda file: torch.save({"a": Runs()}, file),
    "stride of zero": lambda file: torch.save(huge(), file),
    "no tensors": lambda file: torch.save({"a": "text"}, file),
    "a list": lambda file: torch.save([torch.zeros(1)], file),
    "nothing": lambda file: torch.save({}, file),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "noise": lambda file: file.write_bytes(b"\x80\x02" + bytes(range(256)) * 9),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_state_dict_is_one_sentence(what, pickled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HOSTILE[what](pickled / "pytorch_model.bin")
    with pytest.raises(library.UserError, match="expected") as caught:
        library.load(pickled, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../out.bin", "/etc/passwd", "x.py", 5])
def test_the_index_of_pickles_stays_inside(name, pickled):
    places = {"weight_map": {"a": name}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(places))
    with pytest.raises(library.UserError, match="names of"):
        library.load(pickled, allow_pickle=True)


def test_permission_ends_with_its_block():
    with allowing_pickles(True):
        with allowing_pickles(False):
            assert pickles_allowed()  # whoever called allowed it
        assert pickles_allowed()
    assert not pickles_allowed()
