"""Multiruns: jobs composed quickly, run warm in the order that reloads least, and reported as a table and a grid."""
