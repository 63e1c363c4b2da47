"""
The plugin of vLLM: with this package installed, `vllm serve MODEL` and `vllm.LLM(MODEL)` run a whole LLM-to-SLM
checkpoint, encoder included. vLLM loads the entry point `vllm.general_plugins` in each of its processes.
"""

from __future__ import annotations

import copy
from typing import Any

from ..configuration_llm2slm import LLM2SLMConfig
from ..fusion_llm2slm import fusion_of


ARCHITECTURE = "LLM2SLMForConditionalGeneration"
MODE = "llm2slm"  # of vLLM's tokenizer and renderer
MODEL_MODULE = "modeling_llm2slm.engines.vllm_model"
CACHE_ARCHITECTURE = "LLM2SLMWithCache"  # to vLLM, checkpoints with fusion "cache" are another model
CACHE_MODE = "llm2slm_cache"
CACHE_MODULE = "modeling_llm2slm.engines.vllm_cache"


class VLLMLLM2SLMConfig(LLM2SLMConfig):
    """The config as vLLM sees it: to vLLM, the SLM is decoder-only and the prompt is a modality of its own."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.decoder.is_encoder_decoder:
            raise ValueError(
                "The checkpoint has an encoder-decoder SLM, which vLLM does not serve: use `llm2slm serve`."
            )
        self.is_encoder_decoder = False
        if fusion_of(self).fills_cache:
            self.architectures = [CACHE_ARCHITECTURE]

    @property
    def llm_part(self) -> Any:
        """`PreTrainedConfig`: With fusion `"cache"`, the config of the layers of the LLM that are built."""
        config, layers = copy.deepcopy(self.encoder), fusion_of(self).llm_layer
        if layers is not None:
            config.num_hidden_layers = layers
        return config

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        if decoder or encoder or not fusion_of(self).fills_cache:
            return super().get_text_config(decoder, encoder)
        config = self.llm_part  # it has all KV caches
        config.vocab_size = 2 * self.vocab_size  # see `vllm_cache.py`
        return config


class UpdateModelConfig:
    """Chooses the tokenizers and the renderer, unless the user has."""

    mode = MODE

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = cls.mode

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Change nothing."""


class UpdateCacheModelConfig(UpdateModelConfig):
    """Also refuses what cannot run two models whose tokens take turns."""

    mode = CACHE_MODE

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        from vllm.platforms import current_platform

        super().verify_and_update_model_config(model_config)
        if not current_platform.is_cpu():  # CUDA graphs are recorded for all tokens of a step, not for those of a part
            model_config.enforce_eager = True

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        parallel = vllm_config.parallel_config
        refused = {
            "`tensor_parallel_size` and `pipeline_parallel_size`": parallel.world_size > 1,
            "`speculative_config`": vllm_config.speculative_config is not None,
            "`kv_transfer_config`": vllm_config.kv_transfer_config is not None,
            "the V2 model runner (`VLLM_USE_V2_MODEL_RUNNER=0`)": vllm_config.use_v2_model_runner,
        }
        for name, is_given in refused.items():
            if is_given:
                raise ValueError(f'Fusion "cache" does not run in vLLM with {name}: turn that off.')


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
    ModelRegistry.register_model(CACHE_ARCHITECTURE, f"{CACHE_MODULE}:VLLMLLM2SLMCache")
    for mode in (MODE, CACHE_MODE):
        TokenizerRegistry.register(mode, MODEL_MODULE, "OutputTokenizer")
    RENDERER_REGISTRY.register(MODE, MODEL_MODULE, "PromptRenderer")
    RENDERER_REGISTRY.register(CACHE_MODE, CACHE_MODULE, "MarkedPromptRenderer")
    _CONFIG_REGISTRY[LLM2SLMConfig.model_type] = VLLMLLM2SLMConfig
    MODELS_CONFIG_MAP[CACHE_ARCHITECTURE] = UpdateCacheModelConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = UpdateModelConfig
