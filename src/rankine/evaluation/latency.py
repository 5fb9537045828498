"""How fast a model answers and what it needs: prefill, decoding with a cache, memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankine import structures
from rankine.evaluation.linears import faster_from, parameter_bytes, pays
from rankine.progress import counted
from rankine.tasks.language import context_length
from rankine.tasks.score import logits_of
from rankine.tasks.task import device_of

__all__ = [
    "Latency",
    "decode_speed",
    "faster_from",
    "measure_latency",
    "parameter_bytes",
    "pays",
    "peak_memory",
    "peak_resident",
]


@dataclass(frozen=True)
class Latency:
    """Medians over repeats: `prefill` seconds for the prompt, `tokens_per_second` of decoding one
    by one with a cache. `speedup`: median of the paired decode ratios against the first model (its
    own is 1). `bytes`: parameters and buffers, shared ones once."""

    prefill: float
    tokens_per_second: float
    speedup: float
    bytes: int


def measure_latency(
    models: Mapping[str, nn.Module],
    prompt: Tensor | int = 64,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    fused: bool = False,
) -> dict[str, Latency]:
    """Latency of causal language models, interleaved: every repeat runs each model once, so that a
    busy machine is busy for all of them. The first model is the one to compare with.

    `prompt`: (1, t) ids, or a number of tokens (fewer, as are `new_tokens`, where the context of a
    model is short). `fused`: time them all inside `rankine.fused`.
    """
    lengths = (context_length(getattr(model, "config", None)) for model in models.values())
    context = min((length for length in lengths if length is not None), default=1 << 40)
    new_tokens = min(new_tokens, context // 2)
    ids_1t = _prompt(models, prompt, context - new_tokens)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with ExitStack() as swapped:
        if fused:
            for model in models.values():
                swapped.enter_context(structures.fused(model))
        for repeat in counted(range(repeats + 1), "speed"):
            for name, model in models.items():
                times = _generate(model, ids_1t, new_tokens)
                if repeat:  # the first round warms up
                    runs[name].append(times)
    first = runs[next(iter(runs))]
    return {
        name: Latency(
            statistics.median(prefill for prefill, _ in own),
            new_tokens / statistics.median(decode for _, decode in own),
            statistics.median(f[1] / o[1] for f, o in zip(first, own)),
            parameter_bytes(models[name]),
        )
        for name, own in runs.items()
    }


def decode_speed(
    model: nn.Module, prompt: Tensor | int = 64, *, new_tokens: int = 32, fused: bool = False
) -> float:
    """Tokens per second of one model alone; compare models with `measure_latency`."""
    found = measure_latency({"": model}, prompt, new_tokens=new_tokens, repeats=3, fused=fused)
    return found[""].tokens_per_second


def _prompt(models: Mapping[str, nn.Module], prompt: Tensor | int, most: int) -> Tensor:
    if isinstance(prompt, Tensor):
        return prompt
    config: Any = next(iter(models.values())).config
    generator = torch.Generator().manual_seed(0)
    shape = (1, min(prompt, most))
    return torch.randint(config.get_text_config().vocab_size, shape, generator=generator)


@torch.inference_mode()
def _generate(model: nn.Module, ids_1t: Tensor, new_tokens: int) -> tuple[float, float]:
    """(prefill seconds, seconds for the tokens after it): greedy, with a cache."""
    device = device_of(model)
    ids = ids_1t.to(device)
    start = _now(device)
    out = model(input_ids=ids, use_cache=True)
    token = logits_of(out)[:, -1:].argmax(-1)
    prefilled = _now(device)
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = logits_of(out)[:, -1:].argmax(-1)
    return prefilled - start, _now(device) - prefilled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- memory ----------------------------------------------------------------------------------------
def peak_memory(run: Callable[[], Any], device: torch.device | None = None) -> int | None:
    """Bytes that `run` needed beyond what was held before it: device memory on CUDA, resident
    memory of this process on Linux; None where neither can be read."""
    if device is not None and device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before_rss = _reset_peak()
    run()
    peak = _status("VmHWM")
    if before_rss is None or peak is None:
        return None
    return max(0, peak - before_rss)


def peak_resident() -> int | None:
    """The most bytes this process has held so far: of the device where one was used, else resident
    ones on Linux; None where neither can be read."""
    if torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _reset_peak() -> int | None:
    """Start a new resident peak; the resident bytes now."""
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return None
    clear.write_text("5")  # resets the peak and nothing else: see proc(5)
    return _status("VmRSS")


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
