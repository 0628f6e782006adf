"""torchrun --standalone --nproc_per_node=4 train.py run.yaml   |   python train.py run.yaml   |   python train.py (built-in sample)"""

import sys

from mmbert_core.cli import run

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    run()
