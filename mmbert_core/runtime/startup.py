"""What a command does before its slow imports. For commands only: the settings are those of the whole process."""

import gc

from mmbert_core.runtime import signals

signals.note_launcher()  # torchrun may end during the imports; this process would then have another parent

# The imports create a million objects that stay; with the default thresholds, collecting garbage takes a second.
gc.set_threshold(100_000, 50, 100)


def freeze_imports() -> None:
    """Call after the imports: later garbage collections skip the objects that exist now."""
    gc.freeze()
