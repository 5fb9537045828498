"""What is measured: moments, gradients; streamed block by block."""

from rankine.statistics.moments import InputMoment, Moment, MomentSum, Need, OutputGradient
from rankine.statistics.survey import Statistics, survey
from rankine.statistics.walk import Walk, as_walked

__all__ = [
    "InputMoment",
    "Moment",
    "MomentSum",
    "Need",
    "OutputGradient",
    "Statistics",
    "Walk",
    "as_walked",
    "survey",
]
