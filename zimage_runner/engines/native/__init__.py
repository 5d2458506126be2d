"""engine=native: Z-Image's three models in short modules of our own, without diffusers or transformers."""
