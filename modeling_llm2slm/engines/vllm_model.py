"""
An LLM-to-SLM checkpoint as a multimodal model of vLLM, see `vllm_plugin.py`.

To vLLM, a request is one placeholder for each prompt token and the start token; the placeholders and the start token
have the same id. The LLM's tokenizer reads the prompt, as the modality `"prompt"`, in vLLM's frontend. In its engine,
the encoder turns the token ids into prompt embeddings P `(N, d_slm)`, which replace the placeholders' embeddings, and
vLLM's own class for the SLM's architecture decodes. vLLM keeps P of the last prompts, so equal prompts are read once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptIndexTargets,
    PromptInsertion,
)
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.tokenizers.hf import get_cached_tokenizer

from ..inference.model import LLM2SLMForConditionalGeneration
from ..processing_llm2slm import LLM2SLMProcessor


PROMPT = "prompt"  # the name of the modality


@functools.lru_cache
def processor_of(path: str, revision: str | None = None) -> LLM2SLMProcessor:
    """Return the two tokenizers of a checkpoint."""
    return LLM2SLMProcessor.from_pretrained(path, revision=revision)


class OutputTokenizer:
    """vLLM's tokenizer: the SLM's, as vLLM decodes outputs, finds stop texts and guides outputs with it."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, revision: str | None = None, **kwargs: Any) -> Any:
        """Load the tokenizer of a checkpoint."""
        return get_cached_tokenizer(processor_of(str(path), revision).decoder_tokenizer)


class PromptRenderer(HfRenderer):
    """Makes the text or the token ids of a request a `"prompt"`, and applies the chat template of the LLM."""

    def render_messages(self, messages: Any, params: Any) -> Any:
        conversation, data, _ = parse_chat_messages(messages, self.model_config, content_format="string")
        if data:
            raise ValueError("An LLM-to-SLM model reads text only. Leave out other contents.")
        tokenizer = processor_of(self.model_config.model, self.model_config.revision).tokenizer
        written = safe_apply_chat_template(
            self.model_config, tokenizer, conversation, **params.get_apply_chat_template_kwargs()
        )
        return conversation, parse_dec_only_prompt(written)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        return self.render_messages(messages, params)

    def _tokenize_singleton_prompt(self, prompt: Any, params: Any) -> Any:
        if "prompt_embeds" in prompt:
            raise ValueError("An LLM-to-SLM model reads text or token ids of the LLM. Leave out `prompt_embeds`.")
        given = prompt.get("multi_modal_data") or {PROMPT: prompt.get("prompt_token_ids") or prompt.get("prompt")}
        start = [self.model_config.hf_config.decoder_start_token_id]
        return {**prompt, "prompt_token_ids": start, "multi_modal_data": given}

    async def _tokenize_singleton_prompt_async(self, prompt: Any, params: Any) -> Any:
        return self._tokenize_singleton_prompt(prompt, params)


class PromptDataParser(MultiModalDataParser):
    """Takes a text, or token ids of the LLM, as the modality `"prompt"`."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {PROMPT: self._parse_prompt}

    def _parse_prompt(self, data: Any) -> Any:
        if not data:
            raise ValueError("The prompt is empty.")
        is_one = isinstance(data, str) or isinstance(data[0], int)
        return ProcessorBatchItems([data] if is_one else list(data), PROMPT)


class PromptInfo(BaseProcessingInfo):
    """The sizes of prompts."""

    def get_data_parser(self) -> PromptDataParser:
        return PromptDataParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {PROMPT: 1}

    @property
    def longest(self) -> int:
        """`int`: The longest prompt, in tokens; with the start token and an output it must fit in the SLM."""
        limits = (self.ctx.model_config.max_model_len - 2, self.get_hf_config().llm_positions)
        return min(limit for limit in limits if limit is not None)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {PROMPT: self.longest}


class PromptDummyInputs(BaseDummyInputsBuilder):
    """The longest prompt, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Mapping[str, Any]:
        return {PROMPT: [[1] * self.info.longest for _ in range(mm_counts.get(PROMPT, 0))]}


class PromptProcessor(BaseMultiModalProcessor):
    """Tokenizes prompts with the LLM's tokenizer, and puts a placeholder for each token before the start token."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        return ProcessorInputs([self._placeholder], self.info.parse_mm_data(data, validate=False))

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        model_config = self.info.ctx.model_config
        processor = processor_of(model_config.model, model_config.revision)
        rows = [
            processor(text=prompt)["input_ids"] if isinstance(prompt, str) else prompt
            for prompt in hf_data[f"{PROMPT}s"]
        ]
        for row in rows:
            self.info.get_hf_config().check_llm_length(len(row))
        return BatchFeature({"prompt_ids": [torch.tensor(row, dtype=torch.long) for row in rows]})

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        return {"prompt_ids": MultiModalFieldConfig.batched(PROMPT)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptInsertion]:
        items = out_mm_kwargs.require_data().get(PROMPT, [])

        def placeholders(index: int) -> list[int]:
            return [self._placeholder] * len(items[index].get_data()["prompt_ids"])

        return [PromptInsertion(modality=PROMPT, target=PromptIndexTargets.start(), insertion=placeholders)]

    @property
    def _placeholder(self) -> int:
        return self.info.get_hf_config().decoder_start_token_id


class Embeddings:
    """The SLM, as far as the encoder uses it: it looks prompt tokens up in the SLM's table if tokenizers are equal."""

    def __init__(self, slm: Any):
        self.get_input_embeddings = lambda: slm.embed_input_ids


@MULTIMODAL_REGISTRY.register_processor(PromptProcessor, info=PromptInfo, dummy_inputs=PromptDummyInputs)
class VLLMLLM2SLM(nn.Module, SupportsMultiModal):
    """vLLM's class of the SLM, behind the encoder of transformers."""

    _mark_language_model: Any  # from vLLM; without it, a checker takes it for a module or a tensor

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        self.model_config = vllm_config.model_config
        slm = self.model_config.hf_config.decoder
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=slm,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[slm.model_type]],
            )
        self.encoder: Any = None  # it comes with its weights

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Load the SLM as vLLM does, and the encoder as transformers does: lean checkpoints and dtypes are its own."""
        slm = ((name.removeprefix("decoder."), weight) for name, weight in weights if name.startswith("decoder."))
        loaded = self.language_model.load_weights(slm)
        # Its SLM is dropped again. It is small.
        whole = LLM2SLMForConditionalGeneration.from_pretrained(
            self.model_config.model, revision=self.model_config.revision, dtype=self.model_config.dtype
        )
        device = next(self.language_model.parameters()).device
        self.encoder = whole.encoder.bind(Embeddings(self.language_model)).to(device).eval()
        if loaded is None:
            return None
        return {f"language_model.{name}" for name in loaded} | {
            f"encoder.{name}" for name, _ in self.encoder.named_parameters()
        }

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """Return P `(N, d_slm)` of each prompt in `prompt_ids`, which have been batched."""
        prompts = list(kwargs["prompt_ids"])
        ids = pad_sequence(prompts, batch_first=True)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True)
        states = self.encoder(ids, mask, return_dict=True)
        rows = zip(states.last_hidden_state.to(self.model_config.dtype), states.attention_mask, strict=True)
        return [row[kept.bool()] for row, kept in rows]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)
