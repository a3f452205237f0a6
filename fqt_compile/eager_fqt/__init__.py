"""Eager FQT: the definition of a training step, on any model, without a compiler and without the graph passes."""
