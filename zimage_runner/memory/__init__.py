"""GPU memory: where weights are kept, the allocator, limits, health, and readings of it all."""
