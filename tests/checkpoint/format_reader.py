"""A reader written from docs/format.md alone: numpy, safetensors and json, no Rankine, no torch."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class Reader:
    """The dense weights and biases of a checkpoint directory."""

    def __init__(self, directory):
        directory = Path(directory)
        if (directory / "patch.json").exists():
            entry = json.loads((directory / "patch.json").read_text())
        else:
            entry = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert entry["quant_method"] == "rankine"
        assert int(entry["format_version"].split(".")[0]) == 1
        self.modules, self.tied = entry["modules"], entry["tied"]
        index = directory / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        self.tensors = {}
        for name in names:
            self.tensors |= load_file(directory / name)

    def tensor(self, name):
        return self.tensors.get(self.tied.get(name, name))

    def weight(self, path, structure=None):
        """W, (o, i); of a table (V, d)."""
        structure = structure or self.modules[path]
        return getattr(self, structure["kind"])(path, structure)

    def bias(self, path):
        structure = self.modules[path]
        plain = structure["kind"] != "low_rank" or structure.get("pivoted", False)
        return self.tensor(f"{path}.bias" if plain else f"{path}.up.bias")

    def inner(self, path):
        """`path.weight`, rebuilt where the child is a structure itself."""
        return self.weight(path) if path in self.modules else self.tensor(path + ".weight")

    def dense(self, path, structure):
        return self.tensor(path + ".weight")

    def low_rank(self, path, structure):
        assert structure.get("act") is None
        down, up = self.inner(path + ".down"), self.inner(path + ".up")
        if structure.get("view") == "table":
            return down @ up.T
        if not structure.get("pivoted", False):
            return up @ down
        pivots = self.tensor(path + ".pivots")
        w = np.zeros((up.shape[0] + len(pivots), down.shape[1]), down.dtype)
        w[pivots] = down
        w[np.setdiff1d(np.arange(len(w)), pivots)] = up @ down
        return w

    def quantized(self, path, structure):
        bits, group = structure["code_bits"], structure.get("group", 64)
        packed = self.tensor(path + ".codes")
        stream = np.unpackbits(packed, axis=1, bitorder="little")
        codes = stream.reshape(len(packed), -1, bits) @ (1 << np.arange(bits))
        place = np.arange(codes.shape[1]) // group
        scale, minimum = (self.tensor(f"{path}.{part}") for part in ("scale", "minimum"))
        w = minimum[:, place] + scale[:, place] * codes.astype(scale.dtype)
        return w.T if structure.get("axis", -1) == -2 else w

    def sum(self, path, structure):
        return sum(self.weight(f"{path}.{name}", t) for name, t in structure["terms"].items())
