"""Measurements: peers and this runner side by side, in fresh processes. See README.md, which is generated."""
