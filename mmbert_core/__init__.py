"""mmbert_core: fine-tune a pretrained BERT together with tabular columns into a classifier, in plain PyTorch."""

__version__ = "0.2.0"
