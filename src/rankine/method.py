"""Methods: a frozen dataclass of knobs with the paper's defaults, a card, and narrow protocols.

A compression method is four choices: target, metric, structure, budget rule. Each verb below has
a default, so a method's file holds only what differs (read methods/svd.py).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rankine.anatomy import Anatomy, Target, Weight, weight_targets
from rankine.budget import Allocator, Bid, Budget, Option, Uniform
from rankine.errors import UserError, suggest
from rankine.linalg.anchor import anchored_goal
from rankine.metric import Gram, Metric
from rankine.patch import Patch
from rankine.statistics import Fisher, Moment, Need, OutputGradient
from rankine.structures import Dense, LowRank, Structure
from rankine.tasks import Task

ENTRY_POINTS = "rankine.methods"

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

    def cross(self, weight: Weight) -> Tensor | None:
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
        return weight_targets(anatomy, include, exclude, tables="embedding" in self.card.takes)

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
        options = self.structure(target).sizes(target.shape, dtype)
        named = [dataclasses.replace(option, by=self.name) for option in options]
        return dense_bid(target, torch.empty(target.shape, device="meta"), dtype, named)

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
    def schedule(self) -> Schedule:
        """Steps, learning rate and the rest."""
        raise NotImplementedError

    @property
    def sequences(self) -> int | None:
        """Sequences per step of a language task; None: the task's own batches."""
        return None

    def learner(self, patch: Patch) -> Learner:
        """A new learner for a model of which `patch` says what stands where."""
        raise NotImplementedError

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


def stored_parts(
    choice: Structure, goal: Tensor, metric: Metric, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parts as they will be stored: floating ones in `dtype`."""
    parts = choice.encode(goal, metric)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in parts.items()}


def rebuilt(choice: Structure, stored: dict[str, Tensor]) -> Tensor:
    """The matrix that stored parts stand for, without the rounding of multiplying them."""
    return choice.decode({n: t.double() if t.is_floating_point() else t for n, t in stored.items()})


#: A pivoted form may add this share to a target's loss by rounding; else two factors are stored.
PIVOT_HARM = 0.01


def unless_rounding_hurts(
    choice: LowRank,
    stored: dict[str, Tensor],
    goal: Tensor,
    metric: Metric,
    dtype: torch.dtype,
) -> tuple[LowRank, dict[str, Tensor]]:
    """The pivoted form, or the largest two factors within its bits where rounding its
    coefficients adds more than PIVOT_HARM to the loss of the same rank in two factors, and more
    than the lower rank does."""
    plain = dataclasses.replace(choice, pivoted=False)
    reference = metric.loss(goal, rebuilt(plain, stored_parts(plain, goal, metric, dtype)))
    loss = metric.loss(goal, rebuilt(choice, stored))
    if loss <= (1 + PIVOT_HARM) * reference:
        return choice, stored
    bits = choice.bits(goal.shape, dtype)
    rank = max(
        r
        for r in range(1, choice.rank + 1)
        if dataclasses.replace(plain, rank=r).bits(goal.shape, dtype) <= bits
    )
    smaller = dataclasses.replace(plain, rank=rank)
    parts = stored_parts(smaller, goal, metric, dtype)
    better = metric.loss(goal, rebuilt(smaller, parts)) < loss
    return (smaller, parts) if better else (choice, stored)


def bits_of_tied(target: Target, choice: Structure, dtype: torch.dtype) -> int:
    """What output layers that share a factored table store of their own: its `up`, turned."""
    if target.kind != "table" or not isinstance(choice, LowRank):
        return 0
    heads = sum(weight.operator != "embedding" for weight in target.weights)
    return heads * choice.rank * target.shape[0] * dtype.itemsize * 8


def two_sided(
    weight: Weight, evidence: Evidence, need: OutputGradient, shrink_in: float, shrink_out: float
) -> Metric:
    """‖G^{1/2} (W − Ŵ) H^{1/2}‖² with both moments shrunk towards the identity; half of it
    predicts the loss per term (KFAC)."""
    inputs = Gram(evidence.inputs(weight).h_nn).shrink(shrink_in)
    outputs = Gram(evidence.gradient(weight, need).h_nn).shrink(shrink_out)
    return Metric(inputs, outputs, scale=0.5)


def anchored(weight: Weight, source: Source, evidence: Evidence, ridge: float) -> Tensor:
    """The weight; on an anchored stream, shifted to give the dense outputs (linalg.anchor)."""
    w_oi, cross_ii = source.weight(weight), source.cross(weight)
    if cross_ii is None:
        return w_oi
    return anchored_goal(w_oi, cross_ii, evidence.inputs(weight).h_nn, ridge)


def dense_bid(target: Target, goal: Tensor, dtype: torch.dtype, options: Sequence[Option]) -> Bid:
    """A bid with the dense weight as its last option, so that nothing ever grows."""
    dense = Option(Dense(), goal.numel() * dtype.itemsize * 8, 0.0)
    kept = tuple(option for option in options if option.bits < dense.bits)
    role = target.weights[0].role
    return Bid(target.id, target.members, (*kept, dense), goal.numel() * 16, group=role)


# -- discovery ------------------------------------------------------------------------------------
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


def catalogue() -> dict[str, type[Method]]:
    """Every method: ours, those other packages offer (entry-point group `rankine.methods`), and
    what the process has registered since."""
    _import_methods()
    return dict(sorted(_METHODS.items()))


@cache
def _import_methods() -> None:
    """Importing registers; packages are walked once per process."""
    package = importlib.import_module("rankine.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"rankine.methods.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            owner = entry.dist.name if entry.dist else entry.value
            raise UserError(
                f"expected methods in {entry.value} of the package {owner}, found "
                f"{type(error).__name__}: {error}; repair or uninstall it"
            ) from error


def get(name: str | Method, knobs: Mapping[str, Any] | None = None) -> Method:
    """The method of that name with the given knobs; raises UserError on unknown ones."""
    if isinstance(name, Method):
        return dataclasses.replace(name, **(knobs or {}))
    known = catalogue()
    if name not in known:
        raise UserError(f'unknown method "{name}"; {suggest(name, list(known))}')
    cls = known[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for knob, value in (knobs or {}).items():
        if knob not in fields:
            raise UserError(f'{name} has no knob "{knob}"; {suggest(knob, list(fields))}')
        values[knob] = convert(value, fields[knob], name)
    return cls(**values)


def convert(value: Any, field: dataclasses.Field[Any], owner: str) -> Any:
    """A knob's value as its type (command lines give strings); raises UserError."""
    kind = str(field.type)
    if value is None and "None" in kind:
        return None
    base = kind.replace(" | None", "")
    parse: dict[str, Callable[[Any], Any]] = {
        "bool": _parse_bool,
        "int": _parse_int,
        "float": float,
        "str": str,
    }
    if isinstance(value, str) and value.lower() == "none" and "None" in kind:
        return None
    if base not in parse:
        if base.startswith("tuple"):
            items = value.split(",") if isinstance(value, str) else value
            return tuple(items)
        return value
    try:
        return parse[base](value)
    except (TypeError, ValueError):
        raise UserError(f"expected {owner}.{field.name} to be {base}, found {value!r}") from None


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise ValueError(value)


def _parse_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError(value)
    return int(value)


__all__ = [
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
    "catalogue",
    "dense_bid",
    "get",
    "method",
    "two_sided",
]
