"""Weights in whatever file they come: which layout it has, and its tensors under diffusers' names."""
