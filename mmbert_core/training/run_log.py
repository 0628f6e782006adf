"""The log of a run: metrics.jsonl, TensorBoard when installed, a progress bar in a terminal or else log lines.

Only rank 0 writes; on the other ranks every method does nothing.
"""

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmbert_core.runtime.progress import Throttle
from mmbert_core.storage.files import path_in_errors, write_text
from mmbert_core.storage.metrics_log import kept_lines

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class RunLog:
    """Appends to metrics.jsonl and shows the progress. On resume, lines of steps after `first_step` are removed.

    `is_resumed`: from a checkpoint of `first_step`; those of step 0 have lines too. A new run begins an empty file.
    `validated`, `tested`: whether the validation of `first_step`, if one is due there, and the test are complete. If
    not, their lines are removed too, as they will be repeated.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        first_step: int,
        total_steps: int,
        is_resumed: bool,
        validated: bool = True,
        tested: bool = False,
    ) -> None:
        self.is_main = is_main
        self.total_steps = total_steps
        self._throttle = Throttle(SECONDS_BETWEEN_LINES)
        if not is_main:
            return
        self._path = Path(folder) / "metrics.jsonl"
        kept = kept_lines(self._path, first_step if is_resumed else -1, validated=validated, tested=tested)
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._stream = open(self._path, "a", encoding="utf-8")
        self._purge_step = first_step + 1 if is_resumed else None  # TensorBoard hides events from there on
        self._tensorboard, self._has_curves = None, False
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def record(self, values: Mapping[str, Any]) -> None:
        """Write one line, an object with `step` and metrics. None: an undefined metric; `undefined` has the reason."""
        if not self.is_main:
            return
        with path_in_errors(self._path):
            self._stream.write(json.dumps(dict(values), allow_nan=False) + "\n")
            self._stream.flush()
        if not self._has_curves:  # not in the constructor: a finished run that is started again writes no files
            self._has_curves = True
            self._tensorboard = _open_tensorboard(self._path.parent / "tensorboard", self._purge_step)
        if self._tensorboard is not None and "stage" not in values:
            try:
                for name, value in values.items():
                    if name not in ("step", "epoch") and isinstance(value, (int, float)):
                        self._tensorboard.add_scalar(name, value, values["step"])
            except OSError as error:  # from an earlier call: TensorBoard writes in a thread
                logger.warning("no more curves for TensorBoard: %s", error)
                self._tensorboard = None

    def sync(self) -> None:
        """Rank 0 only. Wait until all recorded lines are on the disk."""
        os.fsync(self._stream.fileno())

    def progress(self, step: int, figures: str) -> None:
        """Advance the bar, or print a plain line every few seconds and at the last step."""
        if not self.is_main:
            return
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(figures, refresh=False)
        if self._bar.disable and (self._throttle.is_due() or step == self.total_steps):
            logger.info("step %d/%d  %s", step, self.total_steps, figures)

    def say(self, line: str) -> None:
        """Log a line above the bar."""
        if self.is_main:
            self._bar.clear()
            logger.info("%s", line)
            self._bar.refresh()

    def close(self) -> None:
        if self.is_main:
            self._bar.close()
            with suppress(OSError):  # of a full disk: `record` has raised the same error
                self._stream.close()
            with suppress(OSError):  # it must not replace an error that ends the run
                if self._tensorboard is not None:
                    self._tensorboard.close()


def _open_tensorboard(folder: Path, purge_step: int | None) -> Any:
    """A SummaryWriter when the extra `tensorboard` is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    if getattr(threading.excepthook, "func", None) is not _on_thread_error:
        threading.excepthook = partial(_on_thread_error, threading.excepthook)
    return SummaryWriter(str(folder), purge_step=purge_step)


def finite_or_none(value: float | None) -> float | None:
    """A number as JSON can hold it: None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _on_thread_error(previous_hook: Callable[[Any], object], failure: Any) -> None:
    """Drop the traceback of a failed write in TensorBoard's thread: the next `add_scalar` raises the same error."""
    if not (type(failure.thread).__module__.startswith("tensorboard.") and isinstance(failure.exc_value, OSError)):
        previous_hook(failure)
