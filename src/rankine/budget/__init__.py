"""Who gets how many bits: the vocabulary of sizes, bids, and the rules that share a budget.

>>> bids = [
...     Bid("q", ("q",), (Option("rank 8", 64, 0.2), Option("dense", 160, 0.0)), dense_bits=160),
...     Bid("v", ("v",), (Option("rank 8", 64, 0.5), Option("dense", 160, 0.0)), dense_bits=160),
... ]
>>> chosen = Knapsack().allocate(bids, bits=Budget(keep=0.7).total_bits(weights=20))
>>> {target: option.structure for target, option in chosen.items()}
{'q': 'rank 8', 'v': 'dense'}
"""

from rankine.budget.allocators import Allocator, Ceiling, Energy, Entropic, Threshold, Uniform
from rankine.budget.bids import Bid, Option, total_bits, total_loss
from rankine.budget.knapsack import Knapsack
from rankine.budget.units import Budget, format_bytes, parse_size

__all__ = [
    "Allocator",
    "Bid",
    "Budget",
    "Ceiling",
    "Energy",
    "Entropic",
    "Knapsack",
    "Option",
    "Threshold",
    "Uniform",
    "format_bytes",
    "parse_size",
    "total_bits",
    "total_loss",
]
