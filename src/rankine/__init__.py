"""Rankine: smaller neural networks by low-rank and structured factorizations.

The verbs, each the same as `rankine <verb>` on the command line. Nothing heavy is imported until
one of them is used.
"""

import importlib
import logging
from inspect import isfunction
from typing import TYPE_CHECKING, Any

from rankine._register import register_with_transformers
from rankine.manners import leaves_as_found
from rankine.threads import passive

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())
register_with_transformers()

#: Public name → where it lives.
_PUBLIC = {
    "compress": "rankine.pipeline",
    "plan": "rankine.pipeline",
    "compare": "rankine.pipeline",
    "inspect": "rankine.checkpoint.contents",
    "evaluate": "rankine.evaluation.evaluate",
    "heal": "rankine.engine.heal",
    "export": "rankine.checkpoint.formats",
    "load": "rankine.checkpoint",
    "save": "rankine.checkpoint",
    "fused": "rankine.structures",
    "catalogue": "rankine.discovery",
    "Recipe": "rankine.recipe",
    "UserError": "rankine.errors",
    "BudgetError": "rankine.errors",
    "AcceptanceError": "rankine.errors",
}

if TYPE_CHECKING:
    from rankine.checkpoint.contents import inspect as inspect
    from rankine.checkpoint.formats import export as export
    from rankine.checkpoint.load import load as load
    from rankine.checkpoint.save import save as save
    from rankine.discovery import catalogue as catalogue
    from rankine.engine.heal import heal as heal
    from rankine.errors import AcceptanceError as AcceptanceError
    from rankine.errors import BudgetError as BudgetError
    from rankine.errors import UserError as UserError
    from rankine.evaluation.evaluate import evaluate as evaluate
    from rankine.pipeline import compare as compare
    from rankine.pipeline import compress as compress
    from rankine.pipeline import plan as plan
    from rankine.recipe import Recipe as Recipe
    from rankine.structures.decoding import fused as fused


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rankine' has no attribute {name!r}")
    with passive():
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    if isfunction(value):
        value = leaves_as_found(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
