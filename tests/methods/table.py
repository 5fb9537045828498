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
    Row("afm"),
    Row("afm", 0.4, {"act": "relu", "headroom": 4.0}),
    Row("afm", 0.3, {"allocation": "greedy", "sweep": (0.5,)}, probes=True),
    Row("lord", knobs={"sweep": (0.9, 0.6, 0.3)}, probes=True),
    Row("lord", 0.3, knobs={"allocation": "uniform", "centred": False}),
    Row("lord", 0.15, knobs={"allocation": "uniform"}),
    Row("asvd", knobs={"ratios": (0.3, 0.6)}, probes=True),
    Row("asvd", 0.2, {"allocation": "uniform", "alpha": 1.0}),
    Row("asvd", 0.07, {"alpha": 0.0, "ratios": (0.5,)}, probes=True),
    Row("fwsvd"),
    Row("fwsvd", 0.2, {"sides": "both", "allocation": "uniform"}),
    Row("fwsvd", 0.35, {"sides": "both", "allocation": "knapsack"}),
    Row("welore", coarse=True),
    Row("welore", 0.1, {"norm": "quantile"}, coarse=True),
    Row("welore", 0.3, {"norm": "energy"}, coarse=True),
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
