"""Finishing an earlier run: which run, with which settings, and what of it is left to do."""
