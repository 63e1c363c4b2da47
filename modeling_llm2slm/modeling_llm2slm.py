# Copyright 2026 The modeling-llm2slm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
LLM-to-SLM (Bergner et al., arXiv 2402.16844): a large frozen language model reads the prompt once, a small projector
maps what it read into the embedding space of a small language model (SLM), and the SLM writes the answer.

The file follows the forward pass: projector, encoder (all that turns a prompt into what the SLM reads), whole model.
What `generate()` needs is in `generation_llm2slm.py`, what checkpoints need in `checkpoint_llm2slm.py`.
Shapes: batch B, prompt length N, answer length M, widths d_llm and d_slm.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from .assistant_llm2slm import RecentStates, as_assistant_of
from .cache_llm2slm import (
    LLM2SLMCache,
    as_llm2slm_cache,
    check_cross_attention,
    has_read_prompt,
    labels_mask,
    mask_and_positions,
)
from .checkpoint_llm2slm import LLM2SLMCheckpointMixin, record_sources
from .configuration_llm2slm import LLM2SLMConfig, llm_sizes
from .generation_llm2slm import LLM2SLMGenerationMixin
from .parts_llm2slm import (
    build_llm,
    check_parts,
    embedding_rms,
    keep_special_ids,
    load_llm,
    load_slm,
    probe_ids,
    reading_arguments,
    slm_class,
)
from .prompt_llm2slm import PromptStates, as_prompt_states, padding_to, reorder, repeat_outputs


class LLM2SLMProjector(nn.Module):
    """Z = W2 act(W1 H + b1) + b2: from LLM states `(B, N, d_llm)` to the SLM's embedding space `(B, N, d_slm)`."""

    def __init__(self, config: LLM2SLMConfig):
        super().__init__()
        self.names = [f"linear_{number + 1}" for number in range(config.projector_layers)]
        sizes = [llm_sizes(config.encoder).hidden_size, *[config.prompt_size] * config.projector_layers]
        for name, size_in, size_out in zip(self.names, sizes, sizes[1:], strict=False):
            self.add_module(name, nn.Linear(size_in, size_out))
        self.act = ACT2FN["relu"]

    @property
    def linears(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.names]  # an adapter may have put others in their places

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first, *others = self.linears
        hidden_states = first(hidden_states.to(first.weight.dtype))
        for linear in others:
            hidden_states = linear(self.act(hidden_states))
        return hidden_states


class LLM2SLMPreTrainedModel(PreTrainedModel):
    """What the encoder and the whole model share."""

    config: LLM2SLMConfig
    config_class = LLM2SLMConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Each part checks the attention implementation it is asked for; without these an explicit one is refused here.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class LLM2SLMEncoder(LLM2SLMPreTrainedModel):
    """
    Everything that turns a prompt into what the SLM reads: the (frozen) LLM, the projector and, for `fusion="add"`
    with two tokenizers, the linear map from the LLM's embedding to the SLM's.

    A `PreTrainedModel` of its own, as transformers collects tied weights, fp32 modules and modules not to split from
    children that are `PreTrainedModel`s.
    """

    recent: RecentStates | None = None  # of an assistant: what its LLM has just read is not read again

    def __init__(self, config: LLM2SLMConfig, llm: PreTrainedModel | None = None):
        super().__init__(config)
        self.llm = llm if llm is not None else build_llm(config)
        # T5's encoder has unexpected "decoder" keys dropped in silence on load; in this model they are the SLM's.
        self.llm._keys_to_ignore_on_load_unexpected = set()
        config.encoder = self.llm.config  # one object: a change of attention implementation or dtype reaches both
        self.projector = LLM2SLMProjector(config)
        self.prompt_embedding: nn.Linear | None = None
        # CODEPATH: fusion "add" of two tokenizers; with a shared one the SLM's embedding serves, "replace" needs none.
        if config.fusion == "add" and not config.shared_tokenizer:
            embedding_size = self.llm.get_input_embeddings().embedding_dim
            self.prompt_embedding = nn.Linear(embedding_size, config.prompt_size, bias=False)
        self.post_init()

    def bind(self, slm: PreTrainedModel) -> "LLM2SLMEncoder":
        """Use the embedding (and the encoder, if it has one) of `slm`, without registering it here a second time."""
        object.__setattr__(self, "slm", slm)
        return self

    def train(self, mode: bool = True) -> "LLM2SLMEncoder":
        """As of every module, but a frozen LLM stays frozen and without dropout."""
        llm_mode = self.llm.training
        super().train(mode)
        if self.recent is not None:  # an assistant: the LLM is somebody else's
            self.llm.train(llm_mode)
            return self
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
        """Prompt token ids `(B, N)`, or LLM states `(B, N, d_llm)` computed before, to what the SLM reads."""
        attention_mask = self.prompt_mask(input_ids, attention_mask, llm_hidden_states)
        self.check_prompt(attention_mask, output_length)
        llm_outputs: Any = {}
        if llm_hidden_states is None:
            wanted = {key: True for key in ("output_attentions", "output_hidden_states") if kwargs.get(key)}
            llm_outputs = self.run_llm(input_ids, attention_mask, **wanted)
            llm_hidden_states = llm_outputs["last_hidden_state"]
        prompt_embeds = self.projector(llm_hidden_states)
        # CODEPATH: fusion "add"; "replace" reads the projected states alone.
        if self.config.fusion == "add":
            prompt_embeds = prompt_embeds + self.embed_prompt(input_ids).to(prompt_embeds.device)

        # A decoder-only SLM reads the prompt right before the answer, so that padding is no distance between the two.
        has_encoder = self.config.decoder.is_encoder_decoder
        order = padding_to("right" if has_encoder else "left", attention_mask)
        prompt_embeds, attention_mask = reorder(prompt_embeds, order), reorder(attention_mask, order)
        if has_encoder:
            slm_encoder = self.slm.get_encoder()
            prompt_embeds = slm_encoder(inputs_embeds=prompt_embeds, attention_mask=attention_mask).last_hidden_state
        return PromptStates(
            last_hidden_state=prompt_embeds,
            attention_mask=attention_mask,
            hidden_states=llm_outputs.get("hidden_states"),
            attentions=llm_outputs.get("attentions"),
        )

    def run_llm(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor, **kwargs: Any) -> ModelOutput:
        """The LLM's output, in the layout of its input; without a gradient if it is frozen."""
        if input_ids is None:
            raise ValueError("There is no prompt: pass `input_ids`, `llm_hidden_states` or `encoder_outputs`.")
        if self.recent is not None and (known := self.recent.find(input_ids, attention_mask)) is not None:
            return BaseModelOutput(last_hidden_state=known)
        self.config.check_llm_length(input_ids.shape[1])
        # Positions of a GPT-2 or BERT count from the first place on: padding goes behind the prompt, and back.
        order = padding_to("right", attention_mask)
        back = order.argsort(dim=-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_llm):
            outputs = self.llm(
                input_ids=reorder(input_ids, order),
                attention_mask=reorder(attention_mask, order),
                return_dict=True,
                **reading_arguments(self.llm),
                **kwargs,
            )
        states = outputs.last_hidden_state
        if states.dtype == torch.float16 and not states.isfinite().all():
            raise ValueError("The LLM's states overflow in float16. Load it in bfloat16: `encoder_dtype='bfloat16'`.")
        outputs.last_hidden_state = reorder(states, back)
        if kwargs.get("output_hidden_states"):
            outputs.hidden_states = tuple(reorder(layer, back) for layer in outputs.hidden_states)
        if kwargs.get("output_attentions"):
            outputs.attentions = tuple(reorder(reorder(layer, back, 2), back, 3) for layer in outputs.attentions)
        return outputs

    def embed_prompt(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """E(x) of `fusion="add"`, `(B, N, d_slm)`."""
        if input_ids is None:
            raise ValueError('`fusion="add"` embeds the prompt: pass its `input_ids` beside `llm_hidden_states`.')
        if self.prompt_embedding is None:
            return self.slm.get_input_embeddings()(input_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_llm):
            embeds = self.llm.get_input_embeddings()(input_ids)
        return self.prompt_embedding(embeds.to(self.prompt_embedding.weight.dtype))

    def prompt_mask(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prompt's mask `(B, N)`: as given, else inferred from the LLM's pad id, as `generate()` does not."""
        prompt = input_ids if input_ids is not None else llm_hidden_states
        if prompt is None:
            raise ValueError("There is no prompt: pass `input_ids`, `llm_hidden_states` or `encoder_outputs`.")
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
        Raise `ValueError` on an empty prompt, and where a prompt and its answer, of one length for all rows or one for
        each, need more positions than the SLM has.
        """
        if torch.compiler.is_compiling():
            return  # the checks read values, which a graph cannot
        lengths = prompt_mask.sum(-1)
        if lengths.min() == 0:
            raise ValueError("A prompt is empty: every row of `input_ids` needs a token that is not padding.")
        if isinstance(output_length, torch.Tensor) and output_length.ndim:
            for prompt, answer in zip(lengths.tolist(), output_length.tolist(), strict=True):
                self.config.check_length(prompt, answer)
        else:
            self.config.check_length(int(lengths.max()), int(output_length))

    @torch.no_grad()
    def scale_prompt(self) -> None:
        """Draw the projector's weights such that prompt embeddings have the root mean square of the SLM's own."""
        # CODEPATH: fusion "add": two terms of equal variance.
        scale = embedding_rms(self.slm) / 2**0.5 if self.config.fusion == "add" else embedding_rms(self.slm)
        if self.prompt_embedding is not None:
            size = self.prompt_embedding.in_features
            init.normal_(self.prompt_embedding.weight, std=scale / (embedding_rms(self.llm) * size**0.5))
        linears = self.projector.linears
        gains = [1 / self.states_rms(), *[2**0.5] * (len(linears) - 1)]  # ReLU halves the mean square
        gains[-1] *= scale
        for linear, gain in zip(linears, gains, strict=True):
            init.normal_(linear.weight, std=gain / linear.in_features**0.5)

    @torch.no_grad()
    def states_rms(self) -> float:
        """
        Root mean square of the LLM's states: the median over 64 tokens spread over its vocabulary, as a decoder-only
        LLM gives its first token a state of hundreds of times the size of the others.
        """
        input_ids = probe_ids(self.llm.get_input_embeddings().weight, 64)[None]
        states = self.run_llm(input_ids, torch.ones_like(input_ids)).last_hidden_state
        return float(states.float().square().mean(-1).sqrt().median())


class LLM2SLMForConditionalGeneration(LLM2SLMCheckpointMixin, LLM2SLMPreTrainedModel, LLM2SLMGenerationMixin):
    r"""
    A large frozen LLM that reads the prompt and a small language model that writes the answer (arXiv 2402.16844). It
    trains, generates, saves and loads as every sequence-to-sequence model of transformers. Token ids of the prompt are
    the LLM's, those of the answer the SLM's.

    Args:
        config ([`LLM2SLMConfig`]): The configuration.
        encoder (`PreTrainedModel`, *optional*): An LLM to use in place of one with random weights.
        decoder (`PreTrainedModel`, *optional*): An SLM to use in place of one with random weights.
    """

    def __init__(
        self, config: LLM2SLMConfig, encoder: PreTrainedModel | None = None, decoder: PreTrainedModel | None = None
    ):
        super().__init__(config)
        self.encoder = LLM2SLMEncoder(config, llm=encoder)
        self.decoder = decoder if decoder is not None else slm_class(config.decoder).from_config(config.decoder)
        config.decoder = self.decoder.config
        self.encoder.bind(self.decoder)
        check_parts(self.encoder.llm, self.decoder)
        self.post_init()
        self.train(self.training)  # freezes the LLM

    def initialize_weights(self) -> None:
        """Initialize what was not loaded; the projector last, as its scale is that of the SLM's embeddings."""
        super().initialize_weights()
        if not getattr(self.encoder.projector.linears[-1].weight, "_is_hf_initialized", False):
            self.encoder.scale_prompt()

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | None = None,
        **kwargs: Any,
    ) -> "LLM2SLMForConditionalGeneration":
        r"""
        Build a model from a pretrained LLM and a pretrained SLM; the projector is new and has to be trained.

        Args:
            encoder_pretrained_model_name_or_path (`str`): Repository id or folder of the LLM.
            decoder_pretrained_model_name_or_path (`str`): Repository id or folder of the SLM.
            kwargs:
                Values of [`LLM2SLMConfig`] (`fusion`, `shared_tokenizer`, `encoder_layer`, ...), and arguments of
                `from_pretrained` with the prefix `encoder_` for the LLM or `decoder_` for the SLM: `encoder_dtype`,
                `decoder_revision`, `encoder_attn_implementation`, `decoder_trust_remote_code`, ... A model already
                loaded is given as `encoder_model` or `decoder_model`. `shared_tokenizer` defaults to the outcome of
                comparing the two tokenizers, or to `False` where one of them does not load.

        Raises:
            ValueError: If a model is missing, or an argument has neither prefix nor meaning in the configuration.
        """
        config_fields = LLM2SLMConfig.own_fields()
        config_kwargs = {key: kwargs.pop(key) for key in config_fields & kwargs.keys()}
        encoder_kwargs = {key[8:]: kwargs.pop(key) for key in list(kwargs) if key.startswith("encoder_")}
        decoder_kwargs = {key[8:]: kwargs.pop(key) for key in list(kwargs) if key.startswith("decoder_")}
        if kwargs:
            raise ValueError(
                f"Unknown arguments: {', '.join(kwargs)}. Prefix an argument with `encoder_` for the LLM or "
                f"`decoder_` for the SLM, or use one of the configuration: {', '.join(sorted(config_fields))}."
            )
        paths = (encoder_pretrained_model_name_or_path, decoder_pretrained_model_name_or_path)
        hub = (dict(encoder_kwargs), dict(decoder_kwargs))
        if "shared_tokenizer" not in config_kwargs:
            from .processing_llm2slm import have_same_tokenizer

            config_kwargs["shared_tokenizer"] = have_same_tokenizer(*paths, encoder_kwargs, decoder_kwargs)
        layer = config_kwargs.get("encoder_layer")
        llm = load_llm(paths[0], layer, encoder_kwargs)
        slm = load_slm(paths[1], decoder_kwargs)
        config = LLM2SLMConfig(encoder=llm.config, decoder=slm.config, **config_kwargs)
        config.dtype = slm.dtype
        if llm.dtype != slm.dtype:
            config.encoder_dtype = str(llm.dtype).removeprefix("torch.")
        model = cls(config, encoder=llm, decoder=slm)
        for name, module in model.encoder.named_children():
            if name != "llm":
                module.to(device=llm.device, dtype=slm.dtype)
        model.encoder.scale_prompt()
        record_sources(model, paths, hub)
        return model.eval()

    def train(self, mode: bool = True) -> "LLM2SLMForConditionalGeneration":
        """As of every module; and an LLM's special ids that `Trainer` wrote over the SLM's are taken back."""
        self._special_ids = keep_special_ids(self, getattr(self, "_special_ids", {}) if mode else {})
        return super().train(mode)

    @property
    def dtype(self) -> torch.dtype:
        """`torch.dtype`: The SLM's and projector's; the LLM may have one of its own (`config.encoder_dtype`)."""
        return self.decoder.dtype

    def get_encoder(self, modality: str | None = None) -> LLM2SLMEncoder:
        """All that turns a prompt into what the SLM reads. Bound anew, as the SLM may have been replaced since."""
        return self.encoder.bind(self.decoder)

    def get_input_embeddings(self) -> nn.Module:
        """The SLM's."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The SLM's."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The SLM's."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """The SLM's."""
        self.decoder.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """[`PreTrainedModel.resize_token_embeddings`] of the SLM. The LLM's embeddings stay as they are."""
        return self.decoder.resize_token_embeddings(*args, **kwargs)

    @torch.no_grad()
    def encode_llm(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        The LLM's states H `(B, N, d_llm)` of prompts `(B, N)`: independent of everything that trains, to be passed
        back as `llm_hidden_states=` (with `attention_mask`, and `input_ids` for `fusion="add"`) so that no LLM runs.
        """
        return self.encoder.run_llm(input_ids, self.encoder.prompt_mask(input_ids, attention_mask)).last_hidden_state

    @torch.no_grad()
    def encode_prompt(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
    ) -> PromptStates:
        """
        All the work that belongs to prompts `(B, N)`, done once, with the weights as they are: pass the result to
        `generate(encoder_outputs=...)` as often as wanted; it is never changed there.
        """
        return self.get_encoder()(input_ids, attention_mask, llm_hidden_states, return_dict=True)

    def as_assistant_of(self, llm: PreTrainedModel) -> "LLM2SLMForConditionalGeneration":
        """
        This model as `assistant_model` of the whole LLM that it was built on: `llm.generate(..., assistant_model=...)`
        gives the LLM's own answer, faster. Encoder weights and the states that `llm` has just computed are shared.

        Args:
            llm (`PreTrainedModel`): An encoder-decoder with its decoder, such as a `T5ForConditionalGeneration`.

        Returns:
            `LLM2SLMForConditionalGeneration`: of the same SLM and projector. How far it drafts ahead is set in its
            `generation_config` (`num_assistant_tokens`, `assistant_confidence_threshold`).

        Raises:
            ValueError: If tokenizer, vocabulary size or start id are not the LLM's, or it is another LLM.
        """
        return as_assistant_of(self, llm)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Answers `(B, M)` shifted right by the start token; -100 becomes the pad id."""
        start: Any = self.config.decoder_start_token_id  # the config has put an id where there was none
        pad: Any = self.config.pad_token_id
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = start
        return shifted.masked_fill(shifted == -100, pad)

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
        decoder_position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`, *optional*): Prompts, in the LLM's vocabulary.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*):
                1 on prompt tokens, 0 on padding. Inferred from the LLM's pad id if left out.
            decoder_input_ids (`torch.LongTensor` of shape `(B, M)`, *optional*):
                Answers so far, in the SLM's vocabulary, from the start token on. Made from `labels` if left out.
            decoder_attention_mask (`torch.Tensor` of shape `(B, M so far)`, *optional*): 0 on padding in the answer.
            encoder_outputs ([`PromptStates`], *optional*): From `encode_prompt`, in place of `input_ids`.
            past_key_values ([`LLM2SLMCache`], *optional*): Returned by an earlier call; it counts answer tokens only.
            llm_hidden_states (`torch.Tensor` of shape `(B, N, d_llm)`, *optional*):
                From `encode_llm`, in place of running the LLM.
            labels (`torch.LongTensor` of shape `(B, M)`, *optional*):
                Answers without start token; -100 is not scored.
            use_cache (`bool`, *optional*): Whether to return `past_key_values`. Defaults to `config.use_cache`
                without `labels`, and never in training.
            decoder_position_ids (`torch.LongTensor` of shape `(B, M)`, *optional*):
                Set by `generate()` once the prompt is cached, with a `decoder_attention_mask` over prompt and answer.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for that many last answer positions, or for these; 0: for all.

        Returns:
            `Seq2SeqLMOutput`: `decoder_hidden_states` cover answer positions only; of a decoder-only SLM,
            `decoder_attentions` are `(B, heads, M, N + answer so far)` and `cross_attentions` is `None`.
            `encoder_hidden_states` and `encoder_attentions` are the LLM's.
        """
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` is not supported, as two models read the prompt. Pass token ids.")
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("There is no answer to score or go on from: pass `labels` or `decoder_input_ids`.")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is not None and (scored := decoder_input_ids[:, kept].shape) != labels.shape:
            raise ValueError(
                f"`labels` have shape {tuple(labels.shape)}, but there will be logits for {tuple(scored)}. Cut them "
                "to what `decoder_input_ids` and `logits_to_keep` leave, or leave these out."
            )
        if decoder_attention_mask is None and labels is not None and labels.shape == decoder_input_ids.shape:
            read = encoder_outputs[0] if encoder_outputs is not None else input_ids
            read = llm_hidden_states if read is None else read
            # CODEPATH: decoder-only SLMs that have positions for each row of a batch, and not for all of its padding.
            if read is not None and self.config.needs_output_mask(read.shape[1], labels.shape[1]):
                decoder_attention_mask = labels_mask(labels)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)

        check = encoder_outputs is not None and past_key_values is None
        if encoder_outputs is None and (input_ids is not None or llm_hidden_states is not None):
            width = decoder_input_ids.shape[1]
            output_length = width if decoder_attention_mask is None else decoder_attention_mask.sum(-1)
            encoder_outputs = self.get_encoder()(
                input_ids, attention_mask, llm_hidden_states, output_length, return_dict=True, **kwargs
            )
        prompt = as_prompt_states(encoder_outputs, attention_mask, check) if encoder_outputs is not None else None
        # Beams and samples of a prompt begin alike: the SLM reads prompt and beginning once for all of them.
        copies = prompt.copies if prompt is not None and not has_read_prompt(past_key_values) else 1
        if prompt is not None and copies > 1:
            prompt, decoder_input_ids = prompt.one_of_each(), decoder_input_ids[::copies]
            if decoder_attention_mask is not None:
                decoder_attention_mask = decoder_attention_mask[::copies]
        # CODEPATH: encoder-decoder SLMs (T5-small) against decoder-only ones (GPT-2).
        decode = self._decode_with_encoder if self.config.decoder.is_encoder_decoder else self._decode_after_prompt
        outputs = decode(
            prompt,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if copies > 1:
            outputs = repeat_outputs(outputs, copies)
        loss = None
        if labels is not None:
            # `num_items_in_batch` makes the loss under gradient accumulation that of the whole batch.
            loss = self.loss_function(
                outputs.logits,
                labels,
                vocab_size=self.config.vocab_size,
                shift_labels=labels,
                num_items_in_batch=num_items_in_batch,
            )
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

    def _decode_after_prompt(
        self,
        prompt: PromptStates | None,
        decoder_input_ids: torch.Tensor,
        decoder_attention_mask: torch.Tensor | None,
        decoder_position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool,
        logits_to_keep: int | torch.Tensor,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """A decoder-only SLM reads `[P ; E(start, answer)]`, or goes on from a cache that begins with P."""
        cache = as_llm2slm_cache(past_key_values)
        if cache is None and use_cache:
            cache = LLM2SLMCache(DynamicCache(config=self.config.decoder))
        output_length, prompt_length = decoder_input_ids.shape[1], 0
        embeds = self.get_input_embeddings()(decoder_input_ids)
        mask, position_ids = decoder_attention_mask, decoder_position_ids
        if position_ids is None:
            if prompt is None:
                raise ValueError("There is no prompt: pass `input_ids`, `llm_hidden_states` or `encoder_outputs`.")
            mask, position_ids = mask_and_positions(prompt.attention_mask, mask, output_length, cache)
            output_mask = mask[:, prompt.attention_mask.shape[1] :]
            self.encoder.check_prompt(
                prompt.attention_mask, output_mask.shape[1] if decoder_attention_mask is None else output_mask.sum(-1)
            )
            if cache is None or cache.prompt_length == 0:
                prompt_length = prompt.last_hidden_state.shape[1]
                embeds = torch.cat([prompt.last_hidden_state.to(embeds), embeds], dim=1)
        if isinstance(logits_to_keep, torch.Tensor):
            logits_to_keep = logits_to_keep + prompt_length

        outputs = self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache.self_attention_cache if cache is not None else None,
            use_cache=use_cache,
            logits_to_keep=output_length if isinstance(logits_to_keep, int) and not logits_to_keep else logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        if prompt_length and cache is not None:
            cache.prompt_length = prompt_length
        hidden_states, attentions = outputs.hidden_states, outputs.attentions
        return Seq2SeqLMOutput(
            logits=outputs.logits,
            past_key_values=cache if use_cache else None,
            decoder_hidden_states=hidden_states and tuple(layer[:, -output_length:] for layer in hidden_states),
            decoder_attentions=attentions and tuple(layer[:, :, -output_length:] for layer in attentions),
        )

    def _decode_with_encoder(
        self, prompt: PromptStates | None, decoder_position_ids: Any, logits_to_keep: int | torch.Tensor, **kwargs: Any
    ) -> Seq2SeqLMOutput:
        """The decoder of an encoder-decoder SLM attends to what its encoder made of P."""
        if prompt is None:
            raise ValueError("There is no prompt: pass `input_ids`, `llm_hidden_states` or `encoder_outputs`.")
        check_cross_attention(kwargs.get("past_key_values"), prompt.attention_mask.shape[1])
        states = prompt.last_hidden_state
        if not has_read_prompt(kwargs.get("past_key_values")):
            self.encoder.check_prompt(prompt.attention_mask, kwargs["decoder_input_ids"].shape[1])
        elif prompt.copies > 1:
            # Their keys are cached: only the shape of the states is read, which has a row for each beam.
            states = states[:1].expand(prompt.attention_mask.shape[0], -1, -1)
        outputs = self.decoder(
            encoder_outputs=ModelOutput(last_hidden_state=states),
            attention_mask=prompt.attention_mask,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        outputs.logits = outputs.logits[:, kept]
        return outputs


__all__ = ["LLM2SLMForConditionalGeneration", "LLM2SLMPreTrainedModel", "PromptStates"]
