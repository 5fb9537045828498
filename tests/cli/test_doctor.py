"""`rankine doctor`: what is here, and whether it works."""

import json
import os
import shutil

import pytest
from packaging.requirements import Requirement

from rankine import doctor


@pytest.fixture(scope="module")
def examined():
    """The whole examination, once."""
    return doctor.examine()


def test_a_working_installation_has_no_problems(examined):
    assert examined["problems"] == []
    assert examined["self_test"]["bytes_after"] < examined["self_test"]["bytes_before"]
    text = "\n".join(doctor.lines(examined))
    for part in ("torch", "cores", "available", "free", "self-test  passed", "extra      onnx"):
        assert part in text


def test_what_it_says_of_the_machine(examined):
    import torch

    assert examined["device"]["torch_threads"] == torch.get_num_threads()
    assert examined["threads"]["cores"] == len(os.sched_getaffinity(0))
    assert 0 < examined["memory"]["available"] <= examined["memory"]["total"]
    free = shutil.disk_usage(os.getcwd()).free
    assert examined["disk"]["here"]["free"] == pytest.approx(free, rel=0.1)
    assert json.loads(json.dumps(examined)) == examined


def test_the_limit_of_a_container_is_read(tmp_path, monkeypatch):
    (tmp_path / "max").write_text("1000000\n")
    (tmp_path / "now").write_text("400000\n")
    files = ((str(tmp_path / "max"), str(tmp_path / "now")),)
    monkeypatch.setattr("rankine.engine.memory.CGROUPS", files)
    found = doctor.memory()
    assert (found["limit"], found["available"]) == (1_000_000, 600_000)
    (tmp_path / "max").write_text("max\n")
    assert doctor.memory()["limit"] is None


def test_what_is_missing_or_old_is_named_with_the_command_that_helps(rankine, monkeypatch):
    needed = ["torch>=99", "no-such-package-here>=1", 'no-such-either; extra == "onnx"']
    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement(text) for text in needed])
    monkeypatch.setattr(doctor, "self_test", lambda: 1 / 0)
    ran = rankine("doctor", "--json")
    assert ran.code == 3
    assert "torch: expected >=99, found 2" in ran.sentence
    assert "no-such-package-here: expected >=1, found none" in ran.sentence
    assert "self-test: ZeroDivisionError" in ran.sentence
    found = json.loads(ran.out)
    assert (found["schema"], found["verb"]) == (1, "doctor")
    extra = found["extras"]["onnx"]
    assert extra["missing"] == ["no-such-either"]
    assert extra["install"] == 'pip install "rankine[onnx]"'
