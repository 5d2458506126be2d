"""The reference engine: diffusers, its placements and its attention backends."""
