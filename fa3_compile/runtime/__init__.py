"""The operator `fa3::attention` and what runs when it is called."""
