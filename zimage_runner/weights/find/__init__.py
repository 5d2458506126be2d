"""Where a checkpoint is: its files, downloads, digests, and the proof that it is whole."""
