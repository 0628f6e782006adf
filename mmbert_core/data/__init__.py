"""Rows to tensors: table, labels, splits, features, tokens, store, dataset, prepare, batches. Floor 1; knows no model."""
