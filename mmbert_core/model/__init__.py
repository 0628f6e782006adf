"""Tensors to logits: text encoder, tabular encoder, fusion, loss. Floor 1; reads no files but pretrained encoders."""
