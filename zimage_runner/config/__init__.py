"""The typed configuration of a run. Composing and validating imports no torch and opens no network."""
