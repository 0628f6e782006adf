"""Where an encoder's position embeddings begin, and how many tokens they hold."""

import pytest

from mmbert_core.model.positions import max_tokens, position_offset


@pytest.mark.parametrize(
    ("family", "offset"),
    [
        ("Bert", 0),
        ("Electra", 0),
        ("DistilBert", 0),
        ("ModernBert", 0),
        ("Roberta", 1),
        ("MPNet", 2),
        ("Longformer", 1),
    ],
)
def test_positions_start_after_the_paddings_where_the_embedding_reserves_one(make_encoder, family, offset):
    encoder = make_encoder(family)
    assert (position_offset(encoder), max_tokens(encoder)) == (offset, 80 - offset)


def test_the_padding_token_decides_the_offset(make_encoder):
    assert position_offset(make_encoder("Roberta", pad_token_id=3)) == 4


def test_relative_positions_have_no_limit(make_encoder):
    encoder = make_encoder("Bert")
    encoder.config.max_position_embeddings = -1
    assert max_tokens(encoder) is None
