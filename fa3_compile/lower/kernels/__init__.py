"""Kernel families, one file each; importing one registers it with `lower.choose`."""
