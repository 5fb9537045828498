"""Which weights a run works on: everything inside the blocks, or what globs say."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from rankine.anatomy.parts import Anatomy, Target, Weight
from rankine.errors import UserError


def weight_targets(
    anatomy: Anatomy,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    banks: bool = False,
    tables: bool = False,
) -> list[Target]:
    """One target per weight, in execution order.

    Without `include`: every linear inside a block, no embedding, no head. With it: every weight of
    the model whose path matches one of its globs, wherever it stands. `exclude` then takes its
    matches away. `banks`: stacked experts too, a bank being one target. `tables`: embeddings too;
    what shares an embedding's storage (an output layer) is one target with it. Raises UserError on
    a glob that matches no weight, and when nothing is left.
    """
    for glob in (*include, *exclude):
        _check(anatomy, glob)
    if include:
        chosen = [w for w in anatomy.weights if _matches(w, include)]
    else:
        chosen = [w for w in anatomy.linears if w.operator != "embedding"]
    kept = [w for w in chosen if not _matches(w, exclude)]
    taken = [w for w in kept if banks or w.operator != "bank"]
    if kept and not taken:
        raise UserError(
            f"expected linear weights, found only stacked experts ({kept[0].path}), which this "
            "method does not take: auto, kfac_svd, rtn, svd and svd_llm do"
        )
    if not kept:
        raise UserError(
            "expected at least one weight to compress, found none: "
            + ("include and exclude leave nothing" if chosen else "the model has no linear layer")
        )
    found = dict.fromkeys(
        _table(anatomy, w, tables, exclude) if w.operator == "embedding" else Target((w,))
        for w in taken
    )
    inside = {path for target in found for path in target.members[1:]}
    return [target for target in found if target.members[0] not in inside]


def _table(anatomy: Anatomy, weight: Weight, tables: bool, exclude: Sequence[str]) -> Target:
    """The table that an embedding is, or shares, with every weight that shares it."""
    if not tables:
        raise UserError(
            f"expected linear weights, found the embedding {weight.path}, which this method does "
            "not take: exclude it, or use afm or svd"
        )
    first = next((w for w in anatomy.weights if f"{w.path}.weight" == weight.tied_with), weight)
    tied = [w for w in anatomy.weights if w.tied_with == f"{first.path}.weight"]
    for other in (first, *tied):
        if _matches(other, exclude):
            raise UserError(
                f"expected {weight.path} and {other.path}, which share a matrix, to be "
                "compressed or excluded together: exclude both or neither"
            )
    return Target((first, *tied), "table") if tied else Target((first,))


def _matches(weight: Weight, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(weight.path, glob) for glob in globs)


def _check(anatomy: Anatomy, glob: str) -> None:
    if not any(_matches(weight, (glob,)) for weight in anatomy.weights):
        # One path per role shows the naming scheme best.
        examples = {weight.role: weight.path for weight in reversed(anatomy.weights)}
        shown = ", ".join(list(examples.values())[-4:]) or "none"
        raise UserError(
            f'expected a glob that matches the path of a weight, found "{glob}"; paths: {shown}'
        )
