"""Rankine."""

from rankine._register import register_with_transformers

register_with_transformers()
