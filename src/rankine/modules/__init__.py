"""What stands for several weights at once."""

from rankine.modules.experts import ExpertBank, adopt, conceal, expose, module_at, put

__all__ = ["ExpertBank", "adopt", "conceal", "expose", "module_at", "put"]
