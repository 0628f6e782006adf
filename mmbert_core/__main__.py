"""`python -m mmbert_core COMMAND`, the same as `mmbert COMMAND`; also what torchrun starts with -m."""

from mmbert_core.cli import run

if __name__ == "__main__":
    run()
