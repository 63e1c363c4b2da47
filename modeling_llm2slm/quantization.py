"""Fewer bits for the frozen LLM while the rest trains in full precision."""

from __future__ import annotations

import torch
from torch import nn

from .modeling_llm2slm import LLM2SLMForConditionalGeneration


QUANTIZATIONS = ("int8", "nf4")


def quantize_llm(model: LLM2SLMForConditionalGeneration, to: str = "int8") -> None:
    """
    Keeps the matrices of the frozen LLM in 8 or 4 bits, in place. Embedding, norms and all that trains stay as they
    are. A model that was quantized is for training and generating; [`with_llm`] makes it whole again to be saved.

    An LLM can as well be quantized while it is loaded, on the devices that transformers does it for:
    `from_encoder_decoder_pretrained(..., encoder_quantization_config=BitsAndBytesConfig(load_in_4bit=True))`.

    Args:
        model: The model, on the device it will run on.
        to: `"int8"`, one scale a row, by torchao; or `"nf4"`, 4 bits, by bitsandbytes. NF4 leaves the layers that T5
            wants in float32 (`wo`) as they are.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If `to` is something else, or the LLM trains.
    """
    if to not in QUANTIZATIONS:
        raise ValueError(f"An LLM is quantized to one of {', '.join(map(repr, QUANTIZATIONS))}, not to {to!r}.")
    if not model.config.freeze_llm:
        raise ValueError("A quantized LLM cannot train: set `freeze_llm=True`, or leave it as it is.")
    try:
        _to_int8(model.encoder.llm) if to == "int8" else _to_nf4(model.encoder.llm)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Quantizing the LLM to {to} needs {error.name}: pip install 'modeling-llm2slm[quantization]'."
        ) from error


def _to_int8(llm: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(llm, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear))


def _to_nf4(llm: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    kept = set(getattr(llm, "_keep_in_fp32_modules", None) or ())
    linears = [(name, module) for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        parent, _, last = name.rpartition(".")
        if last in kept or linear.out_features % 32:  # the CPU's kernel wants blocks of rows
            continue
        weight = linear.weight.data
        quantized = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_type="nf4",
            compute_dtype=weight.dtype,
            device="meta",
        )
        quantized.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(weight.device)
        quantized.bias = linear.bias
        llm.get_submodule(parent).register_module(last, quantized)


def nbytes(module: nn.Module) -> int:
    """Bytes of the weights of a module, also of quantized ones."""
    return sum(_tensor_bytes(parameter.data) for parameter in module.parameters())


def _tensor_bytes(tensor: torch.Tensor) -> int:
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    if not names:
        return tensor.nbytes
    return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
