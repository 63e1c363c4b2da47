"""An LLM-to-SLM model as the assistant model of its own LLM, under stock assisted generation."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, ModelOutput

from ..cache_llm2slm import LLM2SLMCache
from ..fusion_llm2slm import Fusion, probe_ids
from ..modeling_llm2slm import LLM2SLMEncoder


class RecentStates:
    """The last output of the LLM's encoder in each thread, for as long as the LLM's `generate()` holds it."""

    def __init__(self, reader: PreTrainedModel, owner: Any):
        self.local = threading.local()
        hook = reader.register_forward_hook(self.remember, with_kwargs=True)
        weakref.finalize(owner, hook.remove)

    def remember(self, reader: Any, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
        """Keep a weak reference to an output, with copies of its prompts. With dropout no two outputs are equal."""
        input_ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if input_ids is not None and not reader.training:
            mask = torch.ones_like(input_ids) if mask is None else mask.clone()
            self.local.last = (input_ids.clone(), mask, weakref.ref(outputs[0]))

    def find(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """Return, once, the hidden states `(B, N, d_llm)` of exactly these prompts, if the encoder read them last."""
        known_ids, known_mask, states = self.local.__dict__.pop("last", (None, None, lambda: None))
        for known, given in ((known_ids, input_ids), (known_mask, attention_mask)):
            if known is None or known.shape != given.shape or not torch.equal(known.to(given), given):
                return None
        return states()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of the LLM has read nothing yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.local = threading.local()


class AssistantEncoder(LLM2SLMEncoder):
    """The encoder of an assistant, whose LLM belongs to the caller and has mostly just read the prompt."""

    recent: RecentStates

    def train(self, mode: bool = True) -> AssistantEncoder:
        """Set the mode of the fusion's modules only."""
        llm_mode = self.llm.training
        nn.Module.train(self, mode)
        self.llm.train(llm_mode)
        return self

    def run_llm(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor, **flags: Any) -> ModelOutput:
        """Return the LLM's last output if it is that of these prompts, else run the LLM."""
        known = self.recent.find(input_ids, attention_mask) if input_ids is not None else None
        if known is not None:
            return BaseModelOutput(last_hidden_state=known)
        return super().run_llm(input_ids, attention_mask, **flags)


def as_assistant_of(model: Any, llm: PreTrainedModel) -> Any:
    """See [`LLM2SLMForConditionalGeneration.as_assistant_of`]."""
    check_assistant(model, llm)
    if not llm.config.is_encoder_decoder:
        return _continuing_slm(model, llm)
    encoder, assistant = _shallow(model.encoder, AssistantEncoder), _shallow(model, type(model))
    encoder.llm, assistant.encoder = llm.get_encoder(), encoder
    encoder.recent = RecentStates(encoder.llm, owner=encoder)
    assistant.generation_config = copy.deepcopy(model.generation_config)
    return assistant


def check_assistant(model: Any, llm: PreTrainedModel) -> None:
    """Raise `ValueError` if drafts of `model` would not be tokens of `llm`, or if it was built on another LLM."""
    config, starts = model.config, {}
    if llm.config.is_encoder_decoder:
        starts["decoder_start_token_id"] = config.decoder_start_token_id, llm.generation_config.decoder_start_token_id
    elif not model.encoder.fusion.fills_cache or type(llm) is not type(model.decoder):
        raise ValueError(
            f"A {type(llm).__name__} has no decoder. Pass the whole LLM, such as a T5ForConditionalGeneration; for a "
            'model of `fusion="cache"`, its decoder-only LLM with the head.'
        )
    if not config.shared_tokenizer:
        raise ValueError("SLM and LLM have different tokenizers. Build the model with an SLM that shares the LLM's.")
    if config.encoder_layer is not None:
        raise ValueError("The SLM was built on a middle layer of the LLM (`encoder_layer`). Build one without.")
    sizes = {"vocab_size": (config.vocab_size, llm.config.get_text_config(decoder=True).vocab_size)}
    for name, (ours, wanted) in (sizes | starts).items():
        if ours != wanted:
            raise ValueError(
                f"The SLM's `{name}` is {ours}, but the LLM's is {wanted}. Build the model with an SLM that has the "
                "LLM's."
            )
    reader = llm.get_encoder() if llm.config.is_encoder_decoder else llm
    first, second = (part.get_input_embeddings().weight for part in (model.encoder.llm, reader))
    if first.shape != second.shape or not _are_close(first, second):
        raise ValueError(f"{type(llm).__name__} is another LLM than the one in the model: its embeddings differ.")


def _continuing_slm(model: Any, llm: PreTrainedModel) -> Any:
    """
    Return the SLM as a decoder-only model that generates after a prompt of the LLM: the LLM reads what comes before
    the first step, and the SLM continues its keys and values. Stock `generate()` counts the prompt, as for any other.
    """
    encoder, slm_class = _shallow(model.encoder, LLM2SLMEncoder), type(model.decoder)
    encoder.llm = llm if encoder.fusion.llm_has_head else llm.base_model
    encoder.bind(model.decoder)

    class ContinuingSLM(slm_class):  # type: ignore[misc, valid-type]
        @functools.wraps(slm_class.forward)  # stock generation reads the signature
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cache, prompt_ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
            if cache is None or prompt_ids is None or cache.get_seq_length() > 0:
                return super().forward(*args, **kwargs)
            mask = kwargs.get("attention_mask")
            prompt = encoder(prompt_ids, torch.ones_like(prompt_ids) if mask is None else mask, return_dict=True)
            embeds = encoder.fusion.prepend(
                prompt, self.get_input_embeddings()(prompt_ids[:, -1:]), LLM2SLMCache(cache)
            )
            if not embeds.shape[1]:
                return CausalLMOutputWithPast(
                    logits=encoder.fusion.first_logits(prompt, embeds), past_key_values=cache
                )
            kwargs |= {"input_ids": None, "inputs_embeds": embeds, "position_ids": kwargs["position_ids"][:, -1:]}
            return super().forward(*args, **kwargs)

    assistant = _shallow(model.decoder, ContinuingSLM)
    assistant.generation_config = copy.deepcopy(model.decoder.generation_config)
    return assistant


def _are_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    rows = probe_ids(first, 64)
    return torch.allclose(first[rows].float(), second[rows.to(second.device)].to(first.device).float(), rtol=1e-2)


def check_drafts(fusion: Fusion, generation_config: GenerationConfig) -> None:
    """Raise `ValueError` for drafts that fail, and for outputs that stock generation cannot split by drafted token."""
    if generation_config.assistant_early_exit:
        raise ValueError(
            "`assistant_early_exit` is not supported: it drafts with some layers of one model, and there are two. Use "
            "`prompt_lookup_num_tokens` or an assistant."
        )
    if not generation_config.return_dict_in_generate:
        return
    reason = "is not supported with prompt lookup or an assistant: stock generation"
    if generation_config.output_attentions and not fusion.config.decoder.is_encoder_decoder:
        raise ValueError(f"`output_attentions` {reason} cuts off attention to the prompt. Leave it out.")
    layers = generation_config.output_hidden_states
    if layers and fusion.llm_has_head:
        raise ValueError(
            f"`output_hidden_states` {reason} needs those of the first output token, which the LLM predicts. Leave it "
            "out."
        )
    if layers and layers is not True:
        raise ValueError(f"A choice of layers in `output_hidden_states` {reason} needs all of them. Pass `True`.")


def _shallow(module: Any, module_class: type) -> Any:
    """Return a module of its own over the same children."""
    copied: Any = object.__new__(module_class)
    copied.__dict__ = module.__dict__ | {"_modules": dict(module._modules)}
    return copied
