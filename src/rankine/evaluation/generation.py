"""A sample of what a model writes, and whether it is degenerate: broken, not merely worse.

A small healthy model repeats itself, and source code repeats by nature. So the limits lie where
only a broken model gets to (one token over and over, a short phrase over and over, nothing at all,
logits that are no numbers) and a sample is also compared with the dense model's where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankine.errors import UserError
from rankine.progress import counted
from rankine.tasks.language import context_length
from rankine.tasks.score import logits_of
from rankine.tasks.task import device_of

#: Fewer tokens than this tell nothing about repetition.
ENOUGH = 24
#: A run of one token longer than this share of the output (white space is judged by the cycle).
SAME_TOKEN = 0.5
#: A cycle of at most this many tokens ...
PERIOD = 8
#: ... that fills at least this share of the output.
CYCLE = 0.75
#: Distinct 4-grams among all of them, at least.
DISTINCT = 0.15


@dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt: text and new tokens; `finite`: all logits were numbers."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finite: bool = True

    def problem(self) -> str | None:
        """Why this output is degenerate, in one sentence; None for one that is not."""
        if not self.finite:
            return "the logits are not finite (NaN or infinity)"
        if not self.tokens or not self.text.strip():
            return "the output is empty"
        return repetition(self.tokens)


@torch.inference_mode()
def draw(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Sample:
    """Continue `prompt` with a cache: greedy at temperature 0, else drawn by `seed`. Stops at the
    tokenizer's end-of-text token and where the model's context ends (see `fitted`)."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device_of(model))
    ids, new_tokens = fitted(model, ids, new_tokens)
    inputs: dict[str, Any] = {"input_ids": ids}
    tokens: list[int] = []
    for _ in range(new_tokens):
        out = model(**inputs, use_cache=True)
        logits_v = logits_of(out)[0, -1].float().cpu()
        if not torch.isfinite(logits_v).all():
            return Sample(prompt, tokenizer.decode(tokens), tuple(tokens), finite=False)
        token = _pick(logits_v, temperature, generator)
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
        step = torch.tensor([[token]], device=ids.device)
        inputs = {"input_ids": step, "past_key_values": out.past_key_values}
    return Sample(prompt, tokenizer.decode(tokens), tuple(tokens))


def fitted(model: nn.Module, ids_1t: Tensor, new_tokens: int) -> tuple[Tensor, int]:
    """The end of a prompt, and the new tokens, that the model's context holds together: all of
    both, or else new tokens in at most its second half. Raises UserError for a prompt without
    tokens."""
    if not ids_1t.numel():
        raise UserError("expected a prompt of at least one token, found none")
    context = context_length(getattr(model, "config", None))
    if context is None:
        return ids_1t, new_tokens
    ids_1t = ids_1t[:, -max(context - new_tokens, context // 2, 1) :]
    return ids_1t, min(new_tokens, context - ids_1t.shape[1])


def sample(model: nn.Module, tokenizer: Any, prompt: str, **knobs: Any) -> str:
    """The text of `draw`."""
    return draw(model, tokenizer, prompt, **knobs).text


def _pick(logits_v: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_v.argmax())
    return int(torch.multinomial((logits_v / temperature).softmax(-1), 1, generator=generator))


def repetition(tokens: tuple[int, ...]) -> str | None:
    """Why a token sequence is a loop, in one sentence; None for one that is not."""
    n = len(tokens)
    if n < ENOUGH:
        return None
    run, token = longest_run(tokens)
    if run > SAME_TOKEN * n:
        return f"one token ({token}) fills {run} of {n} places in a row"
    for period in range(2, PERIOD + 1):
        length = longest_cycle(tokens, period)
        if length >= CYCLE * n:
            return f"{period} tokens over and over fill {length} of {n} places"
    grams = [tokens[i : i + 4] for i in range(n - 3)]
    distinct = len(set(grams)) / len(grams)
    if distinct < DISTINCT:
        return f"only {distinct:.0%} of the 4-token sequences are distinct"
    return None


def longest_run(tokens: tuple[int, ...]) -> tuple[int, int]:
    """(length, token) of the longest run of one token."""
    best, length = (0, -1), 0
    for i, token in enumerate(tokens):
        length = length + 1 if i and token == tokens[i - 1] else 1
        best = max(best, (length, token))
    return best


def longest_cycle(tokens: tuple[int, ...], period: int) -> int:
    """Tokens in the longest stretch that repeats with this period, counted when it does so at
    least three times."""
    best = length = 0
    for i in range(period, len(tokens)):
        length = length + 1 if tokens[i] == tokens[i - period] else 0
        best = max(best, length)
    return best + period if best >= 2 * period else 0


def degenerate(
    model: nn.Module,
    tokenizer: Any,
    prompts: tuple[str, ...],
    *,
    dense: nn.Module | None = None,
    new_tokens: int = 64,
    temperature: float = 0.8,
    seed: int = 0,
) -> str | None:
    """Why the model's output is degenerate on most prompts, in one sentence; None when it is not.

    Drawn, not greedy: greedy output of a healthy small model may loop. With `dense`, prompts on
    which the dense model fails as well do not count.
    """

    def problem(m: nn.Module, prompt: str) -> str | None:
        knobs = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed}
        return draw(m, tokenizer, prompt, **knobs).problem()  # type: ignore[arg-type]

    judged, found = 0, []
    for prompt in counted(prompts, "samples"):
        if dense is None or problem(dense, prompt) is None:
            judged += 1
            found += [reason] if (reason := problem(model, prompt)) else []
    if found and 2 * len(found) > judged:
        return f"the output is degenerate on {len(found)} of {judged} prompts: {found[0]}"
    return None
