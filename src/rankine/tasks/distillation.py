"""Distillation: another task's data and score, and a loss that follows a teacher as well.

    loss = ce_weight · task's loss + kl_weight · T² · KL(p_T ‖ q_T),  p, q: teacher's, student's

T² keeps the gradient's size when the temperature changes (Hinton et al., arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rankine.errors import UserError
from rankine.tasks.score import logits_of
from rankine.tasks.task import Task


class Distillation:
    """`task` with a teacher, whose outputs are logits of the student's shape: (b, ..., classes).

    The divergence is the mean over an example's positions that the task's mask counts. The teacher
    stays on its own device and is never trained.
    """

    def __init__(
        self,
        task: Task,
        teacher: nn.Module,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 1.0,
        temperature: float = 1.0,
    ):
        if min(kl_weight, ce_weight) < 0 or kl_weight + ce_weight == 0 or temperature <= 0:
            raise UserError(
                "expected weights of at least 0, one above it, and a temperature above 0, found "
                f"kl_weight {kl_weight:g}, ce_weight {ce_weight:g}, temperature {temperature:g}"
            )
        self.task, self.teacher = task, teacher
        self.kl_weight, self.ce_weight, self.temperature = kl_weight, ce_weight, temperature

    def batches(self, split: str) -> Iterable[Any]:
        """See `Task.batches`."""
        return self.task.batches(split)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """See `Task.run`."""
        return self.task.run(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """(examples,) the sum above; the teacher runs here."""
        total = torch.zeros(())
        if self.kl_weight:
            total = self.kl_weight * self.divergence(outputs, batch)
        if self.ce_weight:
            task_loss = self.task.loss(outputs, batch)
            total = total.to(task_loss) + self.ce_weight * task_loss
        return total

    def divergence(self, outputs: Any, batch: Any) -> Tensor:
        """(examples,) T² · KL(teacher ‖ student) in nats, mean over the positions that count."""
        student = logits_of(outputs)
        with torch.no_grad():
            teacher = logits_of(self.task.run(self.teacher, batch)).to(student.device)
        if teacher.shape != student.shape:
            raise UserError(
                f"expected a teacher with outputs {tuple(student.shape)}, found "
                f"{tuple(teacher.shape)}: take the model that was compressed"
            )
        if student.ndim < 2 or student.shape[-1] < 2:
            raise UserError(
                "expected outputs with a distribution over classes to distil, found shape "
                f"{tuple(student.shape)}: train on the loss alone (kl_weight=0)"
            )
        log_p = (teacher.float() / self.temperature).log_softmax(-1)
        log_q = (student.float() / self.temperature).log_softmax(-1)
        nats = self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        mask = self.task.mask(batch)
        alike = mask is not None and mask.shape == nats.shape
        counts = mask.to(nats) if mask is not None and alike else torch.ones_like(nats)
        return (nats * counts).reshape(len(nats), -1).sum(1) / counts.reshape(len(nats), -1).sum(1)

    def terms(self, batch: Any) -> Tensor:
        """See `Task.terms`."""
        return self.task.terms(batch)

    def mask(self, batch: Any) -> Tensor | None:
        """See `Task.mask`."""
        return self.task.mask(batch)

    def score(self, model: nn.Module) -> dict[str, float]:
        """See `Task.score`."""
        return self.task.score(model)

    def fingerprint(self, split: str = "calibration") -> str:
        """See `Task.fingerprint`."""
        return self.task.fingerprint(split)


def check_vocabulary(student: nn.Module, teacher: nn.Module, ours: Any, theirs: Any) -> None:
    """Raises UserError unless both models, with tokenizers `ours` and `theirs` (None: unknown),
    speak of the same tokens."""
    sizes = [getattr(getattr(m, "config", None), "vocab_size", None) for m in (student, teacher)]
    same = sizes[0] == sizes[1]
    if same and ours is not None and theirs is not None:
        same = ours.get_vocab() == theirs.get_vocab()
    if not same:
        found = f"{sizes[1]} against {sizes[0]} tokens" if sizes[0] != sizes[1] else "other tokens"
        raise UserError(
            f"expected a teacher with the vocabulary of the model, found one with {found}: take "
            "the model that was compressed, or one of its family with the same tokenizer"
        )
