"""GGUF: residuals as a LoRA file for llama.cpp, which has no two-factor weight of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rankine.checkpoint.beside import new_file
from rankine.errors import UserError, suggest


def export_gguf_lora(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    path: str | Path,
    architecture: str,
    blocks: int,
    *,
    force: bool = False,
) -> Path:
    """Write residuals {module path: (B (out, r), A (r, in))} as a GGUF LoRA adapter.

    `architecture` is llama.cpp's name ("llama", "qwen2"), `blocks` the number of layers. llama.cpp
    scales each pair by alpha / r: B carries the inverse, so the update is B A at every rank.
    Tensors are stored as float32. Raises UserError when the gguf extra is missing, the
    architecture is unknown, or a module has no name there.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            'expected the package gguf for this export, found none: pip install "rankine[gguf]"'
        )
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UserError(
            f"expected an architecture of llama.cpp, found {architecture!r}; "
            + suggest(architecture, list(known))
        )
    names = gguf.get_tensor_name_map(known[architecture], blocks)
    with new_file(Path(path), force) as beside:
        writer = gguf.GGUFWriter(beside, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 1.0)
        for module, (b, a) in factors.items():
            name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if name is None:
                raise UserError(
                    f"expected a module that llama.cpp's {architecture} has, found {module}"
                )
            writer.add_tensor(f"{name}.lora_a", a.detach().float().cpu().contiguous().numpy())
            scaled = b.detach().float().cpu() * a.shape[0]
            writer.add_tensor(f"{name}.lora_b", scaled.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)
