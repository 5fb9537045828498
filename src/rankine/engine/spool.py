"""Where a stage's statistics wait for its bids and fits, and when they may go: what nobody asks
for again is replaced by a mark that names the entries it went into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from rankine.anatomy import Target, Weight
from rankine.checkpoint import Journal
from rankine.engine.run import Run
from rankine.engine.surveys import survey_journal
from rankine.statistics import Need, OutputGradient, WeightFisher

#: Key of the mark: the entries (stage, unit) that must stand for the statistics not to be missed.
WENT_INTO = "went_into"


def unit_of(weight: Weight, need: Need) -> str:
    """The survey's unit in which a need is measured."""
    kind = "grad" if isinstance(need, OutputGradient | WeightFisher) else "in"
    return f"{kind}-{weight.block}"


def units_for(target: Target, needs: Mapping[str, frozenset[Need]]) -> frozenset[str]:
    """The survey's units that a target waits for."""
    return frozenset(
        unit_of(weight, need) for weight in target.weights for need in needs.get(weight.path, ())
    )


@dataclass
class Spool:
    """Entries of `journal` under `name`, one per unit ("in-3", "grad-3"). `results`: where the
    bids and fits are that they go into; a survey that others share is left as it is. `users`: unit
    → the targets that read it. Of several ranks one `leads`: it writes and drops."""

    journal: Journal
    name: str
    results: Journal
    users: Mapping[str, Sequence[Target]]
    leads: bool = True
    _freed: set[str] = field(default_factory=set)

    def load(self, unit: str) -> Mapping[str, Tensor] | None:
        """A unit's tensors; none of them once it was freed; None where it must be measured."""
        entry = self.journal.get(self.name, unit)
        if entry is None:
            return None
        tensors, meta = entry
        if all(self.results.get(*went) is not None for went in meta.get(WENT_INTO, ())):
            return tensors
        return None

    def keep(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a unit's tensors."""
        self.journal.put(self.name, unit, tensors)

    def free(self, unit: str, went_into: Sequence[tuple[str, str]]) -> None:
        """Drop a unit's tensors: these entries stand for all that they were good for."""
        if self.leads and self.journal is self.results and unit not in self._freed:
            self._freed.add(unit)
            self.journal.put(self.name, unit, {}, {WENT_INTO: [list(entry) for entry in went_into]})


@contextmanager
def open_spool(
    run: Run, number: int, targets: Sequence[Target], needs: Mapping[str, frozenset[Need]]
) -> Iterator[Spool]:
    """The spool of a stage; it may be read, and freed, after this is closed."""
    users: dict[str, list[Target]] = {}
    for target in targets:
        for unit in sorted(units_for(target, needs)):
            users.setdefault(unit, []).append(target)
    with survey_journal(run, number, needs) as journal:
        yield Spool(journal, f"survey-{number}", run.journal, users, run.group.leads)
