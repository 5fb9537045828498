"""Train the small language model that ships in the package, or a larger sibling; resumable.

    python tools/train_reference.py --work DIR --output src/rankine/assets/embedded

Four steps, each skipped where its result is in the work directory: collect the corpus, train the
tokenizer, tokenise once into a memory map of uint16, train. Killed at any time and started again
with the same options it goes on from the newest checkpoint with the same data in the same order.

The learning rate warms up, stays, and falls linearly to zero (WSD), so `--tokens` may still be
changed on a restart while the rate stays. The context is 256 for three quarters of the tokens, then
the full length: attention is dear on a CPU, so that is the last two fifths of the time.

Started by torchrun, every process takes its part of each batch. One process of one thread per core
is the fastest on a CPU that is shared: threads of one process wait for the slowest at every kernel,
processes only once per step.

    torchrun --nproc-per-node 2 tools/train_reference.py --work DIR --output ...
"""

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

# Idle OpenMP threads that spin starve the next parallel region; must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from corpus import collect, texts, write_listing
from rankine.tasks.embedded import embedded_text
from reference_card import export
from reference_model import SIZES, Reference, Shape

SEPARATOR, PADDING = "<|endoftext|>", "<|pad|>"
SHORT_CONTEXT = 256
SHORT_SHARE = 0.75
DECAY_START = 0.6
TOKENIZER_BYTES = 25_000_000
WATCHED_ROWS = 32


def train_tokenizer(samples: list[str], shape: Shape) -> PreTrainedTokenizerFast:
    """Byte-level BPE; one token separates documents and is put before each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[SEPARATOR, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(samples, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A",
        pair=f"{SEPARATOR} $A {SEPARATOR} $B",
        special_tokens=[(SEPARATOR, tokenizer.token_to_id(SEPARATOR))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PADDING,
        model_max_length=shape.context,
        clean_up_tokenization_spaces=False,
    )


def prepare(work: Path, shape: Shape, options: argparse.Namespace) -> None:
    """Corpus listing, tokenizer and tokens into `work`; the token file last, by rename."""
    if (work / "tokens.bin").exists():
        return
    documents, packages, refused = collect(options.corpus_bytes, options.share, options.seed)
    print(f"{len(documents)} files of {len(packages)} packages; refused: {refused}", flush=True)
    write_listing(work / "corpus.json", documents, packages)
    wrapped = train_tokenizer(list(texts(documents, TOKENIZER_BYTES)), shape)
    wrapped.save_pretrained(work / "tokenizer")
    tokenizer = wrapped.backend_tokenizer
    with (work / "tokens.part").open("wb") as file:
        for start in range(0, len(documents), 256):
            batch = [document.text for document in documents[start : start + 256]]
            for encoded in tokenizer.encode_batch(batch):
                np.asarray(encoded.ids, np.uint16).tofile(file)
    ids = [tokenizer.encode(text).ids for _, text in embedded_text("evaluation")]
    np.concatenate([np.asarray(part, np.uint16) for part in ids]).tofile(work / "held_out.bin")
    (work / "tokens.part").replace(work / "tokens.bin")


class Rows:
    """The corpus as rows of one context (and the token after it), in an order fixed by the seed."""

    def __init__(self, path: Path, context: int, seed: int):
        self.tokens = np.memmap(path, np.uint16, "r")
        self.context = context
        count = (len(self.tokens) - 1) // context
        self.order = np.random.default_rng(seed).permutation(count)

    def batch(self, first: int, count: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `first` … of the endless sequence, cut to `context`, as tokens and targets."""
        starts = [
            int(self.order[i % len(self.order)]) * self.context for i in range(first, first + count)
        ]
        rows = np.stack([self.tokens[s : s + self.context + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(rows)
        return both[:, :-1].reshape(-1, context), both[:, 1:].reshape(-1, context)


def learning_rate(seen: int, options: argparse.Namespace) -> float:
    """The rate when `seen` tokens have gone by."""
    falling = (1 - seen / options.tokens) / (1 - DECAY_START)
    return options.rate * min(1.0, (seen + options.batch) / options.warmup, falling)


def make_optimizer(model: Reference, rate: float) -> torch.optim.AdamW:
    """AdamW; norms do not decay."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.no_grad()
def watch(model: Reference, held_out: Rows, context: int, device: torch.device) -> float:
    """Loss on a fixed part of the held-out text at the context trained so far: positions never seen
    would hide how well training goes."""
    losses = []
    for first in range(0, WATCHED_ROWS, 8):
        tokens, targets = held_out.batch(first, 8, context)
        with torch.autocast(device.type, torch.bfloat16):
            losses.append(model(tokens.to(device), targets.to(device)).item())
    return sum(losses) / len(losses)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Written beside, flushed to the disk, then renamed: a kill leaves the old one or the new."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def train(work: Path, shape: Shape, options: argparse.Namespace) -> None:
    """Train to `options.tokens`, from the newest checkpoint if there is one."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    model = Reference(shape)
    model.initialise(options.seed)
    model.to(device)
    optimizer = make_optimizer(model, options.rate)
    identity = {"shape": asdict(shape), "seed": options.seed, "batch": options.batch}
    state = {"row": 0, "tokens": 0, "seconds": 0.0}
    path = work / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["identity"] != identity:
            sys.exit(f"{path} is of {saved['identity']}, asked for {identity}: use another --work")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"].cpu())
        state = saved["state"]
        print(f"resumed at {state['tokens']} tokens", flush=True)
    run = torch.compile(model, dynamic=False) if options.compile else model
    rows = Rows(work / "tokens.bin", shape.context, options.seed)
    held_out = Rows(work / "held_out.bin", shape.context, options.seed)
    per_batch, per_micro = options.batch // shape.context, options.micro // shape.context
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters} parameters, {options.tokens} tokens ({options.tokens / parameters:.1f} per "
        f"parameter), {len(rows.tokens)} unique tokens, {device}",
        flush=True,
    )

    def keep() -> None:
        save_checkpoint(
            path,
            {
                "identity": identity,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "state": state,
                "options": {
                    "rate": options.rate,
                    "tokens": options.tokens,
                    "variant": options.variant,
                },
                "place": {
                    "device": device_name(device),
                    "torch": str(torch.__version__),
                    "python": platform.python_version(),
                },
            },
        )

    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mine = per_batch // world
    losses: list[float] = []
    saved_at = logged_at = last = time.monotonic()
    logged_tokens = state["tokens"]
    while state["tokens"] < options.tokens:
        share = state["tokens"] / options.tokens
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["tokens"], options)
        context = SHORT_CONTEXT if share < SHORT_SHARE else shape.context
        first = state["row"] + rank * mine
        total = torch.zeros((), device=device)
        for offset in range(0, mine, per_micro):
            tokens, targets = rows.batch(first + offset, per_micro, context)
            with torch.autocast(device.type, torch.bfloat16):
                loss = run(tokens.to(device), targets.to(device)) * (per_micro / per_batch)
            loss.backward()
            total += loss.detach()
        share_gradients(model, total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        now = time.monotonic()
        state = {
            "row": state["row"] + per_batch,
            "tokens": state["tokens"] + options.batch,
            "seconds": state["seconds"] + now - last,
        }
        last = now
        if len(losses) == options.log_every:
            mean = sum(losses) / len(losses)
            if not math.isfinite(mean):
                sys.exit("the loss is not finite: lower --rate; the last checkpoint is kept")
            speed = (state["tokens"] - logged_tokens) / (now - logged_at)
            left = (options.tokens - state["tokens"]) / speed / 60
            if rank == 0:
                print(
                    f"{state['tokens'] / 1e6:7.2f}M/{options.tokens / 1e6:.0f}M  loss {mean:.4f}  "
                    f"lr {optimizer.param_groups[0]['lr']:.2e}  context {context}  "
                    f"{speed:.0f} tok/s  ETA {left:.0f} min",
                    flush=True,
                )
            losses, logged_at, logged_tokens = [], now, state["tokens"]
        if rank == 0 and now - saved_at > options.save_every:
            keep()
            loss = watch(model, held_out, context, device)
            print(f"checkpoint; held-out loss {loss:.4f}", flush=True)
            saved_at = time.monotonic()
    if rank == 0:
        keep()
        print(f"done; held-out loss {watch(model, held_out, context, device):.4f}", flush=True)


def share_gradients(model: Reference, total: torch.Tensor) -> None:
    """Sum gradients and the loss over the processes, as one message."""
    if not dist.is_initialized():
        return
    tensors = [total, *(p.grad for p in model.parameters())]
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def device_name(device: torch.device) -> str:
    """What the card says the model was trained on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
    return f"{name}, processes: {dist.get_world_size() if dist.is_initialized() else 1}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="corpus, tokens, checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="where the model is exported")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--variant", choices=("gqa", "mha"), default="gqa")
    parser.add_argument("--tokens", type=float, default=50e6, help="training tokens")
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--micro", type=int, default=4096, help="tokens at once and process")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=1e6, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--corpus-bytes", type=int, default=245_000_000)
    parser.add_argument("--share", type=float, default=0.12, help="cap of one package")
    parser.add_argument("--save-every", type=float, default=180, help="seconds")
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--export-only", action="store_true", help="from the newest checkpoint")
    parser.add_argument("--evaluation-tokens", type=int, default=None, help="default: all")
    options = parser.parse_args()
    options.tokens = int(options.tokens)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch % (options.micro * world):
        parser.error(f"expected a --batch divisible by --micro x {world}, found {options.batch}")
    return options


def regenerate(options: argparse.Namespace) -> str:
    """The options that decide the result, with neutral directories."""
    names = ("size", "variant", "tokens", "batch", "rate", "warmup", "seed", "corpus_bytes")
    chosen = " ".join(f"--{n.replace('_', '-')} {getattr(options, n)}" for n in names)
    return f"--work WORK --output src/rankine/assets/embedded {chosen}"


def main() -> None:
    options = parse()
    shape = SIZES[options.size].variant(options.variant)
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.export_only:
        first = int(os.environ.get("RANK", "0")) == 0
        if first:
            prepare(options.work, shape, options)
        if "RANK" in os.environ:
            if options.device == "cuda":
                options.device = f"cuda:{os.environ['LOCAL_RANK']}"
            # The first process may prepare for a long time before it joins.
            patience = datetime.timedelta(hours=2)
            dist.init_process_group("gloo" if options.device == "cpu" else "nccl", timeout=patience)
        train(options.work, shape, options)
        if dist.is_initialized():
            dist.destroy_process_group()
        if not first:
            return
    command = f"python tools/train_reference.py {regenerate(options)}"
    summary = export(options.work, options.output, shape, options.evaluation_tokens, command)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
