"""Sizes of modules in memory."""

from __future__ import annotations

import torch
from torch import nn


def nbytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights, quantized or not."""
    return sum(_tensor_bytes(parameter.data) for parameter in module.parameters())


def _tensor_bytes(tensor: torch.Tensor) -> int:
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    if not names:
        return tensor.nbytes
    return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
