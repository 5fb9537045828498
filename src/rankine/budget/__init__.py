"""Who gets how many bits: the vocabulary of sizes, bids, and the rules that share a budget."""

from rankine.budget.bids import Bid, Option, total_bits, total_loss
from rankine.budget.units import Budget, format_bytes, parse_size

__all__ = [
    "Bid",
    "Budget",
    "Option",
    "format_bytes",
    "parse_size",
    "total_bits",
    "total_loss",
]
