"""`import rankine` imports neither torch nor transformers, and loading works all the same."""

import pytest

ORDERS = {
    "rankine first, asked twice, and the registry looked up before it is imported": (
        "import rankine; from rankine._register import register_with_transformers as register;"
        "register(); light(); assert finders() == 1;"
        "import importlib.util; importlib.util.find_spec('transformers.quantizers.auto');"
        "import transformers"
    ),
    "transformers first": "import transformers.quantizers; import rankine",
    "our own classes first": "import rankine.checkpoint.hf",
}

CHECK = """
import sys
def light():
    assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
def finders():
    return [type(finder).__name__ for finder in sys.meta_path].count("_Finder")
{order}
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["rankine"].__name__ == "RankineQuantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["rankine"].__module__ == "rankine.checkpoint.hf"
assert finders() == 0
print("registered")
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_any_order(fresh, order):
    assert "registered" in fresh(CHECK.format(order=ORDERS[order]))
