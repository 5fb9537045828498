"""The trained model, once per session."""

import copy

import pytest
from training_models import llama, task_of

from rankine.method import Schedule
from rankine.patch import Patch
from rankine.training.heal import Healing
from rankine.training.loop import train


@pytest.fixture(scope="session")
def task():
    return task_of()


@pytest.fixture(scope="session")
def trained(task):
    """The dense model, trained for a second; nobody may change it."""
    model = llama()
    train(model, task, Healing(Patch(), everything=True), Schedule(80, 1e-2))
    return model


@pytest.fixture
def dense(trained):
    return copy.deepcopy(trained)
