"""A user's own loader, forward, loss and metric."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rankine.errors import UserError
from rankine.tasks import FunctionTask, Task


def pairs(n=3):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 5, generator=generator), torch.randn(4, 2, generator=generator))
        for _ in range(n)
    ]


def squared(outputs, batch):
    return F.mse_loss(outputs, batch[1], reduction="none")


def test_ten_lines_are_a_task():
    model = nn.Linear(5, 2)
    task = FunctionTask(pairs(), loss=squared, evaluation=pairs(2))
    assert isinstance(task, Task)
    batch = next(iter(task.batches("calibration")))
    outputs = task.run(model, batch)
    expected = (model(batch[0]) - batch[1]).square().mean(1)
    torch.testing.assert_close(task.loss(outputs, batch), expected)
    whole = torch.cat([(model(x) - y).square().mean(1) for x, y in pairs(2)]).mean()
    assert task.score(model)["loss"] == pytest.approx(whole.item(), rel=1e-6)


def test_own_parts_are_used():
    task = FunctionTask(
        [{"x": torch.ones(2, 3)}],
        forward=lambda model, batch: model(batch["x"]) * 2,
        evaluate=lambda model: {"auc": torch.tensor(0.5)},
        mask=lambda batch: batch["x"] > 0,
    )
    batch = next(iter(task.batches("calibration")))
    assert torch.equal(task.run(nn.Identity(), batch), torch.full((2, 3), 2.0))
    assert task.score(nn.Identity()) == {"auc": 0.5}
    assert task.mask(batch).all()


def test_a_generator_serves_every_walk():
    task = FunctionTask(x for x in pairs())
    first, second = list(task.batches("calibration")), list(task.batches("calibration"))
    assert len(first) == len(second) == 3
    assert all(a is b for a, b in zip(first, second))


def test_mappings_are_keyword_arguments():
    class Model(nn.Module):
        def forward(self, left, right):
            return left - right

    batch = {"left": torch.ones(2), "right": torch.zeros(2)}
    assert torch.equal(FunctionTask([batch]).run(Model(), batch), torch.ones(2))


def test_fingerprint_sees_every_value():
    a, b = pairs(), pairs()
    assert FunctionTask(a).fingerprint() == FunctionTask(b).fingerprint()
    b[2][1][3, 1] += 1
    assert FunctionTask(a).fingerprint() != FunctionTask(b).fingerprint()
    bits = [torch.zeros(2, dtype=torch.bfloat16)]
    assert FunctionTask(bits).fingerprint() != FunctionTask([torch.zeros(4)]).fingerprint()


def test_mistakes():
    with pytest.raises(UserError, match="expected calibration batches"):
        FunctionTask([]).batches("calibration")
    with pytest.raises(UserError, match="pass loss="):
        FunctionTask(pairs()).loss(torch.zeros(4, 2), pairs()[0])
    with pytest.raises(UserError, match="reduction"):
        FunctionTask(pairs(), loss=lambda o, b: o.mean()).loss(torch.zeros(4, 2), pairs()[0])
    with pytest.raises(UserError, match="unknown split"):
        FunctionTask(pairs()).batches("validation")
