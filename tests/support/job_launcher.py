"""`job_launcher.py FILE MODULE ARGUMENTS...` runs `python -m MODULE ARGUMENTS...`.

FILE gets a line for each worker process that ended: rank and exit code.
"""

import runpy
import subprocess
import sys
from typing import Any


def record_exit_codes(path: str) -> None:
    """torchrun does not print its workers' exit codes when a signal ends it; this records what `wait` returned."""

    class RecordingPopen(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._rank: str | None = (options.get("env") or {}).get("RANK")
            super().__init__(*arguments, **options)

        def poll(self) -> int | None:
            return self._recorded(super().poll())

        def wait(self, timeout: float | None = None) -> int:
            return self._recorded(super().wait(timeout))

        def _recorded(self, code: Any) -> Any:
            if code is not None and self._rank is not None:
                with open(path, "a", encoding="utf-8") as stream:
                    stream.write(f"{self._rank} {code}\n")
                self._rank = None
            return code

    subprocess.Popen = RecordingPopen  # type: ignore[misc]


if __name__ == "__main__":
    record_exit_codes(sys.argv[1])
    del sys.argv[:2]
    sys.path.pop(0)  # this file's folder
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
