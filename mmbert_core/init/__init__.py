"""`mmbert init`: a first config for a table, each column's role with its reason as a comment.

Modules, each importing only those before it: encoder_lengths, config_text, run.
"""
