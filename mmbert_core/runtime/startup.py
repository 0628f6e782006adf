"""What a command does before its long imports. No library code uses this: the settings are those of a whole process."""

import gc

from mmbert_core.runtime import signals

signals.note_launcher()  # it may have ended, and this process have another parent, when the imports are done

# imports create a million objects that stay: collecting as often as by default takes a second
gc.set_threshold(100_000, 50, 100)


def freeze_imports() -> None:
    """After the imports: collections while rows are read do not look at these objects."""
    gc.freeze()
