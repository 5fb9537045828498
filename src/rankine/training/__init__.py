"""Training: of one block against the dense one (refine), of the whole model (heal)."""
