# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""
LLM-to-SLM (Bergner et al., arXiv 2402.16844), in the order of the forward pass: the encoder, which turns a prompt into
what the SLM reads (the projector is in `fusion_llm2slm.py`), then the whole model.
Shapes: batch B, prompt length N, output length M, widths d_llm and d_slm.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from .cache_llm2slm import (
    NO_PROMPT,
    LLM2SLMCache,
    PromptStates,
    as_llm2slm_cache,
    as_prompt_states,
    check_prompt_width,
    has_read_prompt,
    labels_mask,
    mask_and_positions,
    padding_to,
    reorder,
    repeat_outputs,
    select_layers,
)
from .checkpoint_llm2slm import LLM2SLMCheckpointMixin
from .configuration_llm2slm import LLM2SLMConfig, llm_sizes
from .fusion_llm2slm import LLM2SLMProjector, fusion_of, probe_ids
from .generation_llm2slm import LLM2SLMGenerationMixin
from .parts_llm2slm import build_llm, check_token_ids, keep_special_ids, slm_class


class LLM2SLMPreTrainedModel(PreTrainedModel):
    """Base of the encoder and of the whole model."""

    config: LLM2SLMConfig
    config_class = LLM2SLMConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Each part checks the attention implementation it is asked for; without these an explicit one is refused here.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_missing = [r"projector\.(mean|scale)$"]  # older checkpoints lack them

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLM2SLMProjector):
            init.zeros_(module.mean)
            init.ones_(module.scale)


class LLM2SLMEncoder(LLM2SLMPreTrainedModel):
    """
    Everything that turns a prompt into what the SLM reads: the (frozen) LLM and the modules of the fusion. It is a
    `PreTrainedModel` because transformers takes tied weights, fp32 modules and modules not to split from those.
    """

    def __init__(self, config: LLM2SLMConfig, llm: PreTrainedModel | None = None):
        super().__init__(config)
        self.llm = llm if llm is not None else build_llm(config)
        # T5's encoder ignores unexpected "decoder" keys on load; in this model they are the SLM's.
        self.llm._keys_to_ignore_on_load_unexpected = set()
        config.encoder = self.llm.config  # one object: a change of attention implementation or dtype reaches both
        self.projector: nn.Module | None = None
        self.prompt_embedding: nn.Module | None = None
        self.fusion = fusion_of(config)
        self.fusion.add_modules(self)
        self.post_init()

    def new_modules(self) -> dict[str, nn.Module]:
        """Return the modules of the fusion by name."""
        return {name: module for name, module in self.named_children() if name != "llm"}

    def bind(self, slm: PreTrainedModel) -> "LLM2SLMEncoder":
        """Use the embedding (and the encoder, if it has one) of `slm` without registering it here a second time."""
        object.__setattr__(self, "slm", slm)
        return self

    def train(self, mode: bool = True) -> "LLM2SLMEncoder":
        """Set the mode of the fusion's modules, and of the LLM unless it is frozen."""
        super().train(mode)
        # CODEPATH: freeze_llm=True. A load makes all parameters trainable again, but ends in `eval()`, and so here.
        if self.config.freeze_llm:
            self.llm.eval().requires_grad_(False)
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
        output_length: int | torch.Tensor = 1,
        **kwargs: Any,
    ) -> PromptStates:
        """Turn prompts `(B, N)`, or the LLM's hidden states `(B, N, d_llm)` of them, into what the SLM reads."""
        attention_mask = self.prompt_mask(input_ids, attention_mask, llm_hidden_states)
        self.check_prompt(attention_mask, output_length)
        if llm_hidden_states is None:
            flags = self.config.output_flags(kwargs, self.config.encoder)
            llm_outputs = self.run_llm(input_ids, attention_mask, **flags)
        else:
            llm_outputs = BaseModelOutput(last_hidden_state=llm_hidden_states)
        return self.fusion.read_prompt(self, llm_outputs, input_ids, attention_mask)

    def run_llm(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor, **flags: Any) -> ModelOutput:
        """Return the LLM's output in the layout of its input, without a gradient if the LLM is frozen."""
        if input_ids is None:
            raise ValueError(NO_PROMPT)
        self.config.check_llm_length(input_ids.shape[1])
        order = padding_to(self.fusion.llm_padding, attention_mask)  # its states return to the layout of the input
        back, mask = order.argsort(dim=-1), reorder(attention_mask, order)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_llm):
            outputs = self.llm(
                input_ids=reorder(input_ids, order),
                attention_mask=mask,
                return_dict=True,
                **{name: bool(flag) for name, flag in flags.items()} | self.fusion.llm_arguments(self.llm, mask),
            )
        states = self.fusion.states_of(outputs)
        if states.dtype == torch.float16 and not states.isfinite().all():
            raise ValueError(
                "The LLM's hidden states overflow in float16. Load it in bfloat16: `encoder_dtype='bfloat16'`."
            )
        outputs.last_hidden_state = reorder(states, back)
        layers = flags.get("output_hidden_states")
        every = tuple(reorder(layer, back) for layer in outputs.hidden_states) if layers else None
        outputs.hidden_states = select_layers(every, layers)
        if flags.get("output_attentions"):
            outputs.attentions = tuple(reorder(reorder(layer, back, 2), back, 3) for layer in outputs.attentions)
        return outputs

    def embed_tokens(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Look up the prompt tokens in the embedding table that the fusion reads; `None` if it reads none."""
        if self.fusion.table is None:
            return None
        if input_ids is None:
            raise ValueError(
                f'`fusion="{self.config.fusion}"` embeds the prompt: pass its `input_ids` with `llm_hidden_states`.'
            )
        # CODEPATH: a fusion reads the SLM's table if the tokenizer is shared, else the LLM's.
        if self.fusion.table == "slm":
            return self.slm.get_input_embeddings()(input_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_llm):
            return self.llm.get_input_embeddings()(input_ids)

    def prompt_mask(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the prompt's mask `(B, N)`: as given, else inferred from the LLM's pad id (`generate()` does not)."""
        prompt = input_ids if input_ids is not None else llm_hidden_states
        if prompt is None or not len(prompt):
            raise ValueError(NO_PROMPT)
        if input_ids is not None:
            check_token_ids("input_ids", input_ids, "LLM", llm_sizes(self.config.encoder).vocab_size)
            if fusion_of(self.config).table == "slm":
                check_token_ids("input_ids", input_ids, "SLM", self.config.vocab_size)
        if attention_mask is not None:
            if attention_mask.shape != prompt.shape[:2]:
                given, needed = tuple(attention_mask.shape), tuple(prompt.shape[:2])
                raise ValueError(f"`attention_mask` has shape {given}, but the prompt has {needed}.")
            return (attention_mask != 0).long()
        pad_token_id = getattr(self.config.encoder, "pad_token_id", None)
        if input_ids is not None and pad_token_id is not None:
            return (input_ids != pad_token_id).long()
        if prompt.shape[0] > 1:
            raise ValueError(
                "Padding in this batch cannot be told from prompt tokens. Pass the `attention_mask` of the processor."
            )
        return torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)

    def check_prompt(self, prompt_mask: torch.Tensor, output_length: int | torch.Tensor) -> None:
        """
        Raise `ValueError` for an empty prompt, and for a prompt and its output (of one length for all rows, or one for
        each) that need more positions than the SLM has.
        """
        if torch.compiler.is_compiling():
            return  # the checks read values, which a graph cannot
        lengths = prompt_mask.sum(-1)
        if lengths.min() == 0:
            raise ValueError("A prompt is empty: every row of `input_ids` needs a token that is not padding.")
        if isinstance(output_length, torch.Tensor) and output_length.ndim:
            for prompt, output in zip(lengths.tolist(), output_length.tolist(), strict=True):
                self.config.check_length(prompt, output)
        else:
            self.config.check_length(int(lengths.max()), int(output_length))

    def mask_before_output(self, prompt_mask: torch.Tensor) -> torch.Tensor:
        """Return the mask of what stands before the start token: the prompt, unless the two share a position."""
        return prompt_mask[:, : prompt_mask.shape[1] - self.fusion.shared_positions]

    @torch.no_grad()
    def hidden_states_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return mean and scale `(d_llm,)` of the LLM's hidden states of 64 tokens. Pretrained LLMs have some dimensions
        that are huge and nearly constant, and tokens (the first) with huge hidden states, which are left out.
        """
        input_ids = probe_ids(self.llm.get_input_embeddings().weight, 64)[None]
        states = self.run_llm(input_ids, torch.ones_like(input_ids)).last_hidden_state[0].float()
        sizes = states.square().mean(-1)
        states = states[sizes <= 4 * sizes.median()]
        spread = states.std(0, correction=0)
        return states.mean(0), spread.clamp(min=spread.median())  # noise of the others is not amplified


class LLM2SLMForConditionalGeneration(LLM2SLMCheckpointMixin, LLM2SLMPreTrainedModel, LLM2SLMGenerationMixin):
    r"""
    A frozen LLM that reads the prompt and a small language model that writes the output (arXiv 2402.16844). Token ids
    of the prompt are the LLM's, those of the output the SLM's. Uploads carry this class, which the installed package
    extends in `checks.py` and `inference/model.py`.

    Args:
        config ([`LLM2SLMConfig`]): The configuration.
        encoder (`PreTrainedModel`, *optional*): An LLM to use instead of one with random weights.
        decoder (`PreTrainedModel`, *optional*): An SLM to use instead of one with random weights.
    """

    def __init__(
        self, config: LLM2SLMConfig, encoder: PreTrainedModel | None = None, decoder: PreTrainedModel | None = None
    ):
        super().__init__(config)
        self.encoder = LLM2SLMEncoder(config, llm=encoder)
        self.decoder = decoder if decoder is not None else slm_class(config.decoder).from_config(config.decoder)
        config.decoder = self.decoder.config
        self.encoder.bind(self.decoder)
        self.post_init()
        self.train(self.training)  # freezes the LLM

    def train(self, mode: bool = True) -> "LLM2SLMForConditionalGeneration":
        """Set the mode of all modules but a frozen LLM, and undo `Trainer`'s change of the SLM's special ids."""
        self._special_ids = keep_special_ids(self, getattr(self, "_special_ids", {}) if mode else {})
        return super().train(mode)

    @property
    def dtype(self) -> torch.dtype:
        """`torch.dtype`: The SLM's and projector's; the LLM may have its own (`config.encoder_dtype`)."""
        return self.decoder.dtype

    def get_encoder(self, modality: str | None = None) -> LLM2SLMEncoder:
        """Return everything that turns a prompt into what the SLM reads, bound to the current SLM."""
        return self.encoder.bind(self.decoder)

    # The embeddings of the whole model are the SLM's.
    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the SLM's embeddings, see [`PreTrainedModel.resize_token_embeddings`]. The LLM's stay as they are."""
        return self.decoder.resize_token_embeddings(*args, **kwargs)

    @torch.no_grad()
    def encode_llm(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the LLM's hidden states H `(B, N, d_llm)` of prompts `(B, N)`. Training does not change them: passed as
        `llm_hidden_states=` (with `attention_mask`, and `input_ids` for `fusion="add"`), they replace the LLM.
        """
        return self.encoder.run_llm(input_ids, self.encoder.prompt_mask(input_ids, attention_mask)).last_hidden_state

    @torch.no_grad()
    def encode_prompt(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
    ) -> PromptStates:
        """Run all that depends on the prompts once. `generate(encoder_outputs=...)` does not modify the result."""
        return self.get_encoder()(input_ids, attention_mask, llm_hidden_states, return_dict=True)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shift targets `(B, M)` to the right, after the start token; -100 becomes the pad id."""
        config: Any = self.config  # it sets both ids
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = config.decoder_start_token_id
        return shifted.masked_fill(shifted == -100, config.pad_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: PromptStates | ModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        llm_hidden_states: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`, *optional*): Prompts, in the LLM's vocabulary.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 0 on padding. Default: by the LLM's pad id.
            decoder_input_ids (`torch.LongTensor` of shape `(B, M)`, *optional*):
                Outputs so far, in the SLM's vocabulary, start token included. Default: made from `labels`.
            decoder_attention_mask (`torch.Tensor` of shape `(B, M so far)`, *optional*): 0 on padding in the output.
            encoder_outputs ([`PromptStates`], *optional*): From `encode_prompt`, instead of `input_ids`.
            past_key_values ([`LLM2SLMCache`], *optional*): From an earlier call; it counts output tokens only.
            llm_hidden_states (`torch.Tensor` of shape `(B, N, d_llm)`, *optional*): From `encode_llm`.
            labels (`torch.LongTensor` of shape `(B, M)`, *optional*): Targets without start token; -100 has no loss.
            use_cache (`bool`, *optional*): Default: `config.use_cache`, but `False` in training or with `labels`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for this many last output positions, or for these positions; 0: for all.

        Returns:
            `Seq2SeqLMOutput`: `decoder_hidden_states` cover output positions only; a decoder-only SLM has
            `decoder_attentions` `(B, heads, M, N + output so far)`. `encoder_hidden_states` are the LLM's.
        """
        decoder_input_ids = self._output_tokens(decoder_input_ids, labels, logits_to_keep, kwargs)
        if decoder_attention_mask is None and labels is not None and labels.shape == decoder_input_ids.shape:
            decoder_attention_mask = self._mask_of_labels(labels, encoder_outputs, input_ids, llm_hidden_states)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        # A caller's prompt is checked against its mask once, when the cache is still empty.
        check = encoder_outputs is not None and past_key_values is None
        if encoder_outputs is None and (input_ids is not None or llm_hidden_states is not None):
            length = decoder_input_ids.shape[1] if decoder_attention_mask is None else decoder_attention_mask.sum(-1)
            encoder_outputs = self.get_encoder()(
                input_ids, attention_mask, llm_hidden_states, length, return_dict=True, **kwargs
            )
        prompt = as_prompt_states(encoder_outputs, attention_mask, check) if encoder_outputs is not None else None
        outputs = self._decode(
            prompt,
            decoder_input_ids,
            decoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:  # `num_items_in_batch` normalizes it over the whole effective batch
            sizes = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            positions = torch.arange(decoder_input_ids.shape[1])[_kept(logits_to_keep)]
            labels = self.encoder.fusion.trained_labels(labels, positions)
            loss = self.loss_function(outputs.logits, labels, shift_labels=labels, **sizes)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=prompt.last_hidden_state if prompt is not None else None,
            encoder_hidden_states=prompt.hidden_states if prompt is not None else None,
            encoder_attentions=prompt.attentions if prompt is not None else None,
        )

    def _output_tokens(
        self, decoder_input_ids: Any, labels: Any, logits_to_keep: int | torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Return the SLM's tokens `(B, M)`, made from `labels` if left out, and check that the two agree."""
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` is not supported, as two models read the prompt. Pass token ids.")
        if decoder_input_ids is None and labels is None:
            raise ValueError("There is no output to score or continue: pass `labels` or `decoder_input_ids`.")
        if labels is not None:
            check_token_ids("labels", labels, "SLM", self.config.vocab_size)
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        check_token_ids("decoder_input_ids", decoder_input_ids, "SLM", self.config.vocab_size)
        if labels is not None and (scored := decoder_input_ids[:, _kept(logits_to_keep)].shape) != labels.shape:
            raise ValueError(
                f"`labels` have shape {tuple(labels.shape)}, but there will be logits for {tuple(scored)}. Cut them "
                "to what `decoder_input_ids` and `logits_to_keep` leave, or leave these out."
            )
        return decoder_input_ids

    def _mask_of_labels(self, labels: torch.Tensor, encoder_outputs: Any, *prompts: Any) -> torch.Tensor | None:
        """Return a mask over `labels` if a batch is wider, and none of its rows longer, than the SLM's positions."""
        prompts = (encoder_outputs[0] if encoder_outputs else None, *prompts)
        widths = [prompt.shape[1] for prompt in prompts if prompt is not None and prompt.numel()]
        # CODEPATH: decoder-only SLMs, whose positions prompt and output share.
        return labels_mask(labels) if widths and self.config.needs_output_mask(widths[0], labels.shape[1]) else None

    def _decode(
        self, prompt: PromptStates | None, tokens: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> Seq2SeqLMOutput:
        """Run the SLM. Beams and samples of a prompt start alike: it reads prompt and start once for all of them."""
        copies = 1  # beams or samples of each prompt that the SLM reads now
        if prompt is not None and not has_read_prompt(kwargs["past_key_values"]) and (copies := prompt.copies) > 1:
            prompt, tokens = prompt.one_of_each(), tokens[::copies]
            mask = mask[::copies] if mask is not None else None
        # CODEPATH: encoder-decoder SLMs (T5-small) against decoder-only ones (GPT-2).
        decode = self._decode_with_encoder if self.config.decoder.is_encoder_decoder else self._decode_after_prompt
        flags = self.config.output_flags(kwargs, self.config.decoder)
        outputs = decode(prompt, tokens, mask, **kwargs | {name: bool(flag) for name, flag in flags.items()})
        outputs.decoder_hidden_states = select_layers(outputs.decoder_hidden_states, flags["output_hidden_states"])
        return repeat_outputs(outputs, copies) if copies > 1 else outputs

    def _decode_after_prompt(
        self,
        prompt: PromptStates | None,
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool,
        logits_to_keep: int | torch.Tensor,
        decoder_position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """
        Run a decoder-only SLM on `[P ; E(start, output)]`, or on what follows a cache that begins with P. With
        `decoder_position_ids`, which `generate()` sets once the prompt is cached, the mask covers prompt and output.
        """
        cache, fusion = as_llm2slm_cache(past_key_values), self.encoder.fusion
        if cache is None and (use_cache or fusion.fills_cache):
            cache = LLM2SLMCache(DynamicCache(config=self.config.decoder))
        output_length = tokens.shape[1]
        embeds, position_ids, first = self.get_input_embeddings()(tokens), decoder_position_ids, None
        if position_ids is None:
            if prompt is None:
                raise ValueError(NO_PROMPT)
            # Without a given mask, all rows have the same output length, and a number is cheaper to check.
            prompt_mask, given = self.encoder.mask_before_output(prompt.attention_mask), mask is not None
            mask, position_ids = mask_and_positions(prompt_mask, mask, output_length, cache)
            output_mask = mask[:, prompt_mask.shape[1] :]
            self.encoder.check_prompt(prompt.attention_mask, output_mask.sum(-1) if given else output_mask.shape[1])
            if given and fusion.shared_positions and not output_mask[:, 0].all():
                raise ValueError(
                    "`decoder_attention_mask` hides a start token, which stands for the last prompt token."
                )
            if not has_read_prompt(cache):
                embeds = fusion.prepend(prompt, embeds, cache)
                position_ids = position_ids[:, position_ids.shape[1] - embeds.shape[1] :]
                if cache is not None:
                    cache.prompt_length = prompt_mask.shape[1]
        # CODEPATH: a fusion that has logits of the start token; the SLM does not read it then.
        if embeds.shape[1] < output_length:
            first, output_length = fusion.first_logits(prompt, embeds), embeds.shape[1]
            if not output_length:
                return Seq2SeqLMOutput(logits=first, past_key_values=cache if use_cache else None)
        kept = logits_to_keep if first is None or isinstance(logits_to_keep, int) else 0
        if isinstance(kept, torch.Tensor):
            kept = kept + (embeds.shape[1] - output_length)
        elif embeds.shape[1] > output_length:  # an index, not a slice, as for the LLM
            kept = torch.arange(-min(kept or output_length, output_length), 0, device=embeds.device)

        outputs = self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache.self_attention_cache if cache is not None else None,
            use_cache=use_cache or fusion.fills_cache,
            logits_to_keep=kept,
            return_dict=True,
            **kwargs,
        )
        logits, hidden_states, attentions = outputs.logits, outputs.hidden_states, outputs.attentions
        return Seq2SeqLMOutput(
            logits=logits if first is None else torch.cat([first, logits], dim=1)[:, _kept(logits_to_keep)],
            past_key_values=cache if use_cache else None,
            decoder_hidden_states=hidden_states and tuple(layer[:, -output_length:] for layer in hidden_states),
            decoder_attentions=attentions and tuple(layer[:, :, -output_length:] for layer in attentions),
        )

    def _decode_with_encoder(
        self,
        prompt: PromptStates | None,
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        past_key_values: Cache | None,
        logits_to_keep: int | torch.Tensor,
        decoder_position_ids: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Run the decoder of an encoder-decoder SLM, which attends to its encoder's output for P."""
        if prompt is None:
            raise ValueError(NO_PROMPT)
        states = prompt.last_hidden_state
        check_prompt_width(past_key_values, prompt.attention_mask.shape[1])
        if not has_read_prompt(past_key_values):
            self.encoder.check_prompt(prompt.attention_mask, tokens.shape[1])
        elif prompt.copies > 1:
            # Their keys are cached: the SLM reads only the shape of the states, which has a row for each beam.
            states = states[:1].expand(prompt.attention_mask.shape[0], -1, -1)
        outputs = self.decoder(
            encoder_outputs=ModelOutput(last_hidden_state=states),
            attention_mask=prompt.attention_mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=mask,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        outputs.logits = outputs.logits[:, _kept(logits_to_keep)]
        return outputs


def _kept(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


__all__ = ["LLM2SLMForConditionalGeneration", "LLM2SLMPreTrainedModel", "PromptStates"]
