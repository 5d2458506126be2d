"""The command line: words, composition, messages, help, resuming, sweeps. Uses Hydra; draws nothing."""
