"""Tensors to logits: text encoder, tabular encoder, fusion, loss. Reads no files but pretrained encoders.

Modules, each importing only those before it: fusion, losses, tabular_encoder, pretrained, dropout, int8, packing,
text_encoder, probe, multimodal_bert, padded.
"""
