"""Batch runner for Z-Image-Turbo. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
