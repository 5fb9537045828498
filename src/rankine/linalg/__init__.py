"""Tensor mathematics without models."""
