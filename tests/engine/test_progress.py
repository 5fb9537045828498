"""Whatever takes long counts its units, measuring before and after included."""

import pytest
import torch

import byte_models
import rankine
import tiny_models as tiny
from rankine.progress import concerning, counted, heard, named, quiet
from rankine.tasks import FunctionTask


class Heard:
    """Every call, by stage."""

    def __init__(self):
        self.stages = {}

    def __call__(self, stage, done, total):
        self.stages.setdefault(stage, []).append((done, total))


def test_each_item_is_a_unit():
    ear = Heard()
    with heard(ear), concerning("dense"):
        assert list(counted("abc", "score")) == ["a", "b", "c"]
        assert list(counted("", "nothing")) == []
    assert ear.stages == {"score dense": [(0, 3), (1, 3), (2, 3), (3, 3)]}
    assert list(counted("ab", "unheard")) == ["a", "b"]
    assert len(ear.stages) == 1


def test_the_listener_goes_with_the_context():
    ear = Heard()
    with pytest.raises(ZeroDivisionError), heard(ear):
        raise ZeroDivisionError
    list(counted("a", "after"))
    named("svd 0.8", ear)("survey", 1, 2)
    assert ear.stages == {"svd 0.8, survey": [(1, 2)]}
    assert quiet("survey", 1, 2) is None


def ends(stages):
    """Stages whose last call says that all is done."""
    return {name for name, calls in stages.items() if calls[-1][0] == calls[-1][1]}


MEASURED = {"score dense", "score int8 (plain)", "score int4 (plain)", "speed", "score result"}


def test_a_language_model_is_counted_from_end_to_end(stages_of):
    """A bar for each long part; each ends."""
    stages = stages_of(method="asvd", keep=0.8)
    assert {*MEASURED, "read", "int8", "int4", "survey", "probes", "bids", "samples"} <= set(stages)
    assert ends(stages) == set(stages)


@pytest.fixture
def stages_of(tmp_path):
    """The stages of a small compression of a tiny Llama on the command line's own terms."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def add_{n}(a, b): return a + {n} * b" for n in range(300)))
    data = {"calibration": str(text), "evaluation": str(text), "tokens": "4x32"}

    def run(**asked):
        ear = Heard()
        place = str(byte_models.write(tmp_path / "tiny"))
        fields = {**data, "eval_tokens": 200, **asked}
        rankine.compress(place, output=tmp_path / "out", progress=ear, **fields)
        return ear.stages

    return run


def test_a_users_own_figures_are_counted():
    batches = list(torch.randn(6, 4, 12))
    ear = Heard()
    task = FunctionTask(batches, loss=lambda out, _: out.square().mean(1), evaluation=batches)
    fields = {"method": "svd", "keep": 0.8}
    rankine.compress(tiny.mlp(), task=task, progress=ear, **fields)
    assert ear.stages["score dense"] == [(n, 6) for n in range(7)]
    ear = Heard()
    rankine.compress(tiny.mlp(), evaluate=lambda model: {"one": 1}, progress=ear, **fields)
    assert ear.stages["evaluate result"] == [(0, 1), (1, 1)]
