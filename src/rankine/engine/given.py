"""The task that a recipe's own words make: text for a language model, or the user's batches,
forward, loss and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rankine import own
from rankine.errors import UserError
from rankine.method import Compressor, Method
from rankine.recipe import Recipe
from rankine.tasks import FunctionTask, LanguageModelling, Task
from rankine.tasks.language import TOKENS_AT_ONCE, context_length, parse_tokens, vocabulary

#: Bytes of float32 logits that a batch may have: a large vocabulary wants smaller batches.
LOGITS = 1 << 28
#: The same where the weights do not fit into memory.
FEW_LOGITS = 1 << 26


def task_of(recipe: Recipe, model: nn.Module, tokenizer: Any, logits: int = LOGITS) -> Task:
    """Language modelling where calibration is text and there is a tokenizer, else `own_task`.

    Raises UserError for text without a tokenizer, and for a forward or a loss without batches.
    """
    if not is_text(recipe.calibration):
        return own_task(recipe)
    if tokenizer is None:
        if "calibration" in recipe.model_fields_set:
            raise UserError(
                "expected a tokenizer beside the model, found none: save one into the directory, "
                "or pass tokenizer= or batches of your own as calibration= to rankine.compress"
            )
        return own_task(recipe)
    if recipe.forward is not None or recipe.loss is not None:
        raise UserError(
            "expected batches of your own for your forward and loss, found text: pass "
            "calibration= too (--calibration package.module:batches)"
        )
    return language_task(recipe, model, tokenizer, logits)


def is_text(source: Any) -> bool:
    """A file, a data set, "embedded" or a list of texts? (Else: batches, or the name of some.)"""
    if isinstance(source, str):
        return not own.is_name(source)
    return isinstance(source, Sequence) and len(source) > 0 and isinstance(source[0], str)


def language_task(
    recipe: Recipe, model: nn.Module, tokenizer: Any, logits: int = LOGITS
) -> LanguageModelling:
    """Language modelling by the recipe's calibration and evaluation text."""
    if tokenizer is None:
        raise UserError(
            "expected a tokenizer beside the model, found none: save one into the directory, or "
            "pass tokenizer= or your own task= to rankine.compress"
        )
    sequences, length = parse_tokens(recipe.tokens)
    return LanguageModelling(
        tokenizer,
        recipe.calibration,
        recipe.evaluation,
        sequences=sequences,
        length=length,
        max_tokens=max(recipe.eval_tokens, 2),
        context=context_length(getattr(model, "config", None)),
        column=recipe.text_column,
        seed=recipe.seed,
        tokens_at_once=min(TOKENS_AT_ONCE, logits // (4 * vocabulary(model))),
        evaluate=metrics_of(recipe),
    )


def own_task(recipe: Recipe) -> FunctionTask:
    """The user's own parts. Training takes the calibration batches."""

    def batches(source: Any, what: str) -> list[Any]:
        return [] if is_text(source) else list(own.iterable(source, what))

    calibration = batches(recipe.calibration, "calibration")
    return FunctionTask(
        calibration,
        own.function(recipe.forward, "forward"),
        own.function(recipe.loss, "loss"),
        metrics_of(recipe),
        train=calibration,
        evaluation=batches(recipe.evaluation, "evaluation"),
    )


def metrics_of(recipe: Recipe) -> Any:
    """The user's `evaluate`, if one was given."""
    return None if isinstance(recipe.evaluate, bool) else own.function(recipe.evaluate, "evaluate")


def check_data(task: Task, methods: Sequence[Method]) -> None:
    """Raises UserError for a method that measures what the task of the user does not give."""
    if not isinstance(task, FunctionTask):
        return
    for method in methods:
        if not isinstance(method, Compressor):
            continue
        if method.card.needs and not task.has_data:
            raise UserError(
                f"expected calibration data for {method.name}, found none: pass calibration= "
                "batches (--calibration package.module:batches), or take svd, which needs none"
            )
        if method.needs_loss and not task.has_loss:
            raise UserError(
                f"expected a loss per example for {method.name}, found none: pass loss=lambda "
                "outputs, batch: ... (--loss package.module:name), or take svd_llm, which does "
                "without"
            )
