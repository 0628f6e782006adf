"""The built-in sample: generated tables, a small encoder from scratch, three models.

Modules, each importing only those before it: sample, run.
"""
