"""A training or prediction with injected faults: `job_worker.py FAULTS ARGUMENTS...`.

FAULTS is a JSON object for `injected_faults.inject`; ARGUMENTS are those of `mmbert`.
"""

import json
import sys

from mmbert_core import cli
from tests.support import injected_faults


def main() -> None:
    injected_faults.inject(json.loads(sys.argv[1]))
    sys.argv[1:] = sys.argv[2:]
    cli.run()


if __name__ == "__main__":
    main()
