"""Ranks that measure a part of the data each find what one process finds in all of it."""

import pytest
import torch
from surveys import GRADIENTS, INPUTS, Spool, close

import tiny_models as tiny
from forked import on_ranks
from rankine.anatomy import describe
from rankine.modules import expose
from rankine.ranks import Group, joined
from rankine.statistics import InputMagnitude, Lookups, Walk, WeightFisher, survey

EVERYTHING = {INPUTS, GRADIENTS, InputMagnitude(), WeightFisher()}
MODELS = {
    "llama": (tiny.llama, lambda: tiny.tokens(count=6, batch=2), EVERYTHING),
    "mixtral": (tiny.mixtral, lambda: tiny.tokens(count=6, batch=2), {INPUTS, GRADIENTS}),
    "mlp": (tiny.mlp, tiny.regression, EVERYTHING),  # walked as one block
}


def spooled(name, group):
    """Everything that is measured, by unit and key; the first rank keeps it."""
    make, task_of, needs = MODELS[name]
    model, task = make().double().requires_grad_(False), task_of()
    expose(model)
    anatomy, spool = describe(model), Spool()
    wanted = {w.path: frozenset(needs) for w in anatomy.linears}
    wanted |= {w.path: frozenset({Lookups()}) for w in anatomy.weights if w.operator == "embedding"}
    walk = Walk(model, anatomy, task, list(task.batches("calibration")), group=group)
    survey(walk, wanted, spool.get, spool.keep)
    return {(unit, key): t for unit, found in spool.items() for key, t in found.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [2, 4])  # three batches: the fourth rank has none
def test_the_same_statistics(name, size, tmp_path):
    def work(rank):
        with joined(120) as group:
            return spooled(name, group)

    alone = spooled(name, Group())
    first, *others = on_ranks(size, tmp_path, work)
    assert others == [{}] * (size - 1)
    assert first.keys() == alone.keys()
    for key, tensor in alone.items():
        assert close(first[key].double(), tensor.double(), 1e-12), key


def test_sums_are_the_same_bits_on_every_rank(tmp_path):
    def work(rank):
        torch.manual_seed(rank)
        with joined(120) as group:
            return group.sum(torch.randn(33, 7).double(), None, torch.ones(rank).double())

    found = on_ranks(3, tmp_path, work)
    draws = [torch.manual_seed(rank) and torch.randn(33, 7).double() for rank in range(3)]
    for whole, nothing, ragged in found:
        assert torch.equal(whole, found[0][0])
        assert close(whole, sum(draws), 1e-14)
        assert nothing is None
        assert ragged.tolist() == [2.0, 1.0]
