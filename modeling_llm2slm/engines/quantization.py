"""Fewer bits for the frozen LLM while the rest trains in full precision, or for all of a model that only answers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..modeling_llm2slm import LLM2SLMForConditionalGeneration


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
    with_linear_layers(model.encoder.llm)
    _quantize(model.encoder.llm, to)


def quantize(model: PreTrainedModel, to: str = "int8") -> None:
    """
    Keeps the matrices of a model that only answers in 8 or 4 bits, in place: of a composite those of LLM and SLM, of
    any other model all. Embeddings, norms and the projector stay as they are; an output layer that shares its matrix
    with the embedding gets one of its own.

    Args:
        model: The model, on the device it will run on.
        to: See [`quantize_llm`].

    Raises:
        ImportError: If the library is not installed.
        ValueError: If `to` is something else.
    """
    if to not in QUANTIZATIONS:
        raise ValueError(f"A model is quantized to one of {', '.join(map(repr, QUANTIZATIONS))}, not to {to!r}.")
    composite = isinstance(model, LLM2SLMForConditionalGeneration)
    for part in (model.encoder.llm, model.decoder) if composite else (model,):
        with_linear_layers(part)
        _quantize(part, to)


def with_linear_layers(module: nn.Module) -> None:
    """Turns the transposed layers of a GPT-2 into linear ones, in place: no library quantizes others."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv1D):
                linear = nn.Linear(layer.weight.shape[0], layer.weight.shape[1], device="meta")
                linear.weight = nn.Parameter(layer.weight.data.T.contiguous(), layer.weight.requires_grad)
                linear.bias = layer.bias
                setattr(parent, name, linear)


def _quantize(module: nn.Module, to: str) -> None:
    try:
        _to_int8(module) if to == "int8" else _to_nf4(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Quantizing to {to} needs {error.name}: pip install 'modeling-llm2slm[quantization]'."
        ) from error


def _to_int8(module: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear))


def _to_nf4(llm: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    kept = set(getattr(llm, "_keep_in_fp32_modules", None) or ())
    linears = [(name, module) for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        parent, _, last = name.rpartition(".")
        # The CPU's kernel wants blocks of rows, and is wrong where a block of 64 weights is not of one row.
        if last in kept or linear.out_features % 32 or linear.in_features % 64:
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
