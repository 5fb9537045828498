"""Lets `from_pretrained(..., trust_remote_code=True)` load this checkpoint without any import.

The same file stands in every Rankine checkpoint. `import rankine` does the work; the classes are
transformers' own, under their own names.
"""

import transformers

import rankine  # noqa: F401  (tells transformers about the format)


def __getattr__(name: str) -> type:
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = type(name, (base,), {"__module__": __name__, "__doc__": base.__doc__})
    globals()[name] = found
    return found
