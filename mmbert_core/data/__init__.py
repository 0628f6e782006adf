"""Rows of text cells to batches of tensors: labels, splits, features, tokens. Independent of the model.

Modules, each importing only those before it: prefetch, batches, class_messages, labels, splits, dates,
number_encoding, features, tokens, encoding, cache, dataset, leaks, column_names, column_statistics,
column_leaks, column_roles, label_column, prepare, number_ranges.
"""
