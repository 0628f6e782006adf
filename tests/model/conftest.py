"""Tiny encoders of every family under test, built from configs and saved as a pretrained model is."""

import pytest
import torch
import transformers

BASE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
FAMILIES = {
    "Bert": {},
    "Roberta": {},
    "Electra": {"embedding_size": 16},
    "DistilBert": {},
    "ModernBert": {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "Albert": {"embedding_size": 16},
    "MPNet": {},
    "Longformer": {"attention_window": 8},
}


def build(family: str, **overrides) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**{**BASE, **FAMILIES[family], **overrides})
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(config)
    with torch.no_grad():  # also biases and norms, which an initialiser sets to 0 and 1, must be seen to change
        for parameter in encoder.parameters():
            parameter.normal_(0.1, 0.3)
    return encoder.eval()


@pytest.fixture
def make_encoder():
    return build


@pytest.fixture
def saved_encoder(tmp_path):
    """saved_encoder(family, **config) -> folder with config.json and model.safetensors."""

    def save(family: str, **overrides) -> str:
        folder = tmp_path / family.lower()
        build(family, **overrides).save_pretrained(folder)
        return str(folder)

    return save
