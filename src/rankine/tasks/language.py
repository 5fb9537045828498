"""Language modelling: predict the next token. An example is a window."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankine.errors import UserError
from rankine.tasks import windows as W
from rankine.tasks.score import logits_of, run_model, score_windows, token_nats
from rankine.tasks.task import check_split, own_figures
from rankine.tasks.text import Source, is_file, passages
from rankine.tasks.windows import Windows

#: The calibration sample is drawn among this many times as many windows from the source's start.
BUFFER = 4
#: Share of a source's windows that calibration leaves when evaluation has no text of its own.
HELD_OUT = 0.25
#: Tokens of a batch, unless their logits would be large.
TOKENS_AT_ONCE = 8192
#: Windows among which training shuffles.
SHUFFLE = 1024


class LanguageModelling:
    """Next-token prediction on text.

    - `calibration`, `evaluation`, `train`: text sources (see `tasks.text.passages`). Without an
      `evaluation` (or with the same file), windows of the calibration source are held out for it;
      without a `train`, training takes the windows that are left. Splits never share a window.
    - `sequences` × `length` tokens are drawn for calibration by `seed`, without replacement.
      `context` (the model's) clamps `length` and `window`. Fewer in the source: all are taken, see
      `notes`.
    - Scores use non-overlapping windows of `window` tokens, on at most `max_tokens` tokens.
    - `tokens_at_once` bounds a batch.
    - `evaluate(model)` adds figures of the user's own to the score.
    """

    def __init__(
        self,
        tokenizer: Any,
        calibration: Source = "embedded",
        evaluation: Source | None = "embedded",
        train: Source | None = None,
        *,
        sequences: int = 128,
        length: int = 2048,
        window: int = 2048,
        max_tokens: int | None = 262_144,
        context: int | None = None,
        batch_size: int | None = None,
        tokens_at_once: int = TOKENS_AT_ONCE,
        column: str | None = None,
        seed: int = 0,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ):
        limit = context or 1 << 40
        self.tokenizer, self._evaluate = tokenizer, evaluate
        self.sequences, self.length, self.seed = sequences, min(length, limit), seed
        self.window, self.max_tokens = min(window, limit), max_tokens
        self.tokens_at_once, self.column = tokens_at_once, column
        self.batch_size = batch_size or max(1, tokens_at_once // self.length)
        # Splits of one text are cut from it, so that they stay apart.
        shared = _same(calibration, evaluation) and not _has_splits(calibration)
        self._sources = {
            "calibration": calibration,
            "evaluation": None if shared else evaluation,
            "train": None if _same(calibration, train) else train,
        }
        own = self._sources["train"]
        if own is not None and _same(own, evaluation) and not _has_splits(own):
            raise UserError(
                f"expected other text to train on than to evaluate on, found {train!s:.80} for both"
            )
        if sequences < 1 or self.length < 2:
            raise UserError(
                f"expected at least one sequence of two tokens, found {sequences}x{self.length}"
            )

    # -- data -----------------------------------------------------------------------------------
    def windows(self, split: str) -> Windows:
        """The windows of a split; raises UserError on too little text."""
        check_split(split)
        if split == "train":
            return _stack(list(self._train_windows()))
        return self._calibration if split == "calibration" else self._evaluation

    def batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """Mappings a model takes (`input_ids`; `attention_mask` where there is padding). Training
        batches are one pass over the text in an order drawn by the seed, streamed."""
        check_split(split)
        if split == "train":
            rows = self._train_windows()
            while group := list(islice(rows, self.batch_size)):
                yield _stack(group).batch()
            return
        found = self.windows(split)
        for rows_n in torch.arange(len(found)).split(self.batch_size):
            yield found[rows_n].batch()

    def _stream(self, split: str) -> Iterator[W.Fragment]:
        source = self._sources[split]
        assert source is not None
        return W.tokenize(passages(source, split, self.column), self.tokenizer)

    @cached_property
    def _buffer(self) -> tuple[Windows, Tensor]:
        wanted = BUFFER * self.sequences * self.length
        stream = W.take(self._stream("calibration"), wanted)
        found = W.cut(stream, self.length)
        found = found[found.length_n == self.length]
        if not len(found):
            raise UserError(
                f"expected at least {self.length} tokens of calibration text, found "
                f"{len(stream[0])}: give more text or ask for shorter sequences, such as --tokens "
                f"1x{max(2, len(stream[0]))}"
            )
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed))
        return found, order

    @cached_property
    def _shares(self) -> dict[str, Tensor]:
        """Rows of the buffer for each split."""
        found, order = self._buffer
        if self._sources["evaluation"] is not None:
            first, second = min(self.sequences, len(found)), 0
        else:
            second = min(max(int(len(found) * HELD_OUT), 1), self.sequences)
            first = min(self.sequences, len(found) - second)
            if first < 1:
                raise UserError(
                    f"expected text for calibration and evaluation, found one window of "
                    f"{self.length} tokens: give another text for evaluation"
                )
        parts = order.split([first, second, len(found) - first - second])
        return dict(zip(("calibration", "evaluation", "train"), (p.sort().values for p in parts)))

    @cached_property
    def _calibration(self) -> Windows:
        return self._buffer[0][self._shares["calibration"]]

    @cached_property
    def _evaluation(self) -> Windows:
        if self._sources["evaluation"] is None:
            return self._buffer[0][self._shares["evaluation"]]
        found = W.cut(W.take(self._stream("evaluation"), self.max_tokens), self.window)
        if not len(found):
            raise UserError("expected at least two tokens of evaluation text, found fewer")
        return found

    def _train_windows(self) -> Iterator[Windows]:
        generator = torch.Generator().manual_seed(self.seed)
        rows = self._unshuffled_train_windows()
        while group := list(islice(rows, SHUFFLE)):
            yield from (group[i] for i in torch.randperm(len(group), generator=generator).tolist())

    def _unshuffled_train_windows(self) -> Iterator[Windows]:
        if self._sources["train"] is not None:
            yield from _lazily(self._stream("train"), self.length)
            return
        taken = len(self._buffer[0])
        free = set(self._shares["train"].tolist())
        for row, window in enumerate(_lazily(self._stream("calibration"), self.length)):
            if row in free or row >= taken:
                yield window

    @property
    def notes(self) -> list[str]:
        """What a report should say about the data: fewer windows than asked for."""
        found = len(self._calibration)
        if found == self.sequences:
            return []
        return [
            f"calibration text held {found} sequences of {self.length} tokens, not {self.sequences}"
        ]

    def fingerprint(self, split: str = "calibration") -> str:
        """sha256 over the tokens this split really uses."""
        return self.windows(split).fingerprint()

    # -- model ----------------------------------------------------------------------------------
    def run(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """The model's outputs, without a key-value cache."""
        return run_model(model, batch)

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """(windows,) float64: mean cross-entropy over the window's tokens after the first, nats;
        logits in float32."""
        nats_bt = token_nats(logits_of(outputs), batch["input_ids"]).double()
        counts_bt = self.mask(batch)[:, 1:].to(nats_bt.device)
        return nats_bt.where(counts_bt, 0.0).sum(1) / counts_bt.sum(1)

    def terms(self, batch: dict[str, Tensor]) -> Tensor:
        """(windows,) scored tokens: all but each window's first."""
        return self.mask(batch)[:, 1:].sum(1)

    def mask(self, batch: dict[str, Tensor]) -> Tensor:
        """(windows, positions) bool: no padding."""
        if "attention_mask" in batch:
            return batch["attention_mask"].bool()
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)

    def score(self, model: nn.Module) -> dict[str, Any]:
        """perplexity and its interval over windows, bits_per_byte, accuracy, tokens on the
        evaluation windows, and the user's own figures."""
        found = score_windows(model, self.windows("evaluation"), self.tokens_at_once).summary()
        return found | (own_figures(self._evaluate, model) if self._evaluate else {})


def _same(a: Source, b: Source | None) -> bool:
    if not isinstance(a, (str, Path)) or not isinstance(b, (str, Path)):
        return a is b
    if is_file(a) and is_file(b):
        return Path(a).expanduser().resolve() == Path(b).expanduser().resolve()
    return str(a) == str(b)


def _has_splits(source: Source) -> bool:
    """ "embedded" and hub data sets have an evaluation split of their own; files and lists not."""
    return isinstance(source, str) and not is_file(source)


def parse_tokens(text: str) -> tuple[int, int]:
    """(sequences, length) of "128x2048"; raises UserError."""
    match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text)
    if not match or int(match[1]) < 1 or int(match[2]) < 2:
        raise UserError(f'expected sequences x length such as 128x2048, found "{text}"')
    return int(match[1]), int(match[2])


def vocabulary(model: Any) -> int:
    """How many logits a position has; 1 where the config does not say."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    return int(getattr(text, "vocab_size", None) or 1)


def context_length(config: Any) -> int | None:
    """The positions a model was made for, from its config; None where it does not say."""
    text = getattr(config, "get_text_config", lambda: config)()
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(value := getattr(text, name, None), int) and value > 0:
            return value
    return None


def _lazily(stream: Iterator[W.Fragment], length: int) -> Iterator[Windows]:
    """Full windows of a stream, one by one."""
    import numpy as np

    ids, size = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for fragment in stream:
        ids, size = np.concatenate([ids, fragment[0]]), np.concatenate([size, fragment[1]])
        whole = len(ids) // length * length
        if whole:
            found = W.cut((ids[:whole], size[:whole]), length)
            yield from (found[i : i + 1] for i in range(len(found)))
            ids, size = ids[whole:], size[whole:]


def _stack(rows: list[Windows]) -> Windows:
    if not rows:
        raise UserError("expected training text beyond the calibration sample, found none")
    return Windows(
        *(
            torch.cat([getattr(r, f) for r in rows])
            for f in ("ids_nt", "bytes_nt", "length_n", "first_n")
        )
    )
