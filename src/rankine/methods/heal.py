"""Healing: recovery training of a compressed model on text, end to end.

    loss = ce_weight · cross-entropy + kl_weight · T² · KL(teacher ‖ student)

The teacher is the model before compression (arXiv:1503.02531 for the second term). Sizes stay as
they are: only values change. No single paper's schedule: AdamW, warm-up, cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rankine.errors import UserError, suggest
from rankine.method import Card, Learner, Learning, Schedule, method
from rankine.patch import Patch
from rankine.tasks import Task
from rankine.tasks.distillation import Distillation
from rankine.training.heal import Healing, LoraHealing, adapter_places, declared

MODES = ("factors", "lora", "all")


@method
@dataclass(frozen=True)
class Heal(Learning):
    """Knobs:

    - `teacher`: directory or hub id; in a chain the default is the model the chain began with
    - `mode`: "factors" (what the structures declare trainable), "lora" (adapters on the factors, multiplied in at the end), "all" (every weight)
    - `norms`: mode factors also trains the normalisation layers
    - `steps`: optimizer steps
    - `batch`: sequences per step
    - `lr`: the highest learning rate; small models (a few million parameters) take 1e-3
    - `kl_weight`, `ce_weight`: of the two terms; without a teacher the loss is the cross-entropy
    - `temperature`: T, of both distributions
    - `weight_decay`, `warmup`, `floor`, `clip`: AdamW's decay of matrices, share of the steps, last share of `lr`, largest gradient norm
    - `lora_rank`, `lora_alpha`: size and scale (alpha / rank) of the adapters
    """  # noqa: E501

    card = Card(
        name="heal",
        title="Distilling the Knowledge in a Neural Network",
        reference="arXiv:1503.02531",
        authors="Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
        family="training",
        summary="trains factors, or LoRA merged into them, towards the model before compression",
        takes=("linear", "embedding"),
        needs=("training text", "gradients"),
        gives=(),
        after=("dense", "low-rank", "quantization"),
    )

    teacher: str | None = None
    mode: str = "factors"
    norms: bool = False
    steps: int = 300
    batch: int = 8
    lr: float = 3e-4
    kl_weight: float = 1.0
    ce_weight: float = 1.0
    temperature: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.1
    floor: float = 0.1
    clip: float = 1.0
    lora_rank: int = 8
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f'unknown mode "{self.mode}" of heal; {suggest(self.mode, MODES)}')
        if min(self.steps, self.batch) < 1 or self.lr <= 0:
            raise UserError(
                "expected at least one step, one sequence and a learning rate above 0, found "
                f"steps {self.steps}, batch {self.batch}, lr {self.lr:g}"
            )

    @property
    def distils(self) -> bool:
        """Unless `kl_weight` is 0."""
        return self.kl_weight > 0

    @property
    def schedule(self) -> Schedule:
        """The loop's settings."""
        return Schedule(self.steps, self.lr, self.weight_decay, self.warmup, self.floor, self.clip)

    @property
    def sequences(self) -> int | None:
        """`batch`."""
        return self.batch

    def check(self, model: nn.Module, patch: Patch) -> None:
        """Raises UserError where there is nothing that `mode` could train; costs no work."""
        if self.mode == "lora":
            adapter_places(model, patch)
        elif self.mode == "factors":
            declared(model, patch)

    def learner(self, patch: Patch) -> Learner:
        """By `mode`."""
        if self.mode == "lora":
            return LoraHealing(patch, rank=self.lora_rank, alpha=self.lora_alpha)
        return Healing(patch, everything=self.mode == "all", norms=self.norms)

    def objective(self, task: Task, teacher: nn.Module | None) -> Task:
        """Both terms, or the task's loss where there is no teacher."""
        if teacher is None:
            return task
        return Distillation(
            task,
            teacher,
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
            temperature=self.temperature,
        )
