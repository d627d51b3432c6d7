"""What this machine's processor has instructions for."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlm.recipe.model import ModelSpec

BF16 = frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})

GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""What the drivers of NVIDIA and AMD make."""

REASON = "# written by a machine without bf16 instructions; bfloat16 halves the memory where there are"


def cpu_flags() -> set[str]:
    """The processor's features by Linux's names; empty where it does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}


def without_bf16() -> bool:
    """Whether this is known to be a processor without instructions for bf16, where such products are slow."""
    flags = cpu_flags()
    return bool(flags) and not flags & BF16 and platform.machine() != "arm64"


def for_this_machine(recipe: str) -> str:
    """A shipped recipe's text, in float32 where the processor is slow in bf16 and there is no GPU. Loads no library."""
    if not without_bf16() or any(Path(device).exists() for device in GPUS):
        return recipe
    return re.sub(r"^( *)dtype: bfloat16.*$", rf"\1dtype: float32        {REASON}", recipe, flags=re.MULTILINE)


def slow_type(spec: ModelSpec) -> str | None:
    """A sentence to the user where a model's type of weights is slow on this machine, and another one is not."""
    if spec.dtype != "bfloat16" or not without_bf16():
        return None
    from fedlm.models.load import pick_device

    if pick_device(spec.device).type != "cpu":
        return None
    return (
        "Note: this processor has no bf16 instructions. The model is in bfloat16, which can be several times slower "
        "here than --set model.dtype=float32 (twice the memory; another recipe, so other bits)."
    )
