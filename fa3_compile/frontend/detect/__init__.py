"""Attention in the shadow: two products, and what lies between and around them."""
