"""The training loop and its parts, from an empty folder or a checkpoint to a tested model folder.

Modules, each importing only those before it: saved_state, checkpoint, run_log, optim, average, head_fit, decision_fit,
memory, run, run_folder, resume, start, validation, head_first, results, blend_fit, finish, loop, train.
"""
