"""The versions that a run records."""

import torch
import transformers

import mmbert_core

VERSIONS = {
    "mmbert_core": mmbert_core.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}
