"""Makes transformers know Rankine checkpoints after a plain `import rankine`, importing nothing.

transformers has no discovery of quantization methods: without registration it loads a Rankine
checkpoint "successfully", with random weights. Importing transformers costs seconds, which
`rankine --help` may not spend, so registration waits for whoever imports it: a finder on
`sys.meta_path` lets `transformers.quantizers.auto` (the registry) load as always, then imports
`rankine.checkpoint.hf`, which registers itself, and takes itself off the path.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
OURS = "rankine.checkpoint.hf"


class _ThenRegister(Loader):
    """The registry's own loader, and our registration after it."""

    def __init__(self, loader: Loader, finder: "_Finder"):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        # Where rankine.checkpoint.hf itself is what imports transformers, this is a no-op on the
        # half-loaded module, which registers when it is complete.
        importlib.import_module(OURS)


class _Finder(MetaPathFinder):
    """Finds one module by asking all the other finders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRegister(spec.loader, self)
                return spec
        return None


def register_with_transformers() -> None:
    """Register now if transformers' registry is loaded, else as soon as it is. Idempotent."""
    if REGISTRY in sys.modules:
        importlib.import_module(OURS)
    elif not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
