"""What an attention computes, as two symbolic expressions; no tensor, no torch operator."""
