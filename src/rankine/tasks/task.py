"""What a model is for: data, how to run it, what an example loses, how well it does.

Statistics, probes, healing, training and evaluation take a task and nothing else. `FunctionTask`
makes one of a user's own loader, forward, loss and metric.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from rankine import own
from rankine.errors import UserError, suggest
from rankine.progress import counted

Split = Literal["calibration", "train", "evaluation"]
SPLITS: tuple[str, ...] = get_args(Split)


@runtime_checkable
class Task(Protocol):
    """Data, loss and score of one use of a model. Splits are disjoint; batches live on the CPU."""

    def batches(self, split: str) -> Iterable[Any]:
        """The batches of "calibration", "train" or "evaluation", the same ones at every call
        ("train" may stream and shuffle)."""
        ...

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs on a batch, which is moved to the model's device first."""
        ...

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """(examples,) loss of each example, differentiable; the task says what an example is."""
        ...

    def terms(self, batch: Any) -> Tensor:
        """(examples,) how many terms `loss` is the mean of in each example (the scored tokens of
        a window; 1 for a classifier): loss · terms, summed, is what gradients are taken of."""
        ...

    def mask(self, batch: Any) -> Tensor | None:
        """Which positions count: bool, shaped like the leading dimensions of the activations.
        None: all of them."""
        ...

    def score(self, model: nn.Module) -> dict[str, float]:
        """Named figures on the evaluation split."""
        ...

    def fingerprint(self, split: str = "calibration") -> str:
        """sha256 (hex) of the data this split really uses."""
        ...


class FunctionTask:
    """A task of the user's own parts.

    - `calibration`: an iterable of batches (mappings, tuples or tensors), read once and kept;
      methods that need no data do without.
    - `forward(model, batch)`: default `model(**batch)` for mappings, `model(batch[0])` for tuples.
      The batch it gets is on the model's device, its floating tensors in the model's dtype.
    - `loss(outputs, batch)`: one value per example (`reduction="none"`); only gradient statistics,
      probes and training need it.
    - `evaluate(model)`: named figures; `mask(batch)`: positions that count.
    """

    def __init__(
        self,
        calibration: Iterable[Any] = (),
        forward: Callable[[nn.Module, Any], Any] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        train: Iterable[Any] = (),
        evaluation: Iterable[Any] = (),
        mask: Callable[[Any], Tensor] | None = None,
    ):
        self._sources = {"calibration": calibration, "train": train, "evaluation": evaluation}
        self._forward = forward or _forward
        self._loss, self._evaluate, self._mask = loss, evaluate, mask

    @cached_property
    def _kept(self) -> dict[str, list[Any]]:
        # A shuffling loader or a generator must give the same batches to every walk.
        return {split: list(self._sources[split]) for split in ("calibration", "evaluation")}

    def batches(self, split: str) -> Iterable[Any]:
        """See `Task.batches`."""
        check_split(split)
        found = self._sources["train"] if split == "train" else self._kept[split]
        if split == "calibration" and not self.has_data:
            raise UserError("expected calibration batches, found none: pass an iterable of batches")
        return found

    @property
    def has_data(self) -> bool:
        """Is there anything to calibrate on?"""
        return bool(self._kept["calibration"])

    @property
    def sizes(self) -> list[int]:
        """Examples of each calibration batch: the first dimension of its first tensor."""
        firsts = (
            next(leaves(batch), ("", torch.empty(0)))[1] for batch in self._kept["calibration"]
        )
        return [first.shape[0] if first.ndim else 1 for first in firsts]

    @property
    def has_loss(self) -> bool:
        """Was a loss given?"""
        return self._loss is not None or type(self).loss is not FunctionTask.loss

    @property
    def code(self) -> str:
        """sha256 (hex) of the functions that decide what is measured (see `own.code`)."""
        return own.code(self._forward, self._loss, self._mask)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """See `Task.run`."""
        return self._forward(model, to_device(batch, device_of(model), dtype_of(model)))

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """See `Task.loss`; raises UserError without a loss, or with a loss that is one scalar."""
        if self._loss is None:
            raise UserError(
                "expected a loss per example, found none: pass loss=lambda outputs, batch: ... "
                "(--loss package.module:name)"
            )
        value = self._loss(outputs, batch)
        if value.ndim == 0:
            raise UserError(
                'expected one loss per example, found a single number: use reduction="none"'
            )
        return value.flatten(1).mean(1) if value.ndim > 1 else value

    def terms(self, batch: Any) -> Tensor:
        """See `Task.terms`: an example of a user's own task is one term."""
        return torch.ones(())

    def mask(self, batch: Any) -> Tensor | None:
        """See `Task.mask`."""
        return self._mask(batch) if self._mask else None

    def score(self, model: nn.Module) -> dict[str, float]:
        """The user's figures; without any, the mean loss over the evaluation batches."""
        if self._evaluate is not None:
            return own_figures(self._evaluate, model)
        if self._loss is None or not self._kept["evaluation"]:
            return {}
        with torch.no_grad():
            losses = [
                self.loss(self.run(model, b), to_device(b, device_of(model)))
                for b in counted(self._kept["evaluation"], "score")
            ]
        return {"loss": float(torch.cat(losses).double().mean())}

    def fingerprint(self, split: str = "calibration") -> str:
        """See `Task.fingerprint`."""
        digest = hashlib.sha256()
        for batch in self._sources["train"] if split == "train" else self._kept[split]:
            for name, tensor in leaves(batch):
                digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()


def check_split(split: str) -> None:
    """Raises UserError on anything that is no split."""
    if split not in SPLITS:
        raise UserError(f'unknown split "{split}"; {suggest(split, SPLITS)}')


def device_of(model: nn.Module) -> torch.device:
    """The device a batch must be on: that of the first parameter that is in memory."""
    parameter = next((p for p in model.parameters() if not p.is_meta), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype a batch must have: that of the model's first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The batch with its tensors on `device`, floating ones in `dtype` if given, whatever it is
    nested in."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device, dtype) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(to_device(value, device, dtype) for value in batch)
    return batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is in evaluation mode; then every module of it is as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def own_figures(evaluate: Callable[[nn.Module], Any], model: nn.Module) -> dict[str, float]:
    """What the user's `evaluate` says of a model; raises UserError unless it is {name: number}."""
    (found,) = (evaluate(one) for one in counted([model], "evaluate"))
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            'expected evaluate to return names and numbers, such as {"auc": 0.91}, found '
            f"{found!r:.80}"
        ) from None


def leaves(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in a batch, in a fixed order."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key in sorted(batch):
            yield from leaves(batch[key], f"{name}.{key}")
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from leaves(value, f"{name}.{index}")


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple) else batch)
