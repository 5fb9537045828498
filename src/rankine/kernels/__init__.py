"""Fused and quantized products, each beside a plain torch twin."""
