"""The training loop and its parts: checkpoint, run_log, optim, hooks, setup (floor 2), loop (floor 3)."""
