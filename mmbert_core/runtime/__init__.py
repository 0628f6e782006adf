"""What any process needs: errors, signals, streams, ranks. Nothing here depends on the model or the data.

Modules, each importing only those before it: errors, log_handler, streams, signals, startup, forks, memory,
progress, hub, templates, versions, ranks, distributed, ddp, workers.
"""
