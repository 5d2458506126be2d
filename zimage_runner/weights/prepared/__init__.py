"""The copy of a checkpoint that loads fast: made once, beside a manifest of what it was made from."""
