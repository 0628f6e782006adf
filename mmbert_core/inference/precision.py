"""The numeric precision of a forward pass: fp32, or autocast to bf16 or fp16."""

import logging

import torch

logger = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(asked: str, device: torch.device) -> str:
    """The precision, "fp32", "bf16" or "fp16", for the config's setting `asked`; warns where the device lacks it."""
    if device.type != "cuda":
        return _on_cpu(asked)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        return "bf16" if has_bf16 else "fp16"
    if asked == "bf16" and not has_bf16:
        logger.warning("precision bf16 asked for, but this GPU has none: fp16 is used")
        return "fp16"
    return asked


def _on_cpu(asked: str) -> str:
    """bf16 only by name, since other CPUs would give other figures: about twice as fast where the CPU multiplies it."""
    if asked == "bf16" and cpu_has_bf16():
        return "bf16"
    if asked == "bf16":
        logger.warning("precision bf16 asked for, but this CPU has no bf16 instructions: fp32 is used")
    elif asked == "fp16":
        logger.warning("precision fp16 asked for, but there is no GPU: fp32 is used")
    return "fp32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices itself; False where torch is too old to say."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)
    return any(get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Context of a forward pass in mixed precision; does nothing for fp32."""
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision], enabled=precision != "fp32")


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler for fp16; does nothing for the other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
