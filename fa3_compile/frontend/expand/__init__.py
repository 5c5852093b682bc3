"""Calls that hold an attention, written out in plain tensor operations."""
