"""The table that specifies methods: every method with sane and extreme knobs."""

from __future__ import annotations

from rankine.testing.rows import Row

#: A new method adds its rows here; the suite does the rest.
ROWS = [
    Row("svd"),
    Row("svd", 0.07),
    Row("svd_llm"),
    Row("svd_llm", 0.95),
    Row("basis_sharing"),
    Row("basis_sharing", 0.3, {"group": 3, "share": ("q", "o", "down"), "update": True}),
    Row("lord", knobs={"sweep": (0.9, 0.6, 0.3)}, probes=True),
    Row("lord", 0.3, knobs={"allocation": "uniform", "centred": False}),
    Row("lord", 0.15, knobs={"allocation": "uniform"}),
    Row("kfac_svd"),
    Row("kfac_svd", 0.2, {"allocation": "uniform", "shrink_in": 0.0, "shrink_out": 0.0}),
    Row("kfac_svd", 0.5, {"middle": 0.1, "clip": 1.0}),
    Row("anchored_svd"),
    Row("anchored_svd", 0.2, {"ridge": 1e-9}),
    Row("auto"),
    Row("auto", 0.4, {"structures": ("pivoted",)}),
    Row("auto", 0.3, {"structures": ("low_rank", "pivoted"), "shrink_in": 0.0, "ridge": 1e-9}),
    Row("auto", 0.5, {"refine": True, "epochs": 1}),
    Row("rtn", None, {"code_bits": 2, "group": 16}),
    Row("rtn", None, {"code_bits": 3, "group": 5}),
    Row("rtn", None, {"code_bits": 4}),
    Row("rtn", None, {"code_bits": 8, "group": 1000}),
]
