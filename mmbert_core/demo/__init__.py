"""The demo: a generated sample, a small encoder trained from scratch, three models.

Modules, each importing only those before it: sample, run.
"""
