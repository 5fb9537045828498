"""What is measured: moments, gradients; streamed block by block."""

from rankine.statistics.fisher import Fisher, WeightFisher
from rankine.statistics.found import Statistics
from rankine.statistics.moments import (
    CrossSum,
    InputMagnitude,
    InputMoment,
    Lookups,
    Moment,
    MomentSum,
    Need,
    OutputGradient,
)
from rankine.statistics.survey import survey
from rankine.statistics.walk import Walk, as_walked

__all__ = [
    "CrossSum",
    "Fisher",
    "InputMagnitude",
    "InputMoment",
    "Lookups",
    "Moment",
    "MomentSum",
    "Need",
    "OutputGradient",
    "Statistics",
    "Walk",
    "WeightFisher",
    "as_walked",
    "survey",
]
