"""What a process needs, whatever it computes: errors, signals, streams, ranks. Knows nothing of machine learning.

Modules, each importing only those before it: errors, log_handler, streams, signals, startup, forks, memory,
progress, hub, templates, versions, ranks, distributed, ddp, workers.
"""
