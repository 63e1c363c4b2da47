"""LoRA for the SLM of an LLM-to-SLM model."""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from peft import LoraConfig

    from .modeling_llm2slm import LLM2SLMForConditionalGeneration


def lora_config(model: "LLM2SLMForConditionalGeneration", **overrides: Any) -> "LoraConfig":
    r"""
    A `peft.LoraConfig` that adapts every linear layer of the SLM but its head, and trains the projector (and the
    prompt embedding) in full. The LLM is never touched: the pattern begins at `decoder`.

    Args:
        model ([`LLM2SLMForConditionalGeneration`]): The model to adapt.
        overrides: Arguments of `peft.LoraConfig` that replace these defaults (`r=16`, `lora_alpha=32`, ...).

    Returns:
        `peft.LoraConfig`: for `peft.get_peft_model(model, config)`.
    """
    from peft import LoraConfig

    head = model.get_output_embeddings()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    transposed = any(isinstance(module, Conv1D) for module in model.decoder.modules())  # GPT-2's linear layers
    modules_to_save = (
        ["projector", "prompt_embedding"] if model.encoder.prompt_embedding is not None else ["projector"]
    )
    defaults = {
        "task_type": "SEQ_2_SEQ_LM",
        "r": 16,
        "lora_alpha": 32,
        "fan_in_fan_out": transposed,
        "target_modules": rf"decoder\..*\.({'|'.join(sorted(names))})",
        "modules_to_save": modules_to_save,
    }
    return LoraConfig(**(defaults | overrides))


__all__ = ["lora_config"]
