"""The plan: what would come out and what it would take, before any work."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rankine import compat
from rankine.anatomy import Anatomy, Target
from rankine.budget import Budget, format_bytes
from rankine.checkpoint import is_pretrained
from rankine.discovery import catalogue, get
from rankine.engine import room
from rankine.engine.memory import bytes_fit
from rankine.engine.parts import stage_targets, with_parts
from rankine.engine.stage import WorkBench
from rankine.errors import UserError
from rankine.evaluation.latency import faster_from, pays
from rankine.kernels.fused import missing
from rankine.method import Compressor, Learning, Method
from rankine.modules import module_at
from rankine.recipe import Recipe
from rankine.recipe import Stage as StageRecipe
from rankine.structures.bank import Bank
from rankine.tasks import FunctionTask, Task, parse_tokens

#: Mean stored bits per weight of plain int8 and int4 with 16-bit scale and minimum per 64.
PLAIN = {"int8": 8.5, "int4": 4.5}


#: Where results run: of transformers' models, of any other module.
PRETRAINED = (
    *("transformers", "PEFT", "ONNX Runtime"),
    "vLLM and llama.cpp only as a dense export",
)
PLAIN_MODULE = ("torch through rankine.load(DIR, into=module)", "ONNX Runtime")

#: Bytes of a tensor's entry in a safetensors header beside its name, at most.
HEADER_ENTRY = 84


@dataclass(frozen=True)
class Plan:
    """Predictions (bytes, seconds) and sentences; `lines()` prints them."""

    model: str
    family: str
    method: str
    targets: int
    weights: int
    bytes_before: int
    bytes_after: int
    seconds: float
    memory: int
    scratch: int
    parameters: int
    runs_on: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """What a terminal shows."""
        share = self.bytes_after / max(self.bytes_before, 1)
        return [
            f"model    {self.model} ({self.family}), {format_bytes(self.bytes_before)}",
            f"method   {self.method} on {self.targets} weights, {self.weights:,} parameters",
            f"size     {format_bytes(self.bytes_after)} on disk ({share:.0%} of today's)",
            f"time     about {_duration(self.seconds)}, memory {format_bytes(self.memory)}, "
            f"scratch {format_bytes(self.scratch)}",
            f"runs on  {', '.join(self.runs_on)}",
            *[f"note     {note}" for note in self.notes],
        ]

    def to_json(self) -> dict[str, Any]:
        """For reports and --json."""
        return {
            "model": self.model,
            "family": self.family,
            "method": self.method,
            "targets": self.targets,
            "weights": self.weights,
            "bytes_before": self.bytes_before,
            "bytes": self.bytes_after,
            "seconds": round(self.seconds, 1),
            "memory": self.memory,
            "scratch": self.scratch,
            "runs_on": list(self.runs_on),
            "notes": list(self.notes),
        }


def make_plan(
    recipe: Recipe, model: nn.Module, anatomy: Anatomy, name: str, task: Task | None = None
) -> Plan:
    """Predict a recipe on a model (meta tensors suffice). `task` says how much data there is where
    that is not the recipe's `tokens`. Raises UserError on what cannot work."""
    methods = methods_of(recipe)
    stages = zip(methods, recipe.chain(), strict=True)
    sizing = [(method, asked) for method, asked in stages if isinstance(method, Compressor)]
    compressors = [method for method, _ in sizing]
    if compressors[0].inside:  # of a model that an earlier run factored
        anatomy = with_parts(anatomy, model)
    targets = stage_targets(compressors[0], anatomy, recipe)
    weights = sum(target.size for target in targets)
    before = tensor_bytes(model)
    fixed = fixed_bytes(model, targets, compressors[0])
    budget = recipe.budget(sizing[-1][1])
    bits = _predicted_bits(recipe, sizing, targets, model, fixed)
    positions, length = _positions(recipe, task)
    streamed = is_pretrained(model) and not bytes_fit(before, recipe.memory)
    return Plan(
        model=name,
        family=anatomy.family,
        method=" → ".join(method.name for method in methods),
        targets=len(targets),
        weights=weights,
        bytes_before=before,
        bytes_after=fixed + bits // 8,
        seconds=_seconds(methods, targets, anatomy, positions, length),
        memory=room.memory(anatomy, before, streamed, positions),
        scratch=room.scratch(compressors, targets, anatomy, bits, streamed, positions),
        parameters=sum(p.numel() for p in model.parameters()),
        runs_on=PRETRAINED if is_pretrained(model) else PLAIN_MODULE,
        notes=tuple(_notes(recipe, compressors, budget, weights, fixed, targets, model)),
    )


def methods_of(recipe: Recipe) -> list[Compressor | Learning]:
    """The chain's methods. Raises UserError on names, knobs and orders that cannot work; costs
    nothing, so it comes before a model is opened."""
    methods = [driven(stage.method, stage.set) for stage in recipe.chain()]
    check_chain(methods)
    if not any(isinstance(method, Compressor) for method in methods):
        raise UserError(f"{methods[0].name} trains a model as it is: use `rankine heal`")
    return methods


def driven(name: str, knobs: dict[str, Any]) -> Compressor | Learning:
    """A method that the pipeline can drive."""
    found = get(name, knobs)
    if not isinstance(found, Compressor | Learning):
        raise UserError(
            f"{name} makes nothing smaller, it runs a finished model: see `rankine methods {name}`"
        )
    return found


def check_chain(methods: Sequence[Method]) -> None:
    """Legality is data: the cards say what may follow what. Training leaves what stands."""
    standing, earlier = "dense", methods[0].card
    for number, method in enumerate(methods):
        if standing not in method.card.after:
            raise UserError(
                f"{method.name} cannot follow a {standing} stage: it takes "
                f"{', '.join(method.card.after)} weights; reorder the recipe"
            )
        if number and not method.card.may_follow(earlier, standing):
            raise UserError(
                f"{method.name} cannot follow {earlier.name}, which may be followed by "
                f"{', '.join(earlier.before or ()) or 'nothing'}; reorder the recipe"
            )
        earlier = method.card
        if isinstance(method, Compressor):
            standing = earlier.family


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and saved buffers, shared ones once."""
    seen: dict[int, int] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _predicted_bits(
    recipe: Recipe,
    stages: Sequence[tuple[Compressor, StageRecipe]],
    targets: list[Target],
    model: nn.Module,
    fixed: int,
) -> int:
    """Bits of the targets after the whole chain. A method whose knobs fix the size shrinks what it
    finds by the same share as it would the dense weights."""
    weights = sum(target.size for target in targets)
    dtype = _stored_dtype(model)
    dense = weights * dtype.itemsize * 8
    bits = dense
    for method, asked in stages:
        budget = recipe.budget(asked)
        if method.sized:
            bits = min(bits, budget.total_bits(weights, fixed)) if budget is not None else bits
            continue
        sizes = [method.structure(t).bits(t.stored_shape, dtype) for t in targets]
        bits = bits * sum(sizes) // dense
    return bits


def fixed_bytes(
    model: nn.Module,
    targets: list[Target],
    method: Compressor,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes on disk of everything that is no targeted weight, headers for what will stand in
    their places included. `dtype`: that of the stored floats, where `model` computes in another.
    """
    weights = [w for t in targets for w in t.weights]
    targeted = tuple(w.path + "." for w in weights)
    modules = [module_at(model, w.path) for w in weights]
    stacked = {id(bank.weight) for bank in modules if isinstance(bank, Bank)}
    seen: dict[int, int] = {}
    names: list[str] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in stacked or (name.startswith(targeted) and not name.endswith(".bias")):
            continue
        names.append(name)
        size = dtype.itemsize if dtype and tensor.is_floating_point() else tensor.element_size()
        seen[id(tensor)] = tensor.numel() * size
    for target in targets:
        like = module_at(model, target.weights[0].path)
        parts = method.structure(target).module(like).state_dict()
        names += [f"{w.path}.{part}" for w in target.weights for part in parts]
    return sum(seen.values()) + 64 + sum(len(name) + HEADER_ENTRY for name in names)


def _stored_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _positions(recipe: Recipe, task: Task | None) -> tuple[int, int]:
    """(calibration positions, positions of what one training step takes at a time): tokens, or
    the examples of the user's batches."""
    if isinstance(task, FunctionTask):
        return sum(task.sizes), max(task.sizes, default=1)
    sequences, length = parse_tokens(recipe.tokens)
    return sequences * length, length


def _seconds(
    methods: Sequence[Method],
    targets: list[Target],
    anatomy: Anatomy,
    tokens: int,
    length: int,
) -> float:
    """Forward passes, moments, decompositions and probes at the speed one matrix product runs."""
    rate = _flops_per_second()
    work = 0.0
    weights = sum(w.size for w in anatomy.linears)
    for method in methods:
        if isinstance(method, Learning):  # forward, backward, and a teacher's forward pass
            trained = method.schedule.steps * (method.sequences or 1) * length
            work += trained * weights * (8.0 if method.distils else 6.0)
        if not isinstance(method, Compressor):
            continue
        forward = 2.0 * tokens * weights
        needs = set().union(*(method.needs(t) for t in targets))
        walks = len(needs) * 1.5 + (4.0 if method.stream != "dense" else 0.0)
        if method.refinement is not None:
            walks += 3.0 * method.refinement.epochs
        widths = [w.shape[1] for t in targets for w in t.weights]
        moments = sum(2.0 * tokens * i * i for i in widths) * len(needs)
        solves = sum(40.0 * w.copies * min(w.shape) ** 3 for t in targets for w in t.weights)
        probed = 2.0 * min(tokens, WorkBench.sequences * length) * weights
        work += forward * walks + moments + solves + probed * method.probes(targets)
    return work / rate + 2.0


@functools.cache
def _flops_per_second(n: int = 512) -> float:
    a = torch.randn(n, n)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * n**3 / max(time.perf_counter() - start, 1e-6) * 0.5


def _notes(
    recipe: Recipe,
    methods: list[Compressor],
    budget: Budget | None,
    weights: int,
    fixed: int,
    targets: list[Target],
    model: nn.Module,
) -> list[str]:
    notes = []
    if budget is not None and budget.note:
        notes.append(budget.note)
    if budget is not None and all(m.card.family == "low-rank" for m in methods):
        asked = budget.total_bits(weights, fixed) / weights
        beaten = [n for n, b in PLAIN.items() if b <= asked]
        if beaten:
            notes.append(
                f"{asked:.1f} bits per weight were asked for; plain {beaten[0]} stores "
                f"{PLAIN[beaten[0]]} and usually loses less: low rank pays in speed at batch > 1, "
                "in training, and below 4 bits on top of quantization"
            )
    dtype = _stored_dtype(model)
    if methods[-1].card.family == "low-rank":
        notes += _speed_notes(recipe, targets, dtype)
    notes += _experts_note(methods[0], targets, model)
    if dtype == torch.float32:
        notes.append(
            "the weights are float32, 32 bits each against the 16 that keep counts: "
            "--dtype bfloat16 buys twice the ranks at the same bytes"
        )
    return notes


def _experts_note(method: Compressor, targets: list[Target], model: nn.Module) -> Iterator[str]:
    """Stacked experts that stay as they are, where they are much of the model."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    stacked = [n for n, p in model.named_parameters() if p.ndim == 3 and "expert" in n]
    share = sum(sizes[name] for name in stacked) / max(sum(sizes.values()), 1)
    if share < 0.1 or any(w.operator == "bank" for t in targets for w in t.weights):
        return
    said = f"the experts, {share:.0%} of the weights, stay as they are: "
    if any(compat.expert_banks(module) for module in model.modules()):
        able = [name for name, cls in catalogue().items() if "bank" in cls.card.takes]
        yield f"{said}{method.name} takes no banks of experts here ({', '.join(able)} do)"
    else:
        yield (
            f"{said}no method takes experts that are stored transposed, interleaved or with "
            "biases; ask for a size of what is left, and quantize the experts elsewhere"
        )


def _speed_notes(recipe: Recipe, targets: list[Target], dtype: torch.dtype) -> Iterator[str]:
    """Whether factors decode faster than the weights they stand for, in the dtype they are stored
    and loaded in."""
    if recipe.fused and (why := missing()) is not None:
        yield why
    shapes = [w.shape for t in targets for w in t.weights]
    if any(pays(o, i, dtype, fused=recipe.fused) for o, i in shapes):
        return
    name = str(dtype).removeprefix("torch.")
    width = faster_from(dtype, fused=recipe.fused)
    yield (
        f"smaller, not faster here: below a width of about {width} two small {name} products cost "
        "more than one (--fast keeps such weights dense)"
    )
    if not recipe.fused and any(pays(o, i, dtype, fused=True) for o, i in shapes):
        yield "faster through rankine.load(..., fused=True): add --fused to count on it"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
