"""A spec as the source of whole kernels."""
