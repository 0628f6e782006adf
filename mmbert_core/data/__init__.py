"""Rows to tensors: labels, splits, features, tokens, batches. Knows no model.

Modules, each importing only those before it: prefetch, batches, class_words, labels, splits, features, tokens,
encoding, store, dataset, leaks, prepare, known_ranges.
"""
