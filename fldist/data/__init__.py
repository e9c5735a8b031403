"""Data sets, partitions, and what a client sees of its data."""
