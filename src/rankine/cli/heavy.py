"""What a command does before it imports torch and transformers."""

from __future__ import annotations

from rankine.threads import settle


def prepare(threads: int | None = None) -> None:
    """Decide the threads, and leave stderr to our own progress and sentences."""
    settle(threads)
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # "Loading weights" lasts a moment and says nothing
    if downloads:  # transformers switches off those of downloads as well
        enable_progress_bars()
