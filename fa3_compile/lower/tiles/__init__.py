"""Tile configurations: what fits, what to try first, what was measured."""
