"""LoRA and its relatives: one reader for every layout, and what each does to the weights."""
