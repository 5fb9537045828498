"""Methods: a frozen dataclass of knobs with the paper's defaults, a card, and narrow protocols.

A compression method is four choices: target, metric, structure, budget rule. Each verb below has
a default, so a method's file holds only what differs (read methods/svd.py).
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rankine.anatomy import Anatomy, Target, Weight, weight_targets
from rankine.budget import Allocator, Bid, Budget, Option, Uniform
from rankine.errors import UserError
from rankine.fitting import (
    PIVOT_HARM,
    anchored,
    bits_of_tied,
    dense_bid,
    rebuilt,
    stored_parts,
    two_sided,
    unless_rounding_hurts,
)
from rankine.linalg.anchor import Cross
from rankine.metric import Metric
from rankine.patch import Patch
from rankine.statistics import Fisher, Moment, Need, OutputGradient
from rankine.structures import Dense, LowRank, Structure
from rankine.tasks import Task

#: Inputs the solve sees: the dense model's, the compressed prefix's, or both (anchored: give the
#: dense outputs from the compressed inputs).
Stream = Literal["dense", "compressed", "anchored"]


@dataclass(frozen=True)
class Card:
    """What a method is, for catalogues and legality.

    `takes` and `gives` name module kinds, `needs` data. `after` names the families whose result it
    may stand on in a recipe ("dense": an untouched model), `before` those that may stand on its
    own; None: all whose `after` names its family. Both sides must agree; training leaves the family
    of what it trained. `authors` (as BibTeX has them) and `year` (where `reference` does not say
    it) are for citations.
    """

    name: str
    title: str
    reference: str
    family: str
    summary: str
    takes: tuple[str, ...] = ("linear",)
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ("low_rank",)
    after: tuple[str, ...] = ("dense",)
    before: tuple[str, ...] | None = None
    ours: bool = False
    authors: str = ""
    year: int | None = None

    def may_follow(self, earlier: Card, standing: str) -> bool:
        """May this stand right behind `earlier`, where `standing` is the family that stands?"""
        return standing in self.after and (earlier.before is None or self.family in earlier.before)


class Source(Protocol):
    """The stage's input, tensor by tensor."""

    def weight(self, weight: Weight) -> Tensor:
        """The (o, i) matrix, in its stored dtype."""

    def bias(self, weight: Weight) -> Tensor | None:
        """The (o,) bias that the layer adds."""

    def cross(self, weight: Weight) -> Cross | None:
        """E[x x'ᵀ] of dense and compressed inputs (anchored streams only)."""


class Evidence(Protocol):
    """What the survey (or the compressed stream) measured."""

    def inputs(self, weight: Weight) -> Moment: ...

    def magnitude(self, weight: Weight) -> Tensor: ...

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment: ...

    def fisher(self, weight: Weight) -> Fisher: ...

    def lookups(self, weight: Weight) -> Tensor: ...


class Bench(Protocol):
    """What an allocation rule that probes may ask for."""

    def fit(self, target: str, option: Option) -> Patch:
        """The patch of one option of one target, from the survey's statistics."""

    def probe(self, patch: Patch) -> float:
        """Calibration loss (mean per term) with the patch in place minus without."""


@dataclass(frozen=True)
class Refine:
    """How a block is trained against the dense block's output once its targets are solved.

    AA-SVD's schedule (2604.02119): AdamW, `warmup` share of the steps, cosine to `floor` × `lr`.
    Its `lr` of 1e-4 is for 7B models; small models take larger steps.
    """

    epochs: int = 25
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    floor: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """How a whole model is trained: AdamW, `steps` of them, `warmup` share of the steps up to `lr`,
    a cosine down to `floor` × `lr`; vectors do not decay; gradients are clipped at `clip`."""

    steps: int
    lr: float
    weight_decay: float = 0.0
    warmup: float = 0.1
    floor: float = 0.1
    clip: float = 1.0


class Learner(Protocol):
    """Training that ends in a patch. One object serves one run and holds what changes in it; its
    driver (training.loop, or a Trainer callback) makes the optimizer and calls, in this order:
    `prepare`; in each step `step_begin`, the forward and backward passes of the task's loss and of
    `penalty`, `gradients_ready`, the clipping and the optimizer, `step_end`; at last `finish`.

    Subclass it: every verb but `prepare` and `finish` does nothing by default.
    """

    def prepare(self, model: nn.Module, task: Task) -> None:
        """Swap modules, leave `requires_grad` on what is trained, set training or evaluation mode.
        Must draw from torch's global generator only: a resumed run calls it again."""
        ...

    def step_begin(self, model: nn.Module, step: int) -> None:
        """Before the forward pass: sampled ranks, gates."""
        return None

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar to add to the task's mean loss, differentiable; None: nothing to add."""
        return None

    def gradients_ready(self, model: nn.Module, step: int) -> None:
        """The gradients stand, unclipped: add sub-gradients, mask them."""
        return None

    def step_end(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """The weights moved: project or shrink them (and their optimizer state)."""
        return None

    def finish(self, model: nn.Module, budget: Budget | None) -> Patch:
        """What the model became, cut to a budget where the method can; tensors in float32."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside parameters and optimizer (ranks, gates, a generator)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state_dict`; called after `prepare`, before the parameters are put back."""
        return None


@dataclass(frozen=True)
class Method(ABC):
    """Base of every method: knobs are its fields, `card` says what it is."""

    card: ClassVar[Card]

    @property
    def name(self) -> str:
        """The name users type."""
        return self.card.name

    def knobs(self) -> dict[str, Any]:
        """Field → value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class Compressor(Method):
    """Closed-form methods, driven by `pipeline`. Every verb has a default: plain SVD."""

    #: False when the knobs alone fix the size (plain quantization): no budget is asked for.
    sized: ClassVar[bool] = True
    #: Does it take the parts of an earlier structure (`down`, `up`) instead of the whole weight?
    inside: ClassVar[bool] = False

    @property
    def stream(self) -> Stream:
        """Which inputs the solve sees; default: the dense model's."""
        return "dense"

    @property
    def needs_loss(self) -> bool:
        """Does it measure gradients, or probe the task's loss?"""
        return "gradients" in self.card.needs

    @property
    def refinement(self) -> Refine | None:
        """Training of each block after its solve; default: none."""
        return None

    def targets(
        self, anatomy: Anatomy, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> list[Target]:
        """What is replaced; default: each linear weight of every block by itself."""
        takes = self.card.takes
        banks, tables = "bank" in takes, "embedding" in takes
        return weight_targets(anatomy, include, exclude, banks=banks, tables=tables)

    def needs(self, target: Target) -> frozenset[Need]:
        """What must be measured for a target; default: nothing."""
        return frozenset()

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """The norm its error is measured in; default: Frobenius."""
        return Metric()

    def goal(self, target: Target, source: Source, evidence: Evidence) -> Tensor:
        """The matrix to approximate; default: the weight; of a group, its weights stacked."""
        if target.kind == "group":
            return torch.cat([source.weight(weight) for weight in target.weights])
        return source.weight(target.weights[0])

    @property
    def template(self) -> Structure:
        """The structure whose curve is bid; its size is a placeholder."""
        return LowRank(1)

    def bid(self, target: Target, goal: Tensor, metric: Metric, dtype: torch.dtype) -> Bid:
        """Dense, and every size of the template. Losses are those of `metric`."""
        structure = self.structure(target)
        options = []
        for option in structure.curve(goal, metric, dtype):
            bits = option.bits + bits_of_tied(target, option.structure, dtype)
            options.append(dataclasses.replace(option, bits=bits, by=self.name))
        return dense_bid(target, goal, dtype, options)

    @property
    def by_size(self) -> bool:
        """Does the budget rule look at sizes alone? Then it decides before anything is measured,
        and each target is solved as soon as its own block was: one walk, one decomposition."""
        cls = type(self)
        plain = cls.bid is Compressor.bid and cls.allocate is Compressor.allocate
        return plain and isinstance(self.allocator, Uniform)

    def sizes(self, target: Target, dtype: torch.dtype) -> Bid:
        """`bid` for rules that are `by_size`."""
        options = self.structure(target).sizes(target.stored_shape, dtype)
        named = [dataclasses.replace(option, by=self.name) for option in options]
        return dense_bid(target, torch.empty(target.stored_shape, device="meta"), dtype, named)

    def structure(self, target: Target) -> Structure:
        """The template for one target: of a table where an embedding stands (a centred fit may add
        a bias where there is none)."""
        if target.weights[0].operator == "embedding" and isinstance(self.template, LowRank):
            return dataclasses.replace(self.template, view="table")
        return self.template

    def fit(
        self, target: Target, choice: Structure, goal: Tensor, metric: Metric, dtype: torch.dtype
    ) -> Patch:
        """The patch that puts `choice` in the target's place, parts in `dtype`."""
        if isinstance(choice, Dense):
            return Patch()
        stored = stored_parts(choice, goal, metric, dtype)
        if isinstance(choice, LowRank) and choice.pivoted:
            choice, stored = unless_rounding_hurts(choice, stored, goal, metric, dtype)
        bias = None
        if metric.mean_i is not None:
            bias = metric.implied_bias(goal, rebuilt(choice, stored))
        return Patch.over(target, choice, stored, bias)

    @property
    def allocator(self) -> Allocator:
        """The budget rule; default: the same share for every target."""
        return Uniform()

    def allocate(self, bids: Sequence[Bid], bits: int, bench: Bench) -> dict[str, Option]:
        """One option per target within `bits`; rules that probe use `bench`."""
        return self.allocator.allocate(bids, bits)

    def probes(self, targets: Sequence[Target]) -> int:
        """How often `allocate` probes the loss, for the plan's time; default: never."""
        return 0


@dataclass(frozen=True)
class Learning(Method):
    """Methods that train the whole model; driven by `training.loop` (engine/learn.py)."""

    #: Training keeps sizes as they are unless the method says otherwise.
    sized: ClassVar[bool] = False

    @property
    def distils(self) -> bool:
        """Does the objective use a teacher?"""
        return False

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """Steps, learning rate and the rest."""

    @property
    def sequences(self) -> int | None:
        """Sequences per step of a language task; None: the task's own batches."""
        return None

    @abstractmethod
    def learner(self, patch: Patch) -> Learner:
        """A new learner for a model of which `patch` says what stands where."""

    def objective(self, task: Task, teacher: nn.Module | None) -> Task:
        """The loss that is trained on; default: the task's."""
        return task


@dataclass(frozen=True)
class Runtime(Method):
    """How a finished model runs: other forward passes over the same modules and weights. Nothing
    is compressed, so no recipe holds it."""

    sized: ClassVar[bool] = False

    @abstractmethod
    def swap(self, model: nn.Module) -> ExitStack:
        """Put them in, in place. Closing the result, or leaving it as a context, puts back what
        this call swapped; the state dict is the same throughout."""


# -- registration ---------------------------------------------------------------------------------
M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def method(cls: M) -> M:
    """Class decorator: makes a method known by its card's name."""
    name = cls.card.name
    if name in _METHODS and _METHODS[name].__module__ != cls.__module__:
        raise UserError(
            f'two methods are called "{name}": {_METHODS[name].__module__} and {cls.__module__}; '
            "rename one or uninstall its package"
        )
    _METHODS[name] = cls
    return cls


def registered() -> dict[str, type[Method]]:
    """By name: the methods whose modules were imported (`rankine.discovery` imports them all)."""
    return dict(sorted(_METHODS.items()))


if TYPE_CHECKING:
    from rankine.discovery import catalogue as catalogue
    from rankine.discovery import convert as convert
    from rankine.discovery import get as get
else:

    def __getattr__(name: str) -> Any:
        """One place to import from for whoever writes a method: discovery stands a floor above."""
        if name not in ("catalogue", "convert", "get"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("rankine.discovery"), name)


__all__ = [
    "PIVOT_HARM",
    "Bench",
    "Card",
    "Compressor",
    "Evidence",
    "Learner",
    "Learning",
    "Method",
    "Refine",
    "Runtime",
    "Schedule",
    "Source",
    "Stream",
    "anchored",
    "bits_of_tied",
    "catalogue",
    "convert",
    "dense_bid",
    "get",
    "method",
    "registered",
    "two_sided",
]
