"""The bare loop that drives any Learner: AdamW, warm-up and cosine, gradient clipping; a run that
was killed goes on from its journal and gives the same bytes.

The parameters that a learner leaves trainable are the float32 masters; where the rest of the model
is 16-bit, the forward pass runs under autocast. Losses are means over the terms of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankine.budget import Budget
from rankine.checkpoint import Journal
from rankine.errors import UserError
from rankine.method import Learner, Schedule
from rankine.patch import Patch
from rankine.progress import Progress
from rankine.tasks import Task
from rankine.training.feed import Feed

STAGE = "train"
#: Seconds between two journal entries: they cost three times the trained parameters in bytes.
EVERY = 60.0
#: What torch's AdamW keeps per parameter.
ADAMW = ("step", "exp_avg", "exp_avg_sq")


def train(
    model: nn.Module,
    task: Task,
    learner: Learner,
    schedule: Schedule,
    *,
    budget: Budget | None = None,
    batches_per_step: int = 1,
    seed: int = 0,
    journal: Journal | None = None,
    unit: str = "model",
    every: float = EVERY,
    progress: Progress | None = None,
) -> tuple[Patch, list[float]]:
    """Train `model` in place; returns what the learner made of it and the loss of each step.

    Each step takes `batches_per_step` batches of the task's "train" split, which starts over when
    it is through. With a `journal`, its entry `unit` is resumed and renewed every `every` seconds.
    torch's global generators are seeded inside and left as they were. Raises UserError when there
    is nothing to train on or with, when the loss is not finite, and when the data of an
    interrupted run changed.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        learner.prepare(model, task)
        run = _Run(model, learner, optimizer_for(model, schedule), Feed(task))
        if journal is not None:
            run.resume(journal, unit)
        saved = time.monotonic()
        for step in range(len(run.losses), schedule.steps):
            run.losses.append(_step(run, task, schedule, step, batches_per_step))
            if progress is not None:
                progress(unit, step + 1, schedule.steps)
            due = time.monotonic() - saved >= every or step + 1 == schedule.steps
            if journal is not None and due:
                run.keep(journal, unit)
                saved = time.monotonic()
        patch = learner.finish(model, budget)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return patch, run.losses


def optimizer_for(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over every parameter that requires a gradient; vectors do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("expected something to train, found no parameter that the method leaves")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.lr)


def warmup_cosine(step: int, steps: int, warmup: float, floor: float) -> float:
    """Share of the learning rate: up over the first `warmup` of the steps, a cosine to `floor`."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _step(run: _Run, task: Task, schedule: Schedule, step: int, count: int) -> float:
    """One optimizer step; its mean loss, penalty left out."""
    model, learner, optimizer = run.model, run.learner, run.optimizer
    learner.step_begin(model, step)
    optimizer.zero_grad(set_to_none=True)
    batches = [next(run.feed) for _ in range(count)]
    loss = _backward(model, task, batches)
    if not math.isfinite(loss):
        raise UserError(
            f"expected a finite loss, found {loss} at step {step + 1}: lower the learning rate, "
            f"now {schedule.lr:g}"
        )
    penalty = learner.penalty(model)
    if penalty is not None:
        penalty.backward()
    learner.gradients_ready(model, step)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(trained, schedule.clip)
    share = warmup_cosine(step, schedule.steps, schedule.warmup, schedule.floor)
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr * share
    optimizer.step()
    learner.step_end(model, optimizer, step)
    return loss


def _backward(model: nn.Module, task: Task, batches: list[Any]) -> float:
    """The mean loss over all terms of the batches, its gradients left in the parameters."""
    total, terms = 0.0, 0.0
    for batch in batches:
        with _autocast(model):
            loss_n = task.loss(task.run(model, batch), batch)
        terms_n = task.terms(batch).to(loss_n).expand_as(loss_n)
        summed = (loss_n * terms_n).sum()
        summed.backward()
        total += float(summed.detach())
        terms += float(terms_n.sum())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(terms)
    return total / terms


def _autocast(model: nn.Module) -> torch.autocast:
    """bfloat16 where masters stand among 16-bit weights; as it is where all are alike."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=len(found) > 1)


@dataclass
class _Run:
    """All that changes while training: what an entry of the journal holds."""

    model: nn.Module
    learner: Learner
    optimizer: torch.optim.Optimizer
    feed: Feed
    losses: list[float] = field(default_factory=list)
    turn: int = 0

    def _tensors(self) -> dict[str, Tensor]:
        """The trained parameters, and the buffers that a forward pass in training mode moves."""
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        moving = {
            f"{path}.{name}" if path else name: buffer
            for path, module in self.model.named_modules()
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
        }
        return {**trained, **moving}

    def keep(self, journal: Journal, unit: str) -> None:
        """Write an entry. Two places take turns: one of them is whole at every moment."""
        tensors = {f"model/{name}": tensor for name, tensor in self._tensors().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        tensors |= {f"learner/{name}": t for name, t in self.learner.state_dict().items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        meta = {"losses": self.losses, "read": self.feed.read, "digest": self.feed.digest}
        journal.put(STAGE, f"{unit}.{self.turn}", tensors, meta)
        self.turn = 1 - self.turn

    def resume(self, journal: Journal, unit: str) -> None:
        """Go on from the later entry, if there is one."""
        entries = {turn: journal.get(STAGE, f"{unit}.{turn}") for turn in (0, 1)}
        found = {turn: entry for turn, entry in entries.items() if entry is not None}
        if not found:
            return
        latest = max(found, key=lambda turn: len(found[turn][1]["losses"]))
        self.turn = 1 - latest
        tensors, meta = found[latest]
        self.learner.load_state_dict(_below(tensors, "learner/"))
        with torch.no_grad():
            for name, own in self._tensors().items():
                own.copy_(tensors[f"model/{name}"])
        for name, parameter in self.model.named_parameters():
            state = {key: tensors[f"{key}/{name}"] for key in ADAMW if f"{key}/{name}" in tensors}
            if state:  # the count of steps stays on the CPU
                moments = {k: v.to(parameter) for k, v in state.items() if k != "step"}
                self.optimizer.state[parameter] = {**state, **moments}
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng/cuda"])
        self.losses = list(meta["losses"])
        self.feed.skip_to(meta["read"], meta["digest"])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
