"""Engines compute pictures: encode, denoise, decode. They write no files and know no prompt sets."""
