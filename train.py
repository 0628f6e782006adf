"""Train from a config: `mmbert train`.

torchrun --standalone --nproc_per_node=4 train.py run.yaml     # several processes
python train.py run.yaml                                       # one process
python train.py                                                # the built-in sample, a minute on a CPU
"""

import sys

from mmbert_core.cli import run

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    run()
