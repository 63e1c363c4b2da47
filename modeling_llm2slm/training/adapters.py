"""Adapters (LoRA, DoRA, IA3) for the SLM of an LLM-to-SLM model."""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from peft import IA3Config, LoraConfig

    from ..modeling_llm2slm import LLM2SLMForConditionalGeneration


# Excludes all modules before the SLM: "all-linear", and names of layers that LLM and SLM share, would match them.
_BEFORE_SLM = r"encoder\..*"


def lora_config(model: "LLM2SLMForConditionalGeneration", **overrides: Any) -> "LoraConfig":
    r"""
    Return a `peft.LoraConfig` that adapts every linear layer of the SLM except its head, and trains the modules of
    the fusion (the projector) in full. `target_modules` match modules of the SLM only; the LLM is never adapted.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): The model to adapt.
        overrides:
            Arguments of `peft.LoraConfig` that replace these defaults (`r=16`, `lora_alpha=32`, ...); `use_dora=True`
            gives DoRA. `exclude_modules` leaves out more modules.

    Returns:
        `peft.LoraConfig`: for `peft.get_peft_model(model, config)`.

    Raises:
        ValueError: If `layers_to_transform` is set without a list of `target_modules`.
    """
    from peft import LoraConfig

    if overrides.get("layers_to_transform") is not None and isinstance(overrides.get("target_modules", ""), str):
        raise ValueError('`layers_to_transform` needs a list of names too, such as `target_modules=["c_attn"]`.')
    head = model.get_output_embeddings()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module, layer in _layers(model.decoder)
        if isinstance(layer, nn.Linear | Conv1D) and module is not head
    }
    defaults = {"r": 16, "lora_alpha": 32, "target_modules": _in_slm(names)} | _defaults(model)
    return LoraConfig(**(defaults | overrides | _exclusion(overrides)))


def ia3_config(model: "LLM2SLMForConditionalGeneration", **overrides: Any) -> "IA3Config":
    r"""
    Return a `peft.IA3Config` that scales keys, values and the inner activations of the SLM's feed-forward layers, and
    trains the modules of the fusion (the projector) in full. The LLM is never adapted.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): The model to adapt.
        overrides: Arguments of `peft.IA3Config` that replace these defaults.

    Returns:
        `peft.IA3Config`: for `peft.get_peft_model(model, config)`.

    Raises:
        ValueError: If peft does not know the layers of this family of SLM, and `target_modules` do not name them.
    """
    from peft import IA3Config
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    )

    family = model.config.decoder.model_type
    defaults = _defaults(model)
    if "target_modules" not in overrides:
        if family not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
            raise ValueError(
                f"peft does not know which layers of a {family} SLM IA3 scales: pass `target_modules` and "
                "`feedforward_modules`, regular expressions that begin with `decoder`."
            )
        defaults["target_modules"] = _in_slm(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[family])
        defaults["feedforward_modules"] = _in_slm(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family])
    return IA3Config(**(defaults | overrides | _exclusion(overrides)))


def _defaults(model: "LLM2SLMForConditionalGeneration") -> dict[str, Any]:
    # Layer by layer: peft 0.21 can neither mix adapters nor merge IA3 with a saved module that has layers inside.
    layers = [
        f"{name}.{inner}".rstrip(".")
        for name, module in model.encoder.new_modules().items()
        for inner, _, layer in _layers(module)
        if next(layer.parameters(recurse=False), None) is not None
    ]
    return {
        "task_type": "SEQ_2_SEQ_LM",
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.decoder.modules()),  # GPT-2's
        "modules_to_save": layers,
    }


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield name, module and, where an adapter of peft wraps it, the original of each module of a model."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        original = getattr(module, "base_layer", getattr(module, "original_module", module))
        if original is not module:
            inside += (f"{name}.".lstrip("."),)
        yield name, module, original


def _in_slm(names: Iterable[str]) -> str:
    """Return a pattern for the SLM's modules whose names end in one of these."""
    return rf"decoder\..*\.({_any_of(names)})"


def _any_of(names: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, names)))


def _exclusion(overrides: dict[str, Any]) -> dict[str, Any]:
    excluded = overrides.get("exclude_modules")
    if not excluded:
        return {"exclude_modules": _BEFORE_SLM}
    if not isinstance(excluded, str):
        excluded = rf"(.*\.)?({_any_of(excluded)})"
    return {"exclude_modules": rf"{_BEFORE_SLM}|{excluded}"}


__all__ = ["ia3_config", "lora_config"]
