"""Every private name of transformers, peft and torch that we touch; nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def declare_tied(model: Any, tied: Mapping[str, str]) -> None:
    """Tell transformers (5.16 to 5.23) that target parameters share their source's storage.

    `_tied_weights_keys` alone is ignored when `tie_word_embeddings` is False, and the tensors
    would load unshared and newly initialised; `all_tied_weights_keys` is what loading reads.
    """
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        if hasattr(model, name):
            old = getattr(model, name) or {}
            setattr(model, name, {**dict(old), **tied})


def register_quantization(name: str, config_class: type, quantizer_class: type) -> None:
    """Register a quantization method, unless the name is taken (by a reload, or a second copy of
    the package): transformers' own decorators raise then."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(name, config_class)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(name, quantizer_class)


def auto_classes(config: Any) -> dict[str, str]:
    """Auto class → model class for this config, e.g. AutoModelForCausalLM → LlamaForCausalLM."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = {}
    for name, auto_class in vars(modeling_auto).items():
        if not (isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass)):
            continue
        mapping: Any = getattr(auto_class, "_model_mapping", None)
        if mapping is not None and type(config) in mapping:
            model_class = mapping[type(config)]
            if isinstance(model_class, (list, tuple)):
                model_class = model_class[0]
            found[name] = model_class.__name__
    return found


def tied_names(model: Any) -> dict[str, str]:
    """Target → source of every tie transformers knows of in this model."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def forget_tied(model: Any, names: Iterable[str]) -> None:
    """Undo declarations: these parameters have their own storage."""
    gone = set(names)
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        old = getattr(model, attribute, None)
        if old:
            setattr(model, attribute, {k: v for k, v in dict(old).items() if k not in gone})


def expert_banks(module: Any) -> dict[str, str]:
    """Bank → parameter, first one first, of a module in which transformers 5 stacks a layer's
    experts as (experts, outputs, inputs). Empty for any other module, and where experts are
    stored transposed, interleaved, with biases or with norms of their own.

    A bank may not be called like the parameter: transformers splits and renames every tensor whose
    name contains the parameter's when it saves.
    """
    asked = {
        "is_transposed": False,
        "is_concatenated": True,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    if any(getattr(module, name, wanted) is not wanted for name, wanted in asked.items()):
        return {}
    if not (hasattr(module, "_apply_gate") and hasattr(module, "has_gate")):
        return {}
    first = "gate_up" if module.has_gate else "up"
    found = {f"{part}_bank": f"{part}_proj" for part in (first, "down")}
    parameters = module._parameters
    return {b: p for b, p in found.items() if getattr(parameters.get(p), "ndim", 0) == 3}


def expert_gate(module: Any) -> Callable[[Any], Any]:
    """What an expert of that module does between its two matrices: (rows, outputs of the first) →
    (rows, inputs of the second). Holds no parameter."""
    shell = copy.copy(module)
    shell._parameters = {}
    gate: Callable[[Any], Any] = shell._apply_gate if module.has_gate else shell.act_fn
    return gate


def as_loaded(model: Any, names: Iterable[str]) -> set[str]:
    """Names in a file, and what transformers calls these tensors once it has loaded them (a Mixtral
    on disk says `block_sparse_moe` where the model says `mlp`)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found, transforms = set(names), get_model_conversion_mapping(model)
    return found | {_renamed(name, transforms) for name in found}


def loaded_names(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """Name in a file → what a model of that type calls the tensor, without the model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    transforms = get_checkpoint_conversion_mapping(model_type) or []
    return {name: _renamed(name, transforms) for name in names}


def _renamed(name: str, transforms: Iterable[Any]) -> str:
    from transformers.core_model_loading import WeightRenaming

    for transform in transforms:
        if isinstance(transform, WeightRenaming):
            name, _ = transform.rename_source_key(name)
    return name


# -- torch: what a module holds, live --------------------------------------------------------------
def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Its own parameters; writing into it skips the checks of `register_parameter`."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Its own buffers, saved or not."""
    return module._buffers


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Names of those that no state dict holds."""
    return module._non_persistent_buffers_set


def writes(tensor: Tensor) -> int:
    """How often it was written in place."""
    return tensor._version


# -- torch: products that ship without a public name; kernels/aten.py checks what they do not ------
def int8_product(x_mi: Tensor, codes_oi: Tensor, scale_o: Tensor) -> Tensor:
    """(m, o)."""
    return torch.ops.aten._weight_int8pack_mm(x_mi, codes_oi, scale_o)


def int4_packed(codes_oi: Tensor) -> Tensor:
    """uint8, two codes a byte, in the order that `int4_product` reads."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_oi, 1)


def int4_product(x_mi: Tensor, packed: Tensor, group: int, scale_zero_go2: Tensor) -> Tensor:
    """(m, o)."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_mi, packed, group, scale_zero_go2)


def packs_bfloat16() -> bool:
    """Has oneDNN a bfloat16 product on this processor?"""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_weight(w_oi: Tensor) -> Tensor:
    """In oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(w_oi, 1)


def packed_product(x: Tensor, packed_oi: Tensor, bias_o: Tensor | None) -> Tensor:
    """(..., o)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed_oi, bias_o, "none", [], "")
