"""Quantize weights to 8 or 4 bits: of a frozen LLM while the rest trains, or of a model that only generates."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..inference.engine import is_installed
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration


# transformers' own `BitsAndBytesConfig` and `TorchAoConfig` quantize a whole model while it is loaded. Here only parts
# of a loaded model are quantized, and NF4 leaves out the shapes that bitsandbytes computes wrongly on a CPU.
QUANTIZATIONS = {"int8": "torchao", "nf4": "bitsandbytes"}  # with the library that each needs


def check_quantizer(to: str) -> None:
    """Raise `ImportError`, before a model is loaded, if the library that quantizes to `to` is missing."""
    library = QUANTIZATIONS.get(to)
    if library is not None and not is_installed(library):
        raise ImportError(f"Quantizing to {to} needs {library}: pip install 'modeling-llm2slm[quantization]'.")


def quantize_llm(model: LLM2SLMForConditionalGeneration, to: str = "int8") -> None:
    """
    Quantize the frozen LLM, in place. Its embedding and norms, and everything that trains, stay as they are. The
    model can train and generate; [`with_llm`] restores the LLM's weights before it is saved.

    transformers can also quantize an LLM while it is loaded, on the devices that it supports:
    `from_encoder_decoder_pretrained(..., encoder_quantization_config=BitsAndBytesConfig(load_in_4bit=True))`.

    Args:
        model: The model, on the device where it will run.
        to: `"int8"`, one scale per row, by torchao; or `"nf4"`, 4 bits, by bitsandbytes. NF4 leaves the layers that T5
            needs in float32 (`wo`) as they are.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If `to` is something else, or the LLM trains.
    """
    if to not in QUANTIZATIONS:
        raise ValueError(f"An LLM is quantized to one of {', '.join(map(repr, QUANTIZATIONS))}, not to {to!r}.")
    if not model.config.freeze_llm:
        raise ValueError("A quantized LLM cannot train: set `freeze_llm=True`, or do not quantize it.")
    with_linear_layers(model.encoder.llm)
    _quantize(model.encoder.llm, to)


def quantize(model: PreTrainedModel, to: str = "int8") -> None:
    """
    Quantize a model that only generates, in place: LLM and SLM of an LLM-to-SLM model, all of any other model.
    Embeddings, norms and the projector stay as they are. An output layer that is tied to the embedding gets a
    quantized matrix of its own.

    Args:
        model: The model, on the device where it will run.
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
    """Replace the transposed layers of a GPT-2 by linear ones, in place: the libraries quantize no others."""
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


def _to_nf4(model: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        parent, _, last = name.rpartition(".")
        # The CPU kernel needs blocks of rows, and gives wrong results where a block of 64 weights spans two rows.
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
        model.get_submodule(parent).register_module(last, quantized)
