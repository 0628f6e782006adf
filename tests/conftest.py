"""What a command run inside this process leaves behind is put back after every test."""

import logging
import os

import pytest
import torch


def pytest_configure(config):
    """Bit-equal promises are the CPU's: without `-m gpu` every process of the tests computes there."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def restored_globals():
    """The package's logger (a command gives it handlers on that moment's stderr) and PyTorch's threads."""
    logger = logging.getLogger("mmbert_core")
    handlers, level, propagate, threads = logger.handlers[:], logger.level, logger.propagate, torch.get_num_threads()
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other take longer than these tiny models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
