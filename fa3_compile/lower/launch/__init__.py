"""Kernels launched at the least cost for the host."""
