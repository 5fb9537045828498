"""Rankine."""
