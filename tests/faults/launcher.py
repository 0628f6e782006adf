"""`launcher.py FILE MODULE WORDS...`: `python -m MODULE WORDS...`, which also notes in FILE how each worker ended: rank and exit code, a line each."""

import runpy
import subprocess
import sys
from typing import Any


def note_ends(path: str) -> None:
    """torchrun says nothing about its workers' exit codes when a signal ends it; this is what the system tells their parent."""

    class Noting(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._rank: str | None = (options.get("env") or {}).get("RANK")
            super().__init__(*arguments, **options)

        def poll(self) -> int | None:
            return self._noted(super().poll())

        def wait(self, timeout: float | None = None) -> int:
            return self._noted(super().wait(timeout))

        def _noted(self, code: Any) -> Any:
            if code is not None and self._rank is not None:
                with open(path, "a", encoding="utf-8") as stream:
                    stream.write(f"{self._rank} {code}\n")
                self._rank = None
            return code

    subprocess.Popen = Noting  # type: ignore[misc]


if __name__ == "__main__":
    note_ends(sys.argv[1])
    del sys.argv[:2]
    sys.path.pop(0)  # this file's folder
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
