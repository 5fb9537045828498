"""Linear layers and factored linear layers of a finished model, decoding through the compiled
products of `kernels.fused`: for one row each weight is read once, at the speed of memory.

Only forward passes change hands: modules, weights and state dict stay what they are. Longer inputs,
gradients, other devices and machines without a compiler take torch's products as before. Forward
hooks on `down` and `up` are not called for a single row.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from rankine.kernels.fused import fused_linear, fused_lowrank
from rankine.structures.lowrank import LowRankLinear


def fused(model: nn.Module) -> ExitStack:
    """Swap the forward passes, in place; closing the result, or leaving it as a context, puts back
    what this call swapped. Kept open, it holds for the model's life.

        with rankine.fused(model):
            model.generate(...)
    """
    swapped = ExitStack()
    for module in model.modules():
        forward = _forward(module)
        if forward is not None and "forward" not in vars(module):
            module.forward = forward  # an instance attribute: it shadows the class's own
            swapped.callback(delattr, module, "forward")
    return swapped


def _forward(module: nn.Module) -> partial[Tensor] | None:
    if type(module) is nn.Linear:
        return partial(_run_linear, module)
    if type(module) is LowRankLinear and module.act is None:
        return partial(_run_lowrank, module)
    return None


def _run_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return fused_linear(x, module.weight, module.bias)


def _run_lowrank(module: LowRankLinear, x: Tensor) -> Tensor:
    down, up = module.down, module.up
    if type(down) is nn.Linear and type(up) is nn.Linear:
        return fused_lowrank(x, down.weight, up.weight, up.bias)
    return LowRankLinear.forward(module, x)  # an adapter or codes stand in a factor's place
