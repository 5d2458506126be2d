"""Multiruns: jobs run warm in the order that reloads least, checked first, and reported as a table and a grid."""
