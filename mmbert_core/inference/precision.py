"""The numeric precision of a forward pass: fp32, or autocast to bf16 or fp16."""

import logging

import torch

logger = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(asked: str, device: torch.device) -> str:
    """The precision, "fp32", "bf16" or "fp16", for the config's setting `asked`; warns where the device lacks it."""
    if device.type != "cuda":
        if asked in ("bf16", "fp16"):
            logger.warning("precision %s asked for, but there is no GPU: fp32 is used", asked)
        return "fp32"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        return "bf16" if has_bf16 else "fp16"
    if asked == "bf16" and not has_bf16:
        logger.warning("precision bf16 asked for, but this GPU has none: fp16 is used")
        return "fp16"
    return asked


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context of a forward pass in mixed precision; does nothing for fp32."""
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32")


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler for fp16; does nothing for the other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
