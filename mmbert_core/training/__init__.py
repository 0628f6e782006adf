"""The training loop and its parts: checkpoint, run_log, optim, hooks (floor 2), loop (floor 3)."""
