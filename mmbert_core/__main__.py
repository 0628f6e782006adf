"""`python -m mmbert_core COMMAND`, the same as `mmbert COMMAND`; under torchrun: `torchrun ... -m mmbert_core`."""

from mmbert_core.cli import run

if __name__ == "__main__":
    run()
