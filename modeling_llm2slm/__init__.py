"""
LLM-to-SLM for transformers: a large frozen language model reads the prompt once, a small one writes the answer.

Importing this package registers config, model and processor with transformers' Auto classes.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor

from .configuration_llm2slm import LLM2SLMConfig
from .data.collator import DataCollatorForLLM2SLM
from .modeling_llm2slm import LLM2SLMForConditionalGeneration, PromptStates
from .processing_llm2slm import LLM2SLMProcessor
from .training import model_card
from .training.adapters import ia3_config, lora_config
from .training.optimization import parameter_groups


if TYPE_CHECKING:
    from .engines.exported import ExportedLLM2SLM

AutoConfig.register(LLM2SLMConfig.model_type, LLM2SLMConfig)
AutoModelForSeq2SeqLM.register(LLM2SLMConfig, LLM2SLMForConditionalGeneration)
AutoProcessor.register(LLM2SLMConfig, LLM2SLMProcessor)
# What is saved then brings its code: the files that these classes are in, and what they import.
LLM2SLMConfig.register_for_auto_class()
LLM2SLMForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
LLM2SLMProcessor.register_for_auto_class()
LLM2SLMForConditionalGeneration.model_cards = model_card


def __getattr__(name: str) -> Any:
    """What few need is imported when it is asked for."""
    if name == "ExportedLLM2SLM":
        from .engines.exported import ExportedLLM2SLM

        return ExportedLLM2SLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DataCollatorForLLM2SLM",
    "ExportedLLM2SLM",
    "LLM2SLMConfig",
    "LLM2SLMForConditionalGeneration",
    "LLM2SLMProcessor",
    "PromptStates",
    "ia3_config",
    "lora_config",
    "parameter_groups",
]
