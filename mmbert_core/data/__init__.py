"""Rows to tensors: labels, splits, features, tokens, batches. Knows no model.

Modules, each importing only those before it: prefetch, batches, class_messages, labels, splits, features, tokens,
encoding, cache, dataset, leaks, prepare, number_ranges.
"""
