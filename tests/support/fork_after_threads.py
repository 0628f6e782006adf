"""What tests/runtime/test_forks.py runs in a process of its own: `fork_after_threads.py MODEL_FOLDER FORKS`.

Forks as soon as four threads that predicted have ended. Prints how many children do not predict within 20 seconds.
"""

import logging
import os
import sys
import threading
import time

from mmbert_core.predictor import Predictor
from tests.support.fork_worker import ROWS

SECONDS = 20.0


def ends(child: int) -> bool:
    """Whether the child ends in time; one that does not is killed."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def main(folder: str, forks: str) -> None:
    logging.disable(logging.WARNING)
    predictor, hanging = Predictor.from_folder(folder), 0
    predictor.predict(ROWS[:40])
    for _ in range(int(forks)):
        threads = [threading.Thread(target=predictor.predict, args=(ROWS[:40],)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        child = os.fork()
        if not child:
            predictor.predict(ROWS[:40])
            os._exit(0)
        hanging += not ends(child)
    print(f"{hanging} of {forks} hang")


if __name__ == "__main__":
    main(*sys.argv[1:])
