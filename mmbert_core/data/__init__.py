"""Rows of text cells to batches of tensors: labels, splits, features, tokens. Independent of the model.

Modules, each importing only those before it: prefetch, batches, class_messages, labels, splits, dates,
number_encoding, features, tokens, encoding, cache, dataset, leaks, prepare, number_ranges.
"""
