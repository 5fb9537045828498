"""The bare loop: the same bytes by seed and after a kill; hooks where they belong."""

import copy

import pytest
import torch
from torch import nn
from training_models import batches, compressed, task_of, token_loss

from rankine.checkpoint import Journal
from rankine.errors import UserError
from rankine.method import Learner, Schedule
from rankine.patch import Patch
from rankine.structures import LowRank
from rankine.tasks import FunctionTask
from rankine.training.feed import Feed
from rankine.training.heal import Healing, LoraHealing
from rankine.training.loop import train, warmup_cosine

SCHEDULE = Schedule(10, 3e-3, weight_decay=0.01)
LEARNERS = {"factors": Healing, "lora": LoraHealing}


class KilledError(Exception):
    pass


def killed_at(last):
    def progress(stage, done, total):
        if done == last:
            raise KilledError

    return progress


def journal_in(place):
    return Journal.open(place, {"model": "tiny"})


@pytest.fixture
def student(dense):
    return compressed(dense, [LowRank(4)])


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_killed_run_goes_on_to_the_same_bytes(student, task, learner, tmp_path):
    model, patch = student
    whole, losses = train(copy.deepcopy(model), task, LEARNERS[learner](patch), SCHEDULE, seed=3)
    with journal_in(tmp_path / "work") as journal:
        for last in (3, 7):  # killed twice; 18 batches a pass: the data starts over in between
            with pytest.raises(KilledError):
                train(
                    copy.deepcopy(model),
                    task,
                    LEARNERS[learner](patch),
                    SCHEDULE,
                    seed=3,
                    journal=journal,
                    every=0,
                    progress=killed_at(last),
                )
        seen = []
        resumed, again = train(
            copy.deepcopy(model),
            task,
            LEARNERS[learner](patch),
            SCHEDULE,
            seed=3,
            journal=journal,
            progress=lambda stage, done, total: seen.append(done),
        )
    assert seen == [7, 8, 9, 10]  # the entry before the kill was of step 6
    assert again == losses
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(t, resumed.tensors[name]) for name, t in whole.tensors.items())


def test_a_finished_run_is_not_trained_again(student, task, tmp_path):
    model, patch = student
    with journal_in(tmp_path / "work") as journal:
        first, _ = train(copy.deepcopy(model), task, Healing(patch), SCHEDULE, journal=journal)
        never = killed_at(1)
        second, _ = train(
            copy.deepcopy(model), task, Healing(patch), SCHEDULE, journal=journal, progress=never
        )
    assert all(torch.equal(t, second.tensors[name]) for name, t in first.tensors.items())


def test_a_resumed_run_knows_its_data_again(student, task, tmp_path):
    model, patch = student
    with journal_in(tmp_path / "work") as journal:
        with pytest.raises(KilledError):
            train(
                copy.deepcopy(model),
                task,
                Healing(patch),
                SCHEDULE,
                journal=journal,
                every=0,
                progress=killed_at(5),
            )
        other = task_of(train_seed=77)
        with pytest.raises(UserError, match="--fresh"):
            train(model, other, Healing(patch), SCHEDULE, journal=journal)


def test_the_seed_decides_the_result_and_nothing_else_is_drawn_from(student, task):
    model, patch = student
    state = torch.get_rng_state()
    runs = [
        train(copy.deepcopy(model), task, LoraHealing(patch), SCHEDULE, seed=seed)[0].tensors
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, runs[1][name]) for name, t in runs[0].items())
    assert any(not torch.equal(t, runs[2][name]) for name, t in runs[0].items())


def test_several_batches_per_step_are_one_large_batch(student):
    model, patch = student
    rows = batches(32, 5, size=32)
    halves = batches(32, 5, size=16)
    one = task_of()
    one._sources["train"] = rows
    two = task_of()
    two._sources["train"] = halves
    short = Schedule(2, 1e-3)
    a, _ = train(copy.deepcopy(model), one, Healing(patch), short)
    b, _ = train(copy.deepcopy(model), two, Healing(patch), short, batches_per_step=2)
    for name, tensor in a.tensors.items():
        torch.testing.assert_close(b.tensors[name], tensor, atol=2e-5, rtol=1e-3)


def test_the_learners_verbs_come_in_their_order(student, task):
    model, _ = student
    calls = []

    class Shrinking(Learner):
        """Trains one factor towards zero, and halves it after each step."""

        def prepare(self, model, task):
            model.requires_grad_(False)
            self.factor = model.model.layers[0].mlp.up_proj.up.weight.requires_grad_(True)
            calls.append("prepare")

        def step_begin(self, model, step):
            calls.append("begin")

        def penalty(self, model):
            calls.append("penalty")
            return self.factor.square().sum()

        def gradients_ready(self, model, step):
            calls.append("gradients")
            assert self.factor.grad is not None

        def step_end(self, model, optimizer, step):
            calls.append("end")
            with torch.no_grad():
                self.factor.mul_(0.5)

        def finish(self, model, budget):
            calls.append("finish")
            return Patch(tensors={"factor": self.factor.detach()})

    size = float(model.model.layers[0].mlp.up_proj.up.weight.detach().norm())
    found, losses = train(model, task, Shrinking(), Schedule(2, 1e-3))
    step = ["begin", "penalty", "gradients", "end"]
    assert calls == ["prepare", *step, *step, "finish"]
    assert float(found.tensors["factor"].norm()) < 0.3 * size
    assert len(losses) == 2


def test_learners_state_and_moving_buffers_are_resumed(tmp_path):
    class Counting(Learner):
        count = 0

        def prepare(self, model, task):
            model.train()

        def step_end(self, model, optimizer, step):
            self.count += 1

        def finish(self, model, budget):
            return Patch(tensors={"count": torch.tensor(self.count)})

        def state_dict(self):
            return {"count": torch.tensor(self.count)}

        def load_state_dict(self, state):
            self.count = int(state["count"])

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            torch.nn.Linear(4, 4),
            torch.nn.BatchNorm1d(4),
            torch.nn.Dropout(),
            torch.nn.Linear(4, 1),
        )

    data = list(torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(1)))
    task = FunctionTask(data, loss=lambda y, x: (y - x.sum(1, keepdim=True)) ** 2, train=data)
    whole = build()
    train(whole, task, Counting(), SCHEDULE)
    with journal_in(tmp_path / "work") as journal:
        with pytest.raises(KilledError):
            train(
                build(), task, Counting(), SCHEDULE, journal=journal, every=0, progress=killed_at(6)
            )
        resumed = build()
        found, _ = train(resumed, task, Counting(), SCHEDULE, journal=journal)
    assert int(found.tensors["count"]) == SCHEDULE.steps
    states = zip(whole.state_dict().items(), resumed.state_dict().values())
    for (name, one), other in states:
        assert torch.equal(one, other), name


def test_a_loss_that_explodes_and_no_data_are_one_sentence(student):
    model, patch = student
    with pytest.raises(UserError, match="finite loss"):
        train(model, task_of(loss=lambda *a: token_loss(*a) / 0), Healing(patch), SCHEDULE)
    with pytest.raises(UserError, match="training data"):
        next(Feed(FunctionTask(batches(16, 1))))


def test_batches_of_any_shape_are_known_again():
    """Numbers without dimensions, and nothing at all."""
    parts = {"x": torch.ones(2, 3), "weight": torch.tensor(0.5), "none": torch.zeros(0)}
    found = [Feed(FunctionTask(train=[{**parts, "weight": torch.tensor(w)}])) for w in (0.5, 0.25)]
    for feed in found:
        next(feed)
    assert found[0].digest != found[1].digest
    again = Feed(FunctionTask(train=[parts]))
    again.skip_to(1, found[0].digest)
    assert FunctionTask([parts]).fingerprint() != FunctionTask([]).fingerprint()


def test_the_schedule_warms_up_and_ends_at_its_floor():
    shares = [warmup_cosine(step, 100, 0.1, 0.2) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] == 1.0
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert shares[-1] == pytest.approx(0.2, abs=1e-3)
