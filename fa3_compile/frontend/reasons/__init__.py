"""Why something that looks like attention is left alone, and what would change that."""
