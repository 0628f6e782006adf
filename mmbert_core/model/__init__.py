"""Tensors to logits: text encoder, tabular encoder, fusion, loss. Pretrained encoders are the only files it reads.

Modules, each importing only those before it: text_features, dropout, vector_fusion, cross_attention, tabm, fusion,
losses, column_features, wide_columns, tabular_encoder, positions, pretrained, int8, packing, bag_of_words, blend,
packed_attention, text_encoder, probe, auxiliary, multimodal_bert, padded.
"""
