"""
The plugin of vLLM: with this package installed, `vllm serve MODEL` and `vllm.LLM(MODEL)` run a whole LLM-to-SLM
checkpoint, encoder included. vLLM loads the entry point `vllm.general_plugins` in each of its processes.
"""

from __future__ import annotations

from typing import Any

from ..configuration_llm2slm import LLM2SLMConfig
from ..fusion_llm2slm import fusion_of


ARCHITECTURE = "LLM2SLMForConditionalGeneration"
MODE = "llm2slm"  # of vLLM's tokenizer and renderer
MODEL_MODULE = "modeling_llm2slm.engines.vllm_model"


class VLLMLLM2SLMConfig(LLM2SLMConfig):
    """The config as vLLM sees it: to vLLM, the SLM is decoder-only and the prompt is a modality of its own."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.decoder.is_encoder_decoder:
            raise ValueError(
                "The checkpoint has an encoder-decoder SLM, which vLLM does not serve: use `llm2slm serve`."
            )
        if fusion_of(self).fills_cache:
            raise ValueError(
                f"The checkpoint has fusion={self.fusion!r}, whose SLM reads keys and values in place of embeddings, "
                "which vLLM does not serve: use `llm2slm serve`."
            )
        self.is_encoder_decoder = False


class UpdateModelConfig:
    """Chooses the tokenizers and the renderer, unless the user has."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = MODE

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Change nothing."""


def register() -> None:
    """Register the model with vLLM; called once or more in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    # Named, and not imported: vLLM imports the model where it runs, after it has chosen the device.
    ModelRegistry.register_model(ARCHITECTURE, f"{MODEL_MODULE}:VLLMLLM2SLM")
    TokenizerRegistry.register(MODE, MODEL_MODULE, "OutputTokenizer")
    RENDERER_REGISTRY.register(MODE, MODEL_MODULE, "PromptRenderer")
    _CONFIG_REGISTRY[LLM2SLMConfig.model_type] = VLLMLLM2SLMConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = UpdateModelConfig
