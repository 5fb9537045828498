"""Block refinement: the compressed block is trained to give the dense block's output from the
compressed stream's input (AA-SVD 2604.02119 §block refinement). Gradients never leave the block.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from rankine.anatomy import Block
from rankine.method import Refine
from rankine.metric import Gram
from rankine.statistics import Walk
from rankine.training.loop import warmup_cosine


def refine_block(
    walk: Walk,
    block: Block,
    targets: list[Tensor],
    settings: Refine,
    generator: torch.Generator,
    outputs: Gram | None = None,
) -> dict[str, Tensor]:
    """Full name → trained value of every floating parameter of the block in `walk.model`.

    `targets`: the dense block's output per batch. `outputs`: the metric the error is measured in
    (output-gradient moment); None is the paper's mean squared error. Never returns weights worse
    than it was given: the epoch with the least error on the calibration data wins.
    """
    module = walk.module(block)
    parameters = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    root_nn = None if outputs is None else outputs.right(torch.eye(targets[0].shape[-1])).float()
    scale = _power(targets, walk, root_nn)

    def error(n: int) -> Tensor:
        difference = walk.rows(n, walk.forward(block, n, walk.hidden[n]) - targets[n])
        weighted = difference if root_nn is None else difference @ root_nn.to(difference)
        return weighted.square().sum(-1).mean() / scale

    def total() -> float:
        with torch.no_grad():
            return sum(float(error(n)) for n in range(len(walk.hidden)))

    best, best_error = _copies(parameters), total()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * len(walk.hidden)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, steps, settings.warmup, settings.floor)
    )
    try:
        for _ in range(settings.epochs):
            seen = 0.0
            for n in torch.randperm(len(walk.hidden), generator=generator).tolist():
                with torch.enable_grad():
                    loss = error(n)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
                optimizer.step()
                schedule.step()
                seen += float(loss.detach())
            if seen < best_error:  # the running error is an upper estimate of the epoch's end
                best_now = total()
                if best_now < best_error:
                    best, best_error = _copies(parameters), best_now
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    prefix = block.path + "." if block.path else ""
    return {prefix + name: value for name, value in best.items()}


def _power(targets: list[Tensor], walk: Walk, root_nn: Tensor | None) -> float:
    """Mean squared (weighted) norm of the targets: makes the error relative."""
    total, count = 0.0, 0
    for n, target in enumerate(targets):
        rows = walk.rows(n, target)
        weighted = rows if root_nn is None else rows @ root_nn.to(rows)
        total += float(weighted.double().square().sum())
        count += rows.shape[0]
    return max(total / max(count, 1), 1e-30)


def _copies(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: copy.deepcopy(p.detach()) for name, p in parameters.items()}
