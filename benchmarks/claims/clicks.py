"""A click-through model of our own and the generator of clicks that AFM's specification describes:
12 fields of 50 to 20,000 Zipf-distributed ids, a hidden vector for each id; the log-odds of a click
are the second-order factorization machine of these vectors plus a random tanh network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankine.method import Schedule
from rankine.patch import Patch
from rankine.tasks import FunctionTask
from rankine.training.heal import Healing
from rankine.training.loop import train

NAME = "a DeepFM (embeddings of 16, three layers of 400), trained here"
FIELDS, HIDDEN, ZIPF = 12, 4, 1.1
SIZES = tuple(int(v) for v in np.geomspace(50, 20_000, FIELDS))
WIDTH, LAYER, BATCH = 16, 400, 1024
#: Of training from the start, and of fine-tuning (ten times less, as the specification asks).
RATE, TUNING_RATE = 2e-3, 2e-4

Batch = dict[str, Tensor]


class DeepFM(nn.Module):
    """First-order weights, factorization machine and MLP on one embedding for each field."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(v, WIDTH) for v in SIZES)
        self.wide = nn.ModuleList(nn.Embedding(v, 1) for v in SIZES)
        self.first = nn.Linear(FIELDS * WIDTH, LAYER)
        self.second, self.third = nn.Linear(LAYER, LAYER), nn.Linear(LAYER, LAYER)
        self.last = nn.Linear(LAYER, 1)
        for table in (*self.tables, *self.wide):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        """(n, fields) ids → (n,) log-odds."""
        e_nfd = torch.stack([table(ids[:, f]) for f, table in enumerate(self.tables)], 1)
        pairs_n = 0.5 * (e_nfd.sum(1).square() - e_nfd.square().sum(1)).sum(1)
        wide_n = torch.cat([table(ids[:, f]) for f, table in enumerate(self.wide)], 1).sum(1)
        x = torch.relu(self.first(e_nfd.flatten(1)))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        return self.last(x).squeeze(1) + pairs_n + wide_n


@dataclass(frozen=True)
class Clicks:
    """Batches of a split each."""

    train: list[Batch]
    test: list[Batch]

    def task(self, calibration: int = 0) -> FunctionTask:
        """Click or no click, a row an example."""
        return FunctionTask(
            self.train[:calibration],
            forward=lambda model, b: model(b["ids"]),
            loss=lambda out, b: F.binary_cross_entropy_with_logits(
                out, b["click"], reduction="none"
            ),
            train=self.train,
        )


def clicks(rows: int, seed: int) -> Clicks:
    """A tenth of the rows for the test."""
    g = np.random.default_rng(seed)
    ids_nf = np.stack([_zipf(g, v, rows) for v in SIZES], 1)
    hidden = [g.normal(size=(v, HIDDEN)) for v in SIZES]
    h_nfk = np.stack([table[ids_nf[:, f]] for f, table in enumerate(hidden)], 1)
    pairs_n = 0.5 * (h_nfk.sum(1) ** 2 - (h_nfk**2).sum(1)).sum(1)
    first, second = g.normal(size=(FIELDS * HIDDEN, 32)), g.normal(size=32)
    deep_n = np.tanh(h_nfk.reshape(rows, -1) @ first / np.sqrt(FIELDS * HIDDEN)) @ second
    logit_n = pairs_n / pairs_n.std() + deep_n / deep_n.std()
    click_n = (g.random(rows) < 1 / (1 + np.exp(-logit_n))).astype(np.float32)
    x, y = torch.from_numpy(ids_nf), torch.from_numpy(click_n)
    batches = [{"ids": i, "click": c} for i, c in zip(x.split(BATCH), y.split(BATCH))]
    held_out = len(batches) // 10
    return Clicks(batches[held_out:], batches[:held_out])


def trained(found: Clicks, seed: int, epochs: int) -> DeepFM:
    """Initialized and trained anew."""
    torch.manual_seed(seed)
    model = DeepFM()
    tune(model, found, Patch(), seed, epochs, RATE)
    return model


def tune(
    model: nn.Module, found: Clicks, patch: Patch, seed: int, epochs: int, rate: float
) -> None:
    """Train every parameter, in place."""
    schedule = Schedule(epochs * len(found.train), lr=rate)
    train(model, found.task(), Healing(patch, everything=True), schedule, seed=seed)


def forgotten(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture, in place, with the values of a fresh one."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.zeros_(parameter)
        elif name.startswith(("tables", "wide")) and not name.endswith("up.weight"):
            nn.init.normal_(parameter, std=0.05)
        else:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    return model


@torch.no_grad()
def scores(model: nn.Module, found: Clicks) -> tuple[float, float]:
    """(logloss, AUC) on the test rows."""
    logits = torch.cat([model(b["ids"]) for b in found.test]).double()
    click = torch.cat([b["click"] for b in found.test]).double()
    loss = F.binary_cross_entropy_with_logits(logits, click)
    rank = torch.empty_like(logits)
    rank[logits.argsort()] = torch.arange(1, len(logits) + 1).double()
    positive = float(click.sum())
    above = float(rank[click > 0].sum()) - positive * (positive + 1) / 2
    return float(loss), above / (positive * (len(click) - positive))


def _zipf(g: np.random.Generator, size: int, rows: int) -> np.ndarray:
    share = np.arange(1, size + 1) ** -ZIPF
    return g.choice(size, rows, p=share / share.sum())
