"""Unpacking weights on a CUDA device before torch is there: the kernel, compiled ahead, and its launch."""
