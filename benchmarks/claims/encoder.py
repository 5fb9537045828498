"""A small encoder of our own, trained on SST-2 as part of a claim: the classifiers that methods
with a task's loss are made for. 4 blocks of width 128 over the words of the training sentences."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankine.method import Schedule
from rankine.patch import Patch
from rankine.tasks import FunctionTask
from rankine.training.heal import Healing
from rankine.training.loop import train

NAME = "an encoder of 4 blocks, width 128, trained here"
#: Ids of padding, of words that were not seen in training, and of the position that is classified.
PADDING, UNKNOWN, FIRST = 0, 1, 2
WORDS, LONGEST, BATCH = 8000, 40, 64
#: Sentences of the dev split: they choose a size, nothing is reported of them.
DEV = 1024
#: Of the dense model's training, and of the fine-tuning of its factors.
RATE, TUNING_RATE, DECAY = 5e-4, 2e-4, 0.01

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sentences:
    """Batches of every split. `test` is GLUE's development set; `dev` was cut from its training
    set."""

    train: list[Batch]
    dev: list[Batch]
    test: list[Batch]
    words: int

    def task(self, evaluation: list[Batch], calibration: int) -> FunctionTask:
        """Classification, a sentence an example; `calibration` batches of the training set."""
        return FunctionTask(
            self.train[:calibration],
            forward=lambda model, b: model(b["input_ids"], attention_mask=b["attention_mask"]),
            loss=lambda out, b: F.cross_entropy(out.logits, b["labels"], reduction="none"),
            train=self.train,
            evaluation=evaluation,
            mask=lambda b: b["attention_mask"].bool(),
        )


@cache
def sentences(folder: Path, examples: int) -> Sentences:
    """SST-2, with the first `examples` of its training set."""
    rows = {split: list(_rows(folder, split)) for split in ("train", "dev", "test")}
    rows["train"] = _shuffled(rows["train"])[:examples]
    rows["dev"] = _shuffled(rows["dev"])[:DEV]
    count = Counter(word for text, _ in rows["train"] for word in text.split())
    frequent = sorted(count, key=lambda word: (-count[word], word))[: WORDS - FIRST - 1]
    ids = {word: n for n, word in enumerate(frequent, FIRST + 1)}
    made = {split: _batches(found, ids) for split, found in rows.items()}
    return Sentences(**made, words=len(ids) + FIRST + 1)


def trained(found: Sentences, seed: int, epochs: int) -> nn.Module:
    """The dense model, initialized and trained anew."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=found.words,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=LONGEST,
            num_labels=2,
            pad_token_id=PADDING,
        )
    ).eval()
    tune(model, found, Patch(), seed, epochs, RATE)
    return model


def tune(
    model: nn.Module, found: Sentences, patch: Patch, seed: int, epochs: int, rate: float
) -> None:
    """Train every parameter, in place."""
    schedule = Schedule(epochs * len(found.train), lr=rate, weight_decay=DECAY)
    task = found.task(found.dev, 0)
    train(model, task, Healing(patch, everything=True), schedule, seed=seed)


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Share of sentences that are classified right."""
    hits = [
        model(b["input_ids"], attention_mask=b["attention_mask"]).logits.argmax(1) == b["labels"]
        for b in batches
    ]
    return float(torch.cat(hits).double().mean())


def _rows(folder: Path, split: str) -> Iterator[tuple[str, int]]:
    with gzip.open(folder / "glue" / f"sst2.{split}.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            yield row["text"], int(row["label"])


def _shuffled(rows: list[Any]) -> list[Any]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[n] for n in order.tolist()]


def _batches(rows: list[tuple[str, int]], ids: dict[str, int]) -> list[Batch]:
    """Of sentences of about one length, in a shuffled order."""
    coded = [
        ([FIRST, *(ids.get(word, UNKNOWN) for word in text.split())][:LONGEST], label)
        for text, label in rows
    ]
    coded.sort(key=lambda row: len(row[0]))
    return _shuffled([_batch(coded[n : n + BATCH]) for n in range(0, len(coded), BATCH)])


def _batch(rows: list[tuple[list[int], int]]) -> Batch:
    x = nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": x, "attention_mask": (x != PADDING).long(), "labels": labels}
