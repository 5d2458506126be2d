"""Finishing an earlier run: which run, and with which settings."""
