"""Packed texts on a GPU: flash attention over different lengths in half precision, padded attention with dropout."""

import pytest
import torch

from mmbert_core.model import packed_attention, packing
from tests.model.test_packing import CONFIGS, build_text_encoder, padded_batch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", list(CONFIGS))
def test_in_fp32_packed_and_padded_are_equal(family: str) -> None:
    ids, mask = padded_batch(family)
    packed, padded = (build_text_encoder(family, "mean", packed=packed).cuda()(ids, mask) for packed in (True, False))
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_packing_is_as_near_to_fp32_as_padding(family: str, dtype: torch.dtype) -> None:
    ids, mask = padded_batch(family)
    exact = build_text_encoder(family, "mean", packed=False).cuda()(ids, mask)
    with torch.autocast("cuda", dtype):
        near, padded = (
            build_text_encoder(family, "mean", packed=packed).cuda()(ids, mask).float() for packed in (True, False)
        )
    assert (near - exact).norm() <= 1.5 * (padded - exact).norm()


@pytest.mark.parametrize("size", [12, 16])
@pytest.mark.parametrize("window", [None, 4])
def test_every_attention_gives_the_same(size: int, window: int | None) -> None:
    """Flash attention does not support heads of 12."""
    query, key, value = (torch.randn(26, 3, size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    layout = packing.Packing((5, 5, 7, 9), query.device)
    assert packed_attention.takes_varlen(query) == (size == 16)
    expected = packed_attention.attend_by_group(query.float(), key.float(), value.float(), layout, 0.3, window)
    ways = [packed_attention.attend_padded(query, key, value, layout, 0.3, 0.0, window)]
    ways += [packed_attention.attend_varlen(query, key, value, layout, 0.3, window)] if size == 16 else []
    for output in ways:
        torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_gradients_in_fp32_are_the_padded_ones(family: str) -> None:
    text_encoders = [build_text_encoder(family, "mean", packed=packed).cuda() for packed in (True, False)]
    for text_encoder in text_encoders:
        text_encoder(*padded_batch(family)).square().sum().backward()
    for (name, one), other in zip(text_encoders[0].named_parameters(), text_encoders[1].parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_several_chunks_of_a_row() -> None:
    ids, mask = padded_batch("bert")
    ids, mask = (torch.cat([tensor, tensor[:1] * 0]).view(4, 2, -1) for tensor in (ids, mask))
    on_gpu = build_text_encoder("bert", "cls", packed=True).cuda()(ids, mask)
    on_cpu = build_text_encoder("bert", "cls", packed=True)(ids, mask)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_training_with_dropout(family: str) -> None:
    text_encoder = build_text_encoder(family, "mean", packed=True).cuda().train()
    ids, mask = padded_batch(family)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.autocast("cuda", torch.bfloat16):
            outputs.append(text_encoder(ids, mask))
    outputs[0].float().square().sum().backward()
    assert all(
        torch.isfinite(parameter.grad).all() for parameter in text_encoder.parameters() if parameter.grad is not None
    )
    assert torch.equal(outputs[0], outputs[1]) and (family == "modernbert" or not torch.equal(outputs[0], outputs[2]))
