"""The model block by block: one boundary of activations at a time, whatever the model's depth.

A first pass with every block bypassed records what each block is called with (masks, rotary
tables) and the first boundary. Blocks then run alone, forwards or, with gradients, backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankine.anatomy import Anatomy, Block, Weight
from rankine.checkpoint.streamed import Resident, Weights
from rankine.ranks import Group
from rankine.statistics.bases import Bases
from rankine.tasks.task import Task


@dataclass
class Call:
    """What one block is called with, apart from the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hidden_name: str | None = None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        if self.hidden_name is not None:
            out = block(*self.args, **{self.hidden_name: hidden, **self.kwargs})
        else:
            out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A block runs several times on the same batch: a cache would grow each time."""
    unset = {"past_key_values": None, "past_key_value": None, "use_cache": False}
    return {name: unset.get(name, value) for name, value in kwargs.items()}


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` run another function inside the block."""
    had = "forward" in module.__dict__
    old = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had:
            module.forward = old  # type: ignore[method-assign,assignment]
        else:
            del module.forward


@contextmanager
def listening(
    hooks: Sequence[tuple[nn.Module, Callable[..., Any], bool]],
) -> Iterator[None]:
    """Forward hooks (module, hook, before?) for the duration of the context."""
    handles = [
        m.register_forward_pre_hook(h) if before else m.register_forward_hook(h)
        for m, h, before in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def as_walked(anatomy: Anatomy, model: nn.Module, task: Task, batch: Any) -> Anatomy:
    """The anatomy a walk may trust: as given where each block reads exactly what the one before it
    wrote, and that alone; else one block, the whole model (a forward pass with something between
    its blocks, with blocks side by side, or with blocks that hand more than the hidden states on,
    cannot be walked one by one)."""
    if len(anatomy.blocks) < 2 and all(b.path == "" for b in anatomy.blocks):
        return anatomy
    paths = [block.path for block in anatomy.blocks]
    seen: list[str] = []
    last: list[Tensor] = []  # only what the block before wrote: the model may be deep
    chained = True

    def listen(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal chained
            hidden = _hidden(args, kwargs)
            if last:
                chained &= last[0].shape == hidden.shape and torch.equal(last[0], hidden)
            seen.append(path)
            chained &= isinstance(output, Tensor)
            last[:] = [output] if chained else []

        return hook

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            handle = module.register_forward_hook(listen(path), with_kwargs=True)
            stack.callback(handle.remove)
        task.run(model, batch)
    return anatomy if chained and seen == paths else one_block(anatomy)


def one_block(anatomy: Anatomy) -> Anatomy:
    """The same weights, all inside one block that is the whole model."""

    def moved(step: tuple[Weight, ...]) -> tuple[Weight, ...]:
        return tuple(replace(weight, block=0) for weight in step)

    steps = tuple(moved(step) for block in anatomy.blocks for step in block.steps)
    return replace(anatomy, blocks=(Block("", 0, None, None, steps),))


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states of a block's call: its first argument, or its first tensor by name."""
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


class _RecordedError(Exception):
    """Raised by the last block: what follows need not run."""


class Walk:
    """The calibration batches at the boundary before some block of one model. In a group each rank
    walks with its own part of the batches, and what is measured is summed over the ranks."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        task: Task,
        batches: Sequence[Any],
        weights: Weights | None = None,
        group: Group | None = None,
    ):
        self.model, self.anatomy, self.task = model, anatomy, task
        self.weights = weights or Resident()
        self.bases = Bases(model, self.weights)
        self.group = group or Group()
        self.batches = self.group.share(batches)
        self.calls: list[list[Call]] = []
        self.hidden: list[Tensor] = []
        for batch in self.batches:
            calls, first = self._record(batch)
            self.calls.append(calls)
            self.hidden.append(first)
        self.masks = [self._mask(batch, h) for batch, h in zip(self.batches, self.hidden)]

    def standing(self, path: str) -> AbstractContextManager[None]:
        """A context in which a part of the model keeps its weights in memory."""
        return self.weights.standing(path) if path else nullcontext()

    def _mask(self, batch: Any, hidden: Tensor) -> Tensor | None:
        mask = self.task.mask(batch)
        return None if mask is None else mask.bool().to(hidden.device)

    def rows(self, index: int, x: Tensor) -> Tensor:
        """(positions, n) rows of an activation of batch `index` that the task's mask lets through.
        An activation without the mask's leading dimensions (a pooled vector, a bank of experts)
        is taken whole."""
        mask, flat = self.masks[index], x.reshape(-1, x.shape[-1])
        if mask is None or flat.shape[0] != mask.numel():  # OPT flattens batch and time
            return flat
        return flat[mask.reshape(-1)]

    @property
    def whole(self) -> bool:
        """A model without a list of blocks is walked as one block: itself."""
        return self.anatomy.blocks[0].path == ""

    def module(self, block: Block) -> nn.Module:
        """The module of a block."""
        return self.model.get_submodule(block.path)

    @torch.no_grad()
    def _record(self, batch: Any) -> tuple[list[Call], Tensor]:
        if self.whole:
            return [Call()], torch.empty(0)
        calls: list[Call] = []
        first: list[Tensor] = []

        def bypass(*args: Any, **kwargs: Any) -> Tensor:
            kwargs = without_cache(kwargs)
            if args:
                call, hidden = Call(args[1:], kwargs), args[0]
            else:
                name = next(n for n, v in kwargs.items() if isinstance(v, Tensor))
                hidden = kwargs.pop(name)
                call = Call((), kwargs, name)
            calls.append(call)
            if not first:
                first.append(hidden.detach())
            if len(calls) == len(self.anatomy.blocks):
                raise _RecordedError
            return hidden

        with ExitStack() as stack:
            for block in self.anatomy.blocks:
                stack.enter_context(replaced_forward(self.module(block), bypass))
            with suppress(_RecordedError):
                self.task.run(self.model, batch)
        return calls, first[0]

    def forward(
        self, block: Block, index: int, hidden: Tensor, module: nn.Module | None = None
    ) -> Any:
        """Run one block (or `module` in its place) on batch `index`."""
        module = module or self.module(block)
        if self.whole:
            return self.task.run(module, self.batches[index])
        return self.calls[index][block.index].run(module, hidden)

    @torch.no_grad()
    def advance(self, block: Block, module: nn.Module | None = None) -> None:
        """Move the boundary behind a block."""
        if not self.whole:
            self.hidden = [self.forward(block, n, h, module) for n, h in enumerate(self.hidden)]

    def tail(self, index: int, hidden: Tensor) -> Any:
        """The model's outputs from the boundary behind its last block: its own norm and head run,
        on the given hidden states."""
        last = self.anatomy.blocks[-1]

        def through(*args: Any, **kwargs: Any) -> Tensor:
            return _hidden(args, kwargs)

        with ExitStack() as stack:
            for block in self.anatomy.blocks[:-1]:
                stack.enter_context(replaced_forward(self.module(block), through))
            stack.enter_context(replaced_forward(self.module(last), lambda *a, **k: hidden))
            return self.task.run(self.model, self.batches[index])

    def loss(self, index: int, outputs: Any) -> tuple[Tensor, Tensor]:
        """(sum of the loss terms of one batch, number of each example's (examples,))."""
        batch = self.batches[index]
        loss = self.task.loss(outputs, batch)
        terms = self.task.terms(batch).to(loss).expand_as(loss)
        return (loss * terms).sum(), terms
