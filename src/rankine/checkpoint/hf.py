"""transformers reads and writes Rankine checkpoints: a quantization config and its quantizer.

Importing this module registers both under "rankine". The patch in config.json is swapped onto
the model while it is on meta, so transformers streams every tensor to its place itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rankine import compat
from rankine.checkpoint.form import FORMAT_VERSION, QUANT_METHOD, check_version, tensor_names
from rankine.errors import UserError
from rankine.patch import Patch, check_tied, resolve
from rankine.structures.base import check_module

#: Bytes; what torch's CPU allocator gives.
ALIGNMENT = 64


class RankineConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: a patch without its tensors, and a format version.

    Unknown fields (of a newer minor version) are dropped with `check_version`'s warning. Raises
    UserError on a newer major version.
    """

    def __init__(
        self,
        modules: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        adapter: Iterable[str] = (),
        format_version: str = FORMAT_VERSION,
        **_: Any,
    ):
        check_version(format_version)
        self.quant_method = QUANT_METHOD
        self.format_version = FORMAT_VERSION  # what is written back is ours, whatever was read
        told = {"modules": modules or {}, "tied": tied or {}, "config": config or {}}
        # Read once: transformers would stumble over what is none, later and with a traceback.
        written = Patch.from_json({**told, "adapter": adapter}).to_json()
        self.modules, self.tied = written["modules"], written["tied"]
        self.config, self.adapter = written["config"], written["adapter"]

    @classmethod
    def of(cls, patch: Patch) -> RankineConfig:
        """The config that describes `patch`."""
        return cls(**patch.to_json())

    def patch(self) -> Patch:
        """The plan (no tensors)."""
        return Patch.from_json(self.__dict__)


class RankineQuantizer(HfQuantizer):
    """Applies the patch before the weights arrive."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UserError(
                "expected a Rankine checkpoint for RankineConfig, found a dense one: "
                "compress it with rankine.compress"
            )
        patch = self.quantization_config.patch()
        prefix = model.base_model_prefix
        patch.swap(model, prefix)
        tied = tied_in(model, patch, prefix)
        check_tied(model, tied)
        compat.forget_tied(model, broken_ties(model))
        compat.declare_tied(model, tied)
        files = kwargs.get("checkpoint_files")
        if files:
            check_names(model, patch, prefix, files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        patch = self.quantization_config.patch()
        for path in patch.modules:
            place = resolve(model, path, model.base_model_prefix)
            if place is not None:
                align(model.get_submodule(place))
                check_module(model.get_submodule(place))

    def is_serializable(self) -> bool:
        """Its tensors are ordinary ones."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Full fine-tuning too: without this the Trainer refuses a "purely quantized" model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Forward passes are plain torch."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from rankine.checkpoint.export import merge

        return merge(model)


def align(module: nn.Module) -> None:
    """Give tensors that lie in a mapped file memory of their own, at an even place: products of
    oddly placed ones take other instructions, and round differently from the saved model's."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def tied_in(model: nn.Module, patch: Patch, prefix: str) -> dict[str, str]:
    """The patch's ties in this model's own names, as far as both ends exist in it."""
    found = {}
    for name, source in patch.tied.items():
        here, there = _place(model, name, prefix), _place(model, source, prefix)
        if here is not None and there is not None:
            found[here] = there
    return found


def broken_ties(model: nn.Module) -> list[str]:
    """Ties of the dense architecture one end of which a patch has replaced."""
    names = set(model.state_dict())
    return [a for a, b in compat.tied_names(model).items() if not {a, b} <= names]


def _place(model: nn.Module, name: str, prefix: str) -> str | None:
    module, _, leaf = name.rpartition(".")
    place = resolve(model, module, prefix)
    return None if place is None else f"{place}.{leaf}"


def check_names(model: nn.Module, patch: Patch, prefix: str, files: Iterable[str]) -> None:
    """Every tensor of a patched module must stand in the files: transformers would only warn and
    initialise it at random. Raises UserError naming the first one that does not."""
    stored = compat.as_loaded(model, {name for file in files for name in tensor_names(file)})
    names = {spelling for name in stored for spelling in _spellings(name, prefix)}
    tied = {*patch.tied, *tied_in(model, patch, prefix)}
    for path in patch.modules:
        place = resolve(model, path, prefix)
        if place is None:
            continue
        for leaf in model.get_submodule(place).state_dict():
            name = f"{path}.{leaf}"
            if name in tied or not names.isdisjoint(_spellings(name, prefix)):
                continue
            raise UserError(
                f"expected the tensor {name} in the checkpoint, found none: its weights do "
                "not belong to its config.json; copy both from the same place again"
            )


def _spellings(name: str, prefix: str) -> set[str]:
    """The name with and without the base prefix, and from the layer list on: what stays when
    another head class, or transformers' own renaming, changes the front."""
    spellings = {name, name.removeprefix(prefix + "."), f"{prefix}.{name}"}
    words = name.split(".")
    first = next((i for i, word in enumerate(words) if word.isdigit()), 0)
    return spellings | ({".".join(words[first - 1 :])} if first > 0 else set())


def register() -> None:
    """Put both classes into transformers' registry, unless they are there."""
    compat.register_quantization(QUANT_METHOD, RankineConfig, RankineQuantizer)


register()
