"""Data, loss and score of what a model is for."""

from rankine.tasks.language import LanguageModelling, context_length, parse_tokens
from rankine.tasks.task import FunctionTask, Task

__all__ = ["FunctionTask", "LanguageModelling", "Task", "context_length", "parse_tokens"]
