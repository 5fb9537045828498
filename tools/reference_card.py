"""Export of the reference model: files for transformers, the figures, and the model card."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankine.evaluation.perplexity import LanguageScore, perplexity
from reference_model import Reference, Shape, to_llama

PROBED_KEEPS = (0.7, 0.5)

CARD = """\
---
license: apache-2.0
language: code
tags: [python, llama, small]
---

# The embedded model of Rankine

A small language model of Python source. It is in the package so that demonstrations, tests and
claims compress a real, trained network where there is no network connection. It is too small to
write useful programs.

| | |
|---|---|
| architecture | Llama: {blocks} blocks of width {width}, {heads} query and {kv_heads} key-value \
heads of 64, SwiGLU of {inner}, tied embeddings, context {context} |
| parameters | {parameters:,} |
| vocabulary | {vocabulary}, byte-level BPE trained on the same text |
| tokens seen | {tokens:,} ({per_parameter:.1f} per parameter) |
| unique tokens | {unique:,} from {files:,} files |
| held-out perplexity (bf16) | {perplexity:.3f} per token |
| held-out bits per byte (bf16) | {bits:.4f} |
| held-out text | {scored:,} tokens of {modules} modules of the standard library, windows of \
{context} |
{probes}
| trained on | {device}, {minutes:.0f} minutes |
| versions | Python {python}, torch {torch} |

The rows "SVD" cut each of the seven linear weights of every block to
`floor(keep * out * in / (out + in))` singular values, without data: what a trained model loses when
nothing is done to protect it. On an under-trained model that loss is small and every method looks
good.

## Data

Python source of the standard library and of installed packages whose metadata names a permissive
licence. Held out, together with every file that resembles them: {held_out}.
Near-duplicates, generated files and tables were dropped; no package fills more than {share:.0%}.
`corpus.json` lists every file with its sha256, in training order.

| package | version | licence | kB |
|---|---|---|---:|
{packages}

## How to make it again

    pip install {requirements}
    {command}

Under torchrun, one process per core, it is faster and differs by rounding only. `--export-only`
exports the newest checkpoint, `--size` and `--tokens` train a larger model, `--variant mha` its
sibling with as many key-value heads as query heads. The corpus follows the interpreter and the
packages that are installed, so the figures differ a little elsewhere.
"""


def truncate(weight: torch.Tensor, keep: float) -> torch.Tensor:
    """The best approximation of rank floor(keep * out * in / (out + in))."""
    rows, columns = weight.shape
    rank = math.floor(keep * rows * columns / (rows + columns))
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).to(weight.dtype)


def cut_blocks(model: LlamaForCausalLM, keep: float) -> None:
    """Truncate every linear weight of every block in place."""
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(truncate(module.weight, keep))


def build(shape: Shape, state: dict[str, torch.Tensor], tokenizer: Any) -> LlamaForCausalLM:
    """The transformers model in bfloat16."""
    config = LlamaConfig(
        **shape.llama(),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    reference = Reference(shape)
    reference.load_state_dict(state)
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(to_llama(reference), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"names of transformers have changed: {missing}, {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model.to(torch.bfloat16).eval()


def export(
    work: Path, output: Path, shape: Shape, max_tokens: int | None, command: str
) -> dict[str, Any]:
    """Write the newest checkpoint of `work` as a model directory; returns its figures."""
    saved = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model = build(shape, saved["model"], tokenizer)
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.copyfile(work / "corpus.json", part / "corpus.json")

    def score(keep: float | None = None) -> LanguageScore:
        probed = LlamaForCausalLM.from_pretrained(part, dtype=torch.bfloat16).eval()
        if keep is not None:
            cut_blocks(probed, keep)
        return perplexity(probed, tokenizer, window=shape.context, max_tokens=max_tokens)

    dense = score()
    cuts = {keep: score(keep).perplexity for keep in PROBED_KEEPS}
    tokens = saved["state"]["tokens"]
    parameters = sum(p.numel() for p in model.parameters())
    figures = {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "perplexity": dense.perplexity,
        "bits_per_byte": dense.bits_per_byte,
        "accuracy": dense.accuracy,
        "scored_tokens": dense.tokens,
        "svd": {str(keep): value for keep, value in cuts.items()},
        "finished": tokens >= saved["options"]["tokens"],
    }
    (part / "README.md").write_text(card(shape, saved, figures, work, command), encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    part.rename(output)
    return figures


def card(
    shape: Shape, saved: dict[str, Any], figures: dict[str, Any], work: Path, command: str
) -> str:
    """The model card, from the figures and the corpus listing."""
    corpus = json.loads((work / "corpus.json").read_text(encoding="utf-8"))
    packages = sorted(corpus["packages"], key=lambda package: -package["bytes"])
    probes = "\n".join(
        f"| SVD, keep {keep} | perplexity {value:.3f} ({value / figures['perplexity'] - 1:+.0%}) |"
        for keep, value in figures["svd"].items()
    )
    installed = [p for p in packages if p["name"] != "python-stdlib" and p["bytes"] > 1_000_000]
    return CARD.format(
        **vars(shape),
        parameters=figures["parameters"],
        tokens=figures["tokens"],
        per_parameter=figures["tokens_per_parameter"],
        unique=(work / "tokens.bin").stat().st_size // 2,
        files=len(corpus["files"]),
        perplexity=figures["perplexity"],
        bits=figures["bits_per_byte"],
        scored=figures["scored_tokens"],
        modules=len(corpus["held_out_modules"]),
        probes=probes,
        device=saved["place"]["device"],
        minutes=saved["state"]["seconds"] / 60,
        python=saved["place"]["python"],
        torch=saved["place"]["torch"],
        held_out=", ".join(f"`{name}`" for name in corpus["held_out_modules"]),
        share=packages[0]["bytes"] / corpus["bytes"],
        packages="\n".join(
            f"| {p['name']} | {p['version']} | {p['licence']} | {p['bytes'] / 1000:.0f} |"
            for p in packages
        ),
        requirements=" ".join(f"{p['name']}=={p['version']}" for p in installed),
        command=command,
    )
