"""What a weight becomes: values with pure functions, and the module that runs each."""

from rankine.structures.base import Parts, Structure, from_json, matrix, weight_shape
from rankine.structures.decoding import fused
from rankine.structures.dense import Dense
from rankine.structures.lowrank import LowRank
from rankine.structures.quantized import Quantized
from rankine.structures.sum import Sum

__all__ = [
    "Dense",
    "LowRank",
    "Parts",
    "Quantized",
    "Structure",
    "Sum",
    "from_json",
    "fused",
    "matrix",
    "weight_shape",
]
