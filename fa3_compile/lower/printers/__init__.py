"""Expressions of a spec as source text: Triton, CUDA C++, torch operators."""
