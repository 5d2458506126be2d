"""Batch runner for Z-Image-Turbo. Importing this package imports nothing heavy."""

__version__ = "0.1.0"

GB = 1e9
"""Bytes of a gigabyte, wherever one is read or written."""
