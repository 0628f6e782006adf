"""Rows to tensors: table, labels, splits, features, tokens, store, dataset, batches. Floor 1; knows no model."""
