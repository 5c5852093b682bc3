"""What is element [index] of a node? An expression, by one rule an operator."""
