"""What a factored linear layer is worth at decoding (one token, weights read from memory).

The limit of a speed-up is dense bytes ÷ factored bytes. A share near 1 means that the two small
products stream their weights as well as the one large product does; below some width the second
call costs more than the bytes it saves.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rankine.kernels import aten
from rankine.kernels.fused import fused_linear, fused_lowrank, missing
from rankine.structures import LowRank

#: (outputs, inputs) of a 1.1B Llama's block: hidden 2048, intermediate 5632, 256 key/value.
BLOCK_1B = (
    (2048, 2048),
    (256, 2048),
    (256, 2048),
    (2048, 2048),
    (5632, 2048),
    (5632, 2048),
    (2048, 5632),
)

#: Ranks in whole cache lines: rows that straddle them cost 10 % and more (measured in bfloat16).
ALIGN = 32

Arm = Callable[[], None]

#: How weights lie in memory: as stored, transposed (each input's column together: the product is
#: then a sum of columns, without a reduction per output), or in oneDNN's blocks; "fused" is rows
#: through our own compiled product, both factors in one call.
Layout = Literal["rows", "columns", "packed", "fused"]


class Form(NamedTuple):
    """One layer in one form: its input size, what runs it, the bytes a pass reads."""

    inputs: int
    run: Callable[[Tensor], Tensor]
    bytes: int


@dataclass(frozen=True)
class LinearSpeed:
    """One way to store the same layers: median seconds per pass, bytes read, and against dense
    the median of paired speed-ups and their limit."""

    name: str
    seconds: float
    bytes: int
    speedup: float
    limit: float

    @property
    def share(self) -> float:
        """Speed-up ÷ limit."""
        return self.speedup / self.limit


def interleave(
    arms: Mapping[str, Arm], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every arm, round by round, so that a busy machine is busy for all of them."""
    for arm in arms.values():
        arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            start = clock()
            arm()
            seconds[name].append(clock() - start)
    return seconds


def fair_clock() -> Callable[[], float]:
    """The process's own CPU time where one thread computes (another job's turns do not count),
    wall time where several do."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def rank_for(o: int, i: int, keep: float, align: int = ALIGN) -> int:
    """The largest rank, in steps of `align`, whose factors hold at most `keep` of the weight."""
    rank = int(keep * o * i / (o + i))
    return max(rank // align * align, min(align, rank), 1)


def ranks_for(
    shapes: Sequence[tuple[int, int]], keep: float, align: int = ALIGN, width: float = 0
) -> list[int | None]:
    """A rank per layer at `keep` of all their weights; None (dense) where √(o·i) is below `width`,
    the other layers then give up what those keep."""
    small = [math.sqrt(o * i) < width for o, i in shapes]
    total = sum(o * i for o, i in shapes)
    spared = sum(o * i for (o, i), s in zip(shapes, small) if s)
    rest = (keep * total - spared) / (total - spared) if spared < keep * total else keep
    return [None if s else rank_for(o, i, rest, align) for (o, i), s in zip(shapes, small)]


@torch.no_grad()
def measure_linears(
    shapes: Sequence[tuple[int, int]] = BLOCK_1B,
    keeps: Sequence[float] = (0.7, 0.5, 0.3),
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
    repeats: int = 15,
    align: int = ALIGN,
    layout: Layout = "rows",
    quantized: bool = True,
) -> list[LinearSpeed]:
    """Dense, factored, int8 and int4 forms of `layers` copies of `shapes`, one row of input.

    Choose `layers` so that the weights exceed the last-level cache: then every pass reads them from
    memory, as decoding does. `layout` holds for dense and factored weights alike. Factored rows
    named "fast" leave layers dense that are too small to gain.
    """
    arms_ranks = {f"keep {keep}": ranks_for(shapes, keep, align) for keep in keeps}
    width = faster_from(dtype, fused=layout == "fused")
    if any(math.sqrt(o * i) < width for o, i in shapes) and len(shapes) > 1:
        for keep in keeps:
            arms_ranks[f"keep {keep} fast"] = ranks_for(shapes, keep, align, width)
    forms: dict[str, list[Form]] = {}
    for index, (o, i) in enumerate(list(shapes) * layers):
        dense = nn.Linear(i, o, bias=False, dtype=dtype)
        forms.setdefault("dense", []).append(_form(dense, layout))
        for name, ranks in arms_ranks.items():
            rank = ranks[index % len(shapes)]
            stands = dense if rank is None else _filled(LowRank(rank).module(dense))
            forms.setdefault(name, []).append(_form(stands, layout))
        if quantized:
            for name, form in _quantized(dense.weight.detach()):
                forms.setdefault(name, []).append(form)
    x = {i: torch.randn(1, 1, i, dtype=dtype) for _, i in shapes}
    arms = {name: _pass(parts, x) for name, parts in forms.items()}
    sizes = {name: sum(form.bytes for form in parts) for name, parts in forms.items()}
    return _speeds(interleave(arms, repeats, fair_clock()), sizes)


def _pass(parts: Sequence[Form], x: dict[int, Tensor]) -> Arm:
    calls = [(form.run, x[form.inputs]) for form in parts]

    def arm() -> None:
        for run, row in calls:
            run(row)

    return arm


def _speeds(seconds: dict[str, list[float]], size: dict[str, int]) -> list[LinearSpeed]:
    dense = seconds["dense"]
    return [
        LinearSpeed(
            name,
            statistics.median(own),
            size[name],
            statistics.median(d / s for d, s in zip(dense, own)),
            size["dense"] / size[name],
        )
        for name, own in seconds.items()
    ]


def _filled(module: nn.Module) -> nn.Module:
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module.eval()


def _form(module: nn.Module, layout: Layout) -> Form:
    inputs = module.in_features
    assert isinstance(inputs, int)
    return Form(inputs, _laid_out(module, layout), parameter_bytes(module))


def _laid_out(module: nn.Module, layout: Layout) -> Callable[[Tensor], Tensor]:
    if isinstance(module, nn.Linear):
        return _laid_out_linear(module, layout)
    down, up = module.down, module.up
    assert isinstance(down, nn.Linear)
    assert isinstance(up, nn.Linear)
    if layout == "fused":
        return lambda x: fused_lowrank(x, down.weight, up.weight)
    first, second = _laid_out_linear(down, layout), _laid_out_linear(up, layout)
    return module if layout != "packed" else lambda x: second(first(x))


def _laid_out_linear(module: nn.Linear, layout: Layout) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach()
    if layout == "fused":
        return lambda x: fused_linear(x, weight)
    if layout == "packed":
        packed = aten.pack(weight)
        return lambda x: aten.packed_linear(x, packed)
    if layout == "columns":
        module.weight.data = weight.T.contiguous().T
    return module


def _quantized(w_oi: Tensor) -> list[tuple[str, Form]]:
    i = w_oi.shape[1]
    codes, scale = aten.quantize_int8(w_oi)
    packed, scale_zero = aten.quantize_int4(w_oi)
    int8 = Form(i, lambda x: aten.int8_linear(x, codes, scale), _bytes(codes, scale))
    int4 = Form(i, lambda x: aten.int4_linear(x, packed, scale_zero), _bytes(packed, scale_zero))
    return [("int8", int8), ("int4", int4)]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes behind a module's parameters and buffers, shared storage once."""
    storages = [t.untyped_storage() for t in module.state_dict().values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


# -- below which width two products cost more than one ---------------------------------------------
#: √(outputs · inputs) from which factors at keep 0.7 decode faster than the dense weight through
#: torch's products, one thread. Measured by `python benchmarks/speed/factored_linears.py --widths`
#: on an AMD EPYC with AVX-512, torch 2.13: a bfloat16 product costs 15 µs to start, a float32 one
#: 5 µs.
FASTER_FROM = {torch.float32: 512, torch.bfloat16: 1536}
#: The same where dense and factored layers decode through `kernels.fused`.
FUSED_FASTER_FROM = {torch.float32: 384, torch.bfloat16: 384}

WIDTHS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)

#: More weights in rotation than caches hold.
ROTATION_BYTES = 96 << 20


def faster_from(dtype: torch.dtype = torch.float32, *, fused: bool = False) -> int:
    """The width below which a factored layer is smaller, not faster (on a CPU, one token).

    `dtype`: of the weights as they are run. `fused`: does the model run inside `rankine.fused`?
    Without a compiler, or in another dtype, that changes nothing.
    """
    if fused and dtype in FUSED_FASTER_FROM and missing() is None:
        return FUSED_FASTER_FROM[dtype]
    return FASTER_FROM.get(dtype, max(FASTER_FROM.values()))


def pays(o: int, i: int, dtype: torch.dtype = torch.float32, *, fused: bool = False) -> bool:
    """Does factoring an (o, i) weight speed up decoding here? Arguments as for `faster_from`."""
    width = math.sqrt(o * i)
    if width >= faster_from(dtype):
        return True
    # The compiler is asked last: narrow weights need none.
    return fused and width >= FUSED_FASTER_FROM.get(dtype, math.inf) and missing() is None


@torch.no_grad()
def measure_widths(
    keep: float = 0.7,
    dtype: torch.dtype = torch.float32,
    repeats: int = 9,
    layout: Layout = "rows",
) -> dict[int, float]:
    """Speed-up of factored square layers over dense ones by width: one token, weights in rotation
    through more memory than the caches hold, in at most 400 layers (narrow models are not deeper).
    """
    found = {}
    for width in WIDTHS:
        copies = max(4, min(400, ROTATION_BYTES // (width * width * dtype.itemsize)))
        rows = measure_linears(
            ((width, width),),
            (keep,),
            dtype=dtype,
            layers=copies,
            repeats=repeats,
            layout=layout,
            quantized=False,
        )
        found[width] = next(row.speedup for row in rows if row.name == f"keep {keep}")
    return found


def crossing(speedups: Mapping[int, float]) -> int:
    """The smallest width from which on every speed-up is above 1; above all of them if none is."""
    widths = sorted(speedups)
    slow = [width for width in widths if speedups[width] <= 1]
    if not slow:
        return widths[0]
    above = [width for width in widths if width > slow[-1]]
    return above[0] if above else 2 * widths[-1]
