"""Moments of stacked experts, held against the model run as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import surveys
import torch

import tiny_models as tiny
from rankine.anatomy import describe
from rankine.metric import Gram, Metric
from rankine.modules import expose
from rankine.statistics import InputMoment, OutputGradient, Walk, as_walked, survey
from rankine.statistics.banks import BankGradientSum, BankSum, routed, routed_gradients
from rankine.statistics.moments import clip_rows, middle_positions
from rankine.structures import LowRank
from rankine.structures.bank import Routing

BANKS = [
    f"model.layers.{block}.mlp.experts.{name}_bank"
    for block in (0, 1)
    for name in ("gate_up", "down")
]


def plain(model: Any, task: Any) -> tuple[dict[str, list[Any]], dict[str, list[Any]], float]:
    """Each bank's (rows, routing, mask) and (gradients, routing, mask) by batch, from one backward
    pass through the whole model; the number of loss terms."""
    read: dict[str, list[Any]] = {path: [] for path in BANKS}
    wrote: dict[str, list[Any]] = {path: [] for path in BANKS}
    outputs: list[tuple[str, torch.Tensor, Routing]] = []
    terms = 0.0

    def watch(path: str) -> Any:
        def hook(module: Any, args: Any, out: torch.Tensor) -> None:
            read[path].append((args[0].detach(), args[1], mask))
            out.retain_grad()
            outputs.append((path, out, args[1]))

        return hook

    handles = [model.get_submodule(p).register_forward_hook(watch(p)) for p in BANKS]
    for batch in task.batches("calibration"):
        mask = task.mask(batch).reshape(-1)
        loss, count = task.loss(task.run(model, batch), batch), task.terms(batch)
        (loss * count).sum().backward()
        terms += float(count.sum())
        for path, out, routing in outputs:
            wrote[path].append((out.grad, routing, mask))
        outputs.clear()
    for handle in handles:
        handle.remove()
    return read, wrote, terms


def by_expert(found: list[Any], expert: int) -> torch.Tensor:
    """The rows of one expert that are no padding."""
    rows = []
    for x, routing, mask in found:
        start = sum(routing.counts[:expert])
        here = slice(start, start + routing.counts[expert])
        rows.append(x[here][mask[routing.tokens_s[here]]])
    return torch.cat(rows).double()


def test_each_expert_is_measured_on_the_rows_that_reach_it():
    model, task = expose(tiny.mixtral()), tiny.tokens(padded=True)
    need = OutputGradient()
    batches = list(task.batches("calibration"))
    anatomy = as_walked(describe(model), model, task, batches[0])
    assert len(anatomy.blocks) == 2
    spool = surveys.Spool()
    needs = {path: frozenset({InputMoment(), need}) for path in BANKS}
    found = survey(Walk(model, anatomy, task, batches), needs, spool.get, spool.keep)
    read, wrote, terms = plain(model, task)
    for path in BANKS:
        weight = anatomy.weight(path)
        inputs, gradients = found.inputs(weight), found.gradient(weight, need)
        total = sum(len(by_expert(read[path], e)) for e in range(4))
        assert inputs.count == total
        for e in range(4):
            x, g = by_expert(read[path], e), by_expert(wrote[path], e)
            torch.testing.assert_close(inputs.h_nn[e], x.mT @ x / total)
            torch.testing.assert_close(
                gradients.h_nn[e], g.mT @ g / len(g) * (total / terms), rtol=1e-4, atol=1e-9
            )


def test_a_banks_loss_is_the_sum_over_its_experts():
    """One curve for all experts, in the metric of each."""
    g = tiny.seeded(3)
    w = torch.randn(4, 6, 5, generator=g, dtype=torch.float64)
    moments = torch.randn(4, 5, 20, generator=g, dtype=torch.float64)
    h = moments @ moments.mT
    together = LowRank(1).curve(w, Metric(Gram(h)), torch.float16)
    apart = [LowRank(1).curve(w[e], Metric(Gram(h[e])), torch.float16) for e in range(4)]
    for n, option in enumerate(together):
        assert option.loss == pytest.approx(sum(one[n].loss for one in apart))
        assert option.bits == sum(one[n].bits for one in apart)


def test_an_expert_that_saw_nothing_weighs_as_one_average_row():
    x = torch.randn(30, 4, generator=tiny.seeded(1))
    total = BankSum()
    total.add([x, x[:0]])
    moment = total.mean()
    power = float(x.double().square().sum() / (30 * 4))
    torch.testing.assert_close(moment.h_nn[1], power / 30 * torch.eye(4).double())
    torch.testing.assert_close(moment.h_nn[0], (x.double().mT @ x.double()) / 30)
    gradient = BankGradientSum()
    gradient.add([x[:10], x[:0]])
    assert torch.isfinite(gradient.mean().h_nn).all()
    with pytest.raises(ValueError, match="no positions"):
        BankSum().mean()


def test_sums_do_not_depend_on_the_batches():
    x = torch.randn(24, 4, generator=tiny.seeded(2))
    whole, parts = BankSum(), BankSum()
    whole.add([x[:12], x[12:]])
    parts.add([x[6:12], x[18:]])
    parts.add([x[:6], x[12:18]])
    torch.testing.assert_close(whole.mean().h_nn, parts.mean().h_nn)


def test_one_expert_is_clipped_and_cut_as_a_plain_layer_is():
    """Rows in any order: the same positions survive, at the same lengths."""
    g = torch.randn(3, 8, 5, generator=tiny.seeded(4)) * torch.logspace(-2, 2, 24).view(3, 8, 1)
    mask = torch.arange(8) < torch.tensor([[8], [5], [6]])
    order = torch.randperm(24, generator=tiny.seeded(5))
    routing = Routing([24], order, 24)
    need = OutputGradient(middle=0.5, clip=2.0)
    (rows,) = routed_gradients(g.reshape(24, 5)[order], routing, mask, need)
    wanted = clip_rows(g, mask, 2.0)[middle_positions(mask, 0.5)]
    torch.testing.assert_close(rows.mT @ rows, wanted.mT @ wanted)
    assert len(rows) == len(wanted) < int(mask.sum())


def test_a_mask_of_another_size_takes_nothing_out():
    x = torch.randn(6, 2)
    routing = Routing([4, 2], torch.tensor([0, 1, 2, 0, 1, 2]), 3)
    assert [len(r) for r in routed(x, routing, None)] == [4, 2]
    assert [len(r) for r in routed(x, routing, torch.ones(7, dtype=torch.bool))] == [4, 2]
    kept = routed(x, routing, torch.tensor([True, False, True]))
    assert torch.equal(torch.cat(kept), x[[0, 2, 3, 5]])
