"""Before any test imports torch: threads that sleep when idle, and no more of them than cores."""

from rankine import threads

threads.settle()

pytest_plugins = ["processes"]
