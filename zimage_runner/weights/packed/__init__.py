"""Packed weights: a lossless form of bfloat16 at two thirds of the bytes."""
