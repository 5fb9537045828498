"""Arms of a comparison share one survey, and nothing but time is won by it."""

import pytest
import torch

import rankine
import tiny_models as tiny
from rankine.engine.run import cast


def bf16(model):
    return cast(model, torch.bfloat16)


def compared(seen, output=None, **asked):
    """Progress of the survey, arm by arm, in `seen`."""

    def progress(stage, done, total):
        if stage.endswith(", survey"):
            seen[-1] += 1
        elif stage.endswith(", bids") and done == total:
            seen.append(0)

    seen.append(0)
    fields = {"keep": [0.8, 0.5], "task": tiny.tokens(), "evaluate": False, **asked}
    rankine.compare(bf16(tiny.llama()), output=output, progress=progress, **fields)
    seen.pop()


def test_equal_needs_are_measured_once(tmp_path):
    seen = []
    compared(seen, methods=["kfac_svd"], output=tmp_path / "arms")
    assert seen[0] > 0
    assert seen[1] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"arms"}  # nothing is left beside it


def test_other_needs_are_measured_for_themselves():
    seen = []
    compared(seen, methods=["kfac_svd", "auto"], keep=[0.5])  # other positions count
    assert min(seen) > 0


def test_the_same_bytes_as_alone(tmp_path):
    asked = {"task": tiny.tokens(), "evaluate": False}
    compared([], methods=["kfac_svd"], output=tmp_path / "arms")
    model = bf16(tiny.llama())
    rankine.compress(model, method="kfac_svd", keep=0.5, output=tmp_path / "alone", **asked)
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("arms/kfac_svd-0.5", "alone")
    )
    assert one == other


def test_a_killed_comparison_finds_its_survey_and_other_text_does_not(tmp_path):
    work = str(tmp_path / "work")

    def killed(stage, done, total):
        if stage.endswith(", bids"):
            raise KeyboardInterrupt

    def surveyed(task, **more):
        seen = []
        compared(seen, methods=["kfac_svd"], keep=[0.5], work=work, task=task, **more)
        return seen[0] > 0

    def kill(task):
        with pytest.raises(KeyboardInterrupt):
            rankine.compare(
                bf16(tiny.llama()),
                methods=["kfac_svd"],
                keep=[0.5],
                work=work,
                task=task,
                evaluate=False,
                fresh=True,
                progress=killed,
            )

    kill(tiny.tokens())
    assert not surveyed(tiny.tokens())
    kill(tiny.tokens())
    assert surveyed(tiny.tokens(2, 4), fresh=True)
