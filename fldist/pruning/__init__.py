"""Pruning: which parameters and units of a model are kept, the smaller model that remains, and what it costs."""
