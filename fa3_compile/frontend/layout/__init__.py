"""Which axes are b, h, q, kv and d, and the spec in those terms."""
