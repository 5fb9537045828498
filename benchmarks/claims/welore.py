"""WeLore (2407.11239): one threshold on normalised spectra beats uniform ranks where much is cut;
and the weights that are low-rank are the ones worth training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import nn

from benchmarks.claims.harness import Lab, Row
from rankine.budget import Budget
from rankine.checkpoint import open_model
from rankine.method import Learner, Schedule
from rankine.patch import Patch
from rankine.pipeline import compress
from rankine.tasks import LanguageModelling, Task
from rankine.training.loop import train

TITLE = "welore: ranks by one threshold on normalised spectra; training what was cut"
#: What the threshold must win by where much is cut, and may lose where little is.
GAIN, MILD = 0.10, 0.002
#: The paper's effective rank reduction for the second claim; how near training all must be.
REDUCTION, NEAR = 0.5, 0.02
#: Share of the last steps whose mean is the training loss.
LAST = 0.1


def claims(lab: Lab) -> list[Row]:
    """Both claims of the specification. The first has no seeds: no data, one checkpoint."""
    rows = [_small(lab, keep) for keep in ((0.35, 0.25) if lab.full else (0.35,))]
    rows.append(_mild(lab, 0.8))
    rows += [_middle(lab, keep) for keep in ((0.9, 0.7, 0.5) if lab.full else (0.5,))]
    return [*rows, _whitened(lab, 0.35), *_trained(lab)]


def _row(lab: Lab, keep: float, claim: str, limit: float, rule: str = "assert") -> Row:
    """welore against svd: at most `limit` times its perplexity."""
    ours, svd = lab.arm("welore", keep), lab.arm("svd", keep)
    found = lab.difference(ours, svd)
    holds = ours.perplexity <= limit * svd.perplexity
    return Row(
        "welore",
        claim,
        f"keep {keep}",
        "svd, uniform ranks",
        svd.perplexity,
        ours.perplexity,
        "perplexity",
        holds,
        rule=rule,
        note=f"log-perplexity {found.estimate:+.4f}, 95 % {found.low:+.4f} to {found.high:+.4f}",
        seeds=(0,),
    )


def _small(lab: Lab, keep: float) -> Row:
    claim = f"at least {GAIN:.0%} lower held-out perplexity than uniform ranks"
    return _row(lab, keep, claim, 1 - GAIN)


def _mild(lab: Lab, keep: float) -> Row:
    claim = f"no more than {MILD:.1%} above uniform ranks where little is cut"
    return _row(lab, keep, claim, 1 + MILD)


def _middle(lab: Lab, keep: float) -> Row:
    return _row(lab, keep, "lower held-out perplexity than uniform ranks", 1.0, rule="report")


def _whitened(lab: Lab, keep: float) -> Row:
    """Why this is no default: data is worth more than ranks."""
    ours = lab.arm("welore", keep)
    data = {s: lab.arm("svd_llm", keep, s) for s in lab.seeds}
    mean = float(np.mean([score.perplexity for score in data.values()]))
    return Row(
        "welore",
        "higher held-out perplexity than uniform ranks on whitened factors, which take data",
        f"keep {keep}",
        "svd_llm",
        mean,
        ours.perplexity,
        "perplexity",
        all(lab.difference(data[s], ours).high < 0 for s in lab.seeds),
        rule="report",
        seeds=lab.seeds,
    )


# -- what is worth training -----------------------------------------------------------------------
def _trained(lab: Lab) -> list[Row]:
    steps, batch, length = (500, 8, 256) if lab.full else (60, 4, 256)
    seeds = lab.seeds if lab.full else lab.seeds[:1]
    size = f"{steps} steps of {batch} x {length} tokens"
    loss = partial(_training_loss, lab, steps=steps, batch=batch, length=length)
    cut = {s: loss("low_rank", seed=s) for s in seeds}
    rest = {s: loss("dense", seed=s) for s in seeds}
    everything = {s: loss("everything", seed=s) for s in seeds}
    mean = float(np.mean([found[0] for found in cut.values()]))
    of_rest = float(np.mean([found[0] for found in rest.values()]))
    of_all = float(np.mean([found[0] for found in everything.values()]))
    counts = f"{cut[seeds[0]][1]:,.0f} against {rest[seeds[0]][1]:,.0f} numbers trained; {size}"
    budget = f"rank reduction {REDUCTION:.0%}"
    return [
        Row(
            "welore",
            "training the factors of what was cut ends at a lower training loss than training as "
            "many numbers of what was not, every seed",
            budget,
            "dense weights",
            of_rest,
            mean,
            "nats per token",
            all(cut[s][0] < rest[s][0] for s in seeds),
            note=counts,
            seeds=seeds,
        ),
        Row(
            "welore",
            f"training the factors of what was cut ends within {NEAR:.0%} of the training loss of "
            "training everything",
            budget,
            "all weights",
            of_all,
            mean,
            "nats per token",
            all(cut[s][0] <= (1 + NEAR) * everything[s][0] for s in seeds),
            note=size,
            seeds=seeds,
        ),
    ]


class Chosen(Learner):
    """Trains the parameters of these names."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def prepare(self, model: nn.Module, task: Task) -> None:
        """Freeze the others."""
        model.eval().requires_grad_(False)
        for name in self.names:
            model.get_parameter(name).requires_grad_(True)

    def finish(self, model: nn.Module, budget: Budget | None) -> Patch:
        """Only the losses are wanted."""
        return Patch()


def _training_loss(
    lab: Lab, what: str, seed: int, steps: int, batch: int, length: int
) -> list[float]:
    """(mean loss of the last steps, how many numbers were trained)."""

    def run() -> list[float]:
        cut = compress(
            lab.model,
            method="welore",
            set={"budget_kind": "rank"},
            keep=1 - REDUCTION,
            evaluate=False,
        )
        factors = [f"{path}.{part}.weight" for path in cut.patch.modules for part in ("down", "up")]
        left = [t.id for t in cut.stages[0].targets if t.id not in cut.patch.modules]
        model = cut.model.float()

        def count(names: Sequence[str]) -> int:
            return sum(model.get_parameter(name).numel() for name in names)

        names = {
            "low_rank": factors,
            "dense": _as_many(model, left, count(factors), seed),
            "everything": [name for name, _ in model.named_parameters()],
        }[what]
        _, tokenizer, _ = open_model(lab.model, "cpu", "auto")
        task = LanguageModelling(tokenizer, sequences=8, length=length, batch_size=batch, seed=seed)
        schedule = Schedule(steps, lr=5e-4)
        _, losses = train(model, task, Chosen(names), schedule, seed=seed)
        last = losses[-max(1, int(LAST * steps)) :]
        return [sum(last) / len(last), float(count(names))]

    key = {
        "figures": "training loss",
        "of": what,
        "seed": seed,
        "steps": steps,
        "tokens": f"{batch}x{length}",
    }
    return lab.figures(key, run)


def _as_many(model: nn.Module, paths: Sequence[str], wanted: int, seed: int) -> list[str]:
    """Names of whole weights, drawn by the seed, of `wanted` numbers at most."""
    order = sorted(paths)
    random.Random(seed).shuffle(order)
    names: list[str] = []
    for path in order:
        size = model.get_parameter(f"{path}.weight").numel()
        if size <= wanted:
            names.append(f"{path}.weight")
            wanted -= size
    return names
