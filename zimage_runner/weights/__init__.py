"""Finding, downloading, verifying and preparing checkpoints."""
