"""No network unless a hub id is given, and none at all with HF_HUB_OFFLINE."""

from __future__ import annotations

import socket
from contextlib import suppress

import pytest


class ReachedError(Exception):
    """Somebody asked for the network."""


@pytest.fixture
def reached(monkeypatch) -> list:
    """Hosts that somebody tried to reach; nobody does. huggingface_hub believes to be online."""
    import datasets
    import huggingface_hub.constants

    asked: list = []

    def refuse(*address, **_):
        asked.append(address)
        raise ReachedError  # no OSError: those are tried again, for half a minute

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def offline(monkeypatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_the_witness_sees_the_hub(reached, rankine):
    """What the other tests rest on: a hub id would be noticed."""
    with suppress(ReachedError):
        rankine("plan", "someone/never-existed", "--method", "svd", "--keep", "0.5")
    assert reached


def test_local_work_asks_nobody(reached, tiny, directory, small, rankine, tmp_path):
    (directory / "README.md").write_text("---\nbase_model: someone/else\n---\n")
    out = tmp_path / "out"
    for arguments in (
        ["plan", tiny, "--method", "svd_llm", "--keep", "0.7", *small],
        ["compress", tiny, "--method", "svd_llm", "--keep", "0.7", *small, "-o", out],
        ["inspect", out],
        ["generate", directory, "-p", "x", "--max-tokens", "2"],
        ["export", directory, "-o", tmp_path / "dense"],
    ):
        ran = rankine(*arguments)
        assert ran.code == 0, ran.err
    assert reached == []


def test_names_in_a_checkpoint_are_not_fetched(reached, directory, rankine):
    """An adapter's base model, a tokenizer's home: only what the user typed is."""
    (directory / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}'
    )
    (directory / "config.json").write_text(
        (directory / "config.json").read_text().replace("{", '{"_name_or_path": "someone/else",', 1)
    )
    for name in directory.glob("tokenizer*"):
        name.unlink()
    assert rankine("inspect", directory).code == 0
    assert rankine("generate", directory, "-p", "x").code == 2
    assert reached == []


@pytest.mark.parametrize("what", ["model", "teacher", "data"])
def test_offline_is_obeyed_in_a_sentence(
    what, reached, monkeypatch, tiny, compressed, small, refused, tmp_path
):
    offline(monkeypatch)
    reached.clear()
    out = ["-o", tmp_path / "out"]
    hub = "someone/never-existed"
    method = ["--method", "svd_llm", "--keep", "0.7", "--tokens", "4x32"]
    run = {
        "model": ["compress", hub, *method, *out],
        "teacher": ["heal", compressed, "--teacher", hub, *small[2:6], *out],
        "data": ["compress", tiny, *method, "--calibration", hub, *out],
    }[what]
    sentence = refused(*run)
    assert hub in sentence
    assert "offline" in sentence.lower()
    assert reached == []
    assert not (tmp_path / "out").exists()
