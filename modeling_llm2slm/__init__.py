"""
LLM-to-SLM for transformers: a large frozen language model reads the prompt once, a small one writes the output.

Importing this package registers config, model and processor with transformers' Auto classes.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer

from . import configuration_llm2slm, modeling_llm2slm, processing_llm2slm
from .cache_llm2slm import PromptStates
from .checks import check_config
from .configuration_llm2slm import LLM2SLMConfig
from .data.collator import DataCollatorForLLM2SLM
from .fusion_llm2slm import Fusion, register_fusion
from .inference.model import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from .inference.shared_layers import CheckedCache
from .processing_llm2slm import LLM2SLMTokenizer
from .states import without_llm
from .states.without_llm import load_without_llm
from .training.adapters import ia3_config, lora_config
from .training.optimization import parameter_groups
from .training.stock_trainer import extend_trainer


if TYPE_CHECKING:
    from .engines.exported import ExportedLLM2SLM
    from .inference.map_batches import GenerateBatches
    from .inference.text_to_text import TextToText
    from .states.store import StateStore

configuration_llm2slm.CHECKS.append(check_config)
register_fusion(CheckedCache)
AutoConfig.register(LLM2SLMConfig.model_type, LLM2SLMConfig)
AutoModel.register(LLM2SLMConfig, LLM2SLMForConditionalGeneration)
AutoModelForSeq2SeqLM.register(LLM2SLMConfig, LLM2SLMForConditionalGeneration)
AutoProcessor.register(LLM2SLMConfig, LLM2SLMProcessor)
# By its name alone: `AutoTokenizer` would run the code of a folder in place of a class that belongs to a config.
AutoTokenizer.register(LLM2SLMTokenizer, LLM2SLMTokenizer)
# A saved model then carries its code: the files that define these classes, and the files they import.
LLM2SLMConfig.register_for_auto_class()
modeling_llm2slm.LLM2SLMForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
processing_llm2slm.LLM2SLMProcessor.register_for_auto_class()

extend_trainer()
sys.modules[f"{__name__}.without_llm"] = without_llm  # its former name

# Imported on first use, as they need more than transformers.
_LAZY = {
    "ExportedLLM2SLM": ".engines.exported",
    "GenerateBatches": ".inference.map_batches",
    "StateStore": ".states.store",
    "TextToText": ".inference.text_to_text",
}


def __getattr__(name: str) -> Any:
    """Import a name of `_LAZY` on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


__all__ = [
    "DataCollatorForLLM2SLM",
    "ExportedLLM2SLM",
    "Fusion",
    "GenerateBatches",
    "LLM2SLMConfig",
    "LLM2SLMForConditionalGeneration",
    "LLM2SLMProcessor",
    "LLM2SLMTokenizer",
    "PromptStates",
    "StateStore",
    "TextToText",
    "ia3_config",
    "load_without_llm",
    "lora_config",
    "parameter_groups",
    "register_fusion",
]
