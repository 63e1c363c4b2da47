"""
LLM-to-SLM in graphs of another runtime, as `llm2slm export` writes them: the fastest way to answer on a CPU.

Three graphs: `prompt` is all that turns token ids into what the SLM reads, `step` reads embeddings and gives the
logits of the token that follows the last of them, and `cross`, of an encoder-decoder SLM alone, gives the keys and
values of the prompt that each step attends to. What the SLM's embedding gives for each token is a file, mapped.
Shapes: batch B, prompt length N, width d_slm.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.generation import GenerationMode
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput

from ..cache_llm2slm import PromptStates, as_prompt_states, check_continues, padding_to, reorder
from ..configuration_llm2slm import LLM2SLMConfig
from ..fusion_llm2slm import fusion_of
from ..generation_llm2slm import LLM2SLMGenerationMixin
from ..modeling_llm2slm import LLM2SLMEncoder
from .graphs import MANIFEST, is_exported, load_graphs, read_manifest


EMBEDDINGS = "embeddings.safetensors"
DEFAULTS_LEFT_OUT = (
    "cache_implementation", "cache_config", "max_cache_len", "use_cache", "prompt_lookup_num_tokens", "is_assistant",
    "output_attentions", "output_hidden_states",
)  # fmt: skip
MASK_AHEAD = 256  # a mask is made for so many tokens more than there are


class ExportedEncoder:
    """All that turns prompts into what the SLM reads, as one graph."""

    main_input_name = "input_ids"
    # Both need nothing but the configuration.
    prompt_mask: Any = LLM2SLMEncoder.prompt_mask
    check_prompt: Any = LLM2SLMEncoder.check_prompt

    def __init__(self, config: LLM2SLMConfig, graph: Any, embed: Any):
        self.config = config
        self._graph = graph
        self._embed = embed

    def __call__(self, *args: Any, **kwargs: Any) -> PromptStates:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_length: int = 1,
        return_dict: bool = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> PromptStates:
        """Prompt token ids `(B, N)` to what the SLM reads, in the layout of [`LLM2SLMEncoder`]."""
        mask = self.prompt_mask(input_ids, attention_mask)
        self.check_prompt(mask, output_length)
        assert input_ids is not None  # else `prompt_mask` has raised
        self.config.check_llm_length(input_ids.shape[1])
        padded = not bool(mask.all())
        if padded:
            order = padding_to("right", mask)
            input_ids, mask = reorder(input_ids, order), reorder(mask, order)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        # CODEPATH: a fusion that reads the SLM's embedding table, which is in no graph.
        if fusion_of(self.config).table == "slm":
            inputs["inputs_embeds"] = self._embed(input_ids)
        states = self._graph.run(inputs)["last_hidden_state"]
        # CODEPATH: a decoder-only SLM reads the prompt right before the answer.
        if padded and not self.config.decoder.is_encoder_decoder:
            order = padding_to("left", mask)
            states, mask = reorder(states, order), reorder(mask, order)
        return PromptStates(last_hidden_state=states, attention_mask=mask)


class ExportedCache:
    """
    What the SLM has read, with the state of the runtime that holds its keys and values: one batch's, and no other's.
    Like [`LLM2SLMCache`] it counts answer tokens only.

    Args:
        state: The runtime's state, new.
        repeats: So many rows after one another begin with the same prompt; it is read once for all of them.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: Any, repeats: int = 1):
        self.state = state
        self.repeats = repeats
        self.prompt_mask: torch.Tensor | None = None  # (B, N) once the SLM has read the prompt
        self.output_length = 0
        self._mask: torch.Tensor | None = None  # the prompt's, and ones for an answer to come
        self.cross: dict[str, torch.Tensor] = {}  # of an encoder-decoder SLM: keys and values of the prompt
        self.rows: torch.Tensor | None = None  # which row of the state each row of the next step goes on from

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Answer tokens read so far, the start token among them."""
        return self.output_length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row go on from another one, in the next step."""
        self.rows = beam_idx if self.rows is None else self.rows[beam_idx]

    def mask_and_positions(self, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        For a decoder-only SLM: the mask over prompt and answer, and the positions of the `new` last of them. With few
        operations: after a step, which reads all weights, nothing that they need is in the processor's caches.
        """
        assert self.prompt_mask is not None
        rows, prompt_length = self.prompt_mask.shape
        begins = self.output_length == 0
        width = new if begins else prompt_length + self.output_length + new
        if self._mask is None or len(self._mask) != rows or self._mask.shape[1] < width:
            self._mask = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(rows, width + MASK_AHEAD)], dim=1)
            self._prompt_lengths = self.prompt_mask.sum(-1, keepdim=True)
        mask = self._mask[:, :width]
        if begins:
            return mask, (mask.cumsum(-1) - 1).clamp(min=0)
        return mask, self._prompt_lengths + torch.arange(self.output_length, self.output_length + new)

    def run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Read more, and return the logits `(B, 1, vocabulary)` of what follows."""
        rows, self.rows = self.rows, None
        return self.state.run(inputs, rows)

    def expand(self) -> None:
        """Go on with `repeats` rows for each that has been read."""
        assert self.prompt_mask is not None
        self.rows = torch.arange(len(self.prompt_mask)).repeat_interleave(self.repeats)
        self.prompt_mask = self.prompt_mask[self.rows]
        self.cross = {name: tensor[self.rows] for name, tensor in self.cross.items()}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("The cache of an exported model cannot be cropped: what its graph has read stays read.")


class ExportedLLM2SLM(LLM2SLMGenerationMixin):
    """
    An LLM-to-SLM model that a runtime other than PyTorch computes, with stock `generate()`: greedy, sampled, beams,
    streamed, in padded batches, from `encode_prompt()`'s states. Threads may generate at once.

    It scores no labels and does not train; attentions and hidden states stay in the graphs, and no token is taken
    back, so that it neither drafts nor is drafted for.

    Args:
        config ([`LLM2SLMConfig`]): As of the model that was exported.
        generation_config (`GenerationConfig`): As of the model that was exported.
        graphs: `prompt`, `step` and, of an encoder-decoder SLM, `cross`, on their runtime.
        embeddings (`torch.Tensor` of shape `(vocabulary, d_slm)`): What the SLM reads for each token.
        details: What `export.json` says of the export: `runtime`, `weights`, `parameters`.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    device = torch.device("cpu")
    dtype = torch.float32  # of what goes in and comes out, whatever the weights are

    def __init__(
        self,
        config: LLM2SLMConfig,
        generation_config: GenerationConfig,
        graphs: dict[str, Any],
        embeddings: torch.Tensor,
        details: dict[str, Any],
    ):
        self.config = config
        self.generation_config = generation_config
        self.details = details
        self._graphs = graphs
        self._embeddings = embeddings
        self.encoder = ExportedEncoder(config, graphs["prompt"], self._embed)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ExportedLLM2SLM:
        """
        Load what `llm2slm export` wrote. It computes on as many threads as `torch.get_num_threads()` says now.

        Args:
            path: The folder.

        Raises:
            ImportError: If its runtime is not installed.
            OSError: If the folder is not an exported model, or incomplete.
        """
        path = Path(path)
        if not is_exported(path):
            raise OSError(f"{path} is not an exported model: it has no {MANIFEST} that `llm2slm export` wrote.")
        manifest = read_manifest(path)
        details = {"runtime": manifest["export_format"], **manifest["llm2slm"]}
        return cls(
            LLM2SLMConfig.from_pretrained(path),
            GenerationConfig.from_pretrained(path),
            load_graphs(path, manifest),
            load_file(path / EMBEDDINGS)["weight"],
            details,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Seq2SeqLMOutput:
        return self.forward(*args, **kwargs)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None: `generate()` asks."""
        return {}

    def get_encoder(self, modality: str | None = None) -> ExportedEncoder:
        return self.encoder

    def encode_prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> PromptStates:
        """All the work that belongs to prompts `(B, N)`, done once: for `generate(encoder_outputs=...)`."""
        return self.encoder(input_ids, attention_mask)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self._embeddings).float()

    def new_cache(self, repeats: int = 1) -> ExportedCache:
        """An empty cache."""
        return ExportedCache(self._graphs["step"].new_state(), repeats)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: PromptStates | ModelOutput | tuple | None = None,
        past_key_values: ExportedCache | None = None,
        return_dict: bool = True,
    ) -> Seq2SeqLMOutput:
        """
        The logits `(B, 1, vocabulary)` of what follows `decoder_input_ids`, and the cache to go on from.

        Args:
            input_ids: Prompts `(B, N)`, or `encoder_outputs` in their place.
            attention_mask: 1 on prompt tokens, 0 on padding `(B, N)`. Inferred from the LLM's pad id if left out.
            decoder_input_ids: What of the answers `(B, M)` is not in the cache yet, from the start token on.
            encoder_outputs: From `encode_prompt`. Not read once the prompt is in the cache.
            past_key_values: Returned by an earlier call.
            return_dict: Always true.
        """
        if decoder_input_ids is None:
            raise ValueError("There is no answer to go on from: pass `decoder_input_ids`.")
        cache = past_key_values if past_key_values is not None else self.new_cache()
        answer, states = decoder_input_ids, None
        if cache.prompt_mask is None:
            if encoder_outputs is None:
                encoder_outputs = self.encoder(input_ids, attention_mask, answer.shape[1])
            # Rows that begin with the same prompt have the same first step.
            states = as_prompt_states(encoder_outputs, attention_mask).one_of_each()
            answer = answer[:: cache.repeats]
            cache.prompt_mask = states.attention_mask
        # CODEPATH: encoder-decoder SLMs (T5-small) against decoder-only ones (GPT-2).
        read = self._read_across if self.config.decoder.is_encoder_decoder else self._read_after_prompt
        logits = read(states and states.last_hidden_state, self._embed(answer), cache)
        cache.output_length += answer.shape[1]
        if states is not None and cache.repeats > 1:
            cache.expand()
            logits = logits.repeat_interleave(cache.repeats, dim=0)
        return Seq2SeqLMOutput(
            logits=logits,
            past_key_values=cache,
            encoder_last_hidden_state=states and states.last_hidden_state,
        )

    def _read_after_prompt(
        self, prompt: torch.Tensor | None, embeds: torch.Tensor, cache: ExportedCache
    ) -> torch.Tensor:
        """A decoder-only SLM reads `[P ; E(start, answer)]`, or what follows."""
        assert cache.prompt_mask is not None
        if prompt is not None:
            embeds = torch.cat([prompt, embeds], dim=1)
        mask, position_ids = cache.mask_and_positions(embeds.shape[1])
        return cache.run({"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position_ids})

    def _read_across(self, prompt: torch.Tensor | None, embeds: torch.Tensor, cache: ExportedCache) -> torch.Tensor:
        """An encoder-decoder SLM attends to the prompt's keys and values, which are made once."""
        if prompt is not None:
            cache.cross = self._graphs["cross"].run({"last_hidden_state": prompt})
        assert cache.prompt_mask is not None
        return cache.run({"inputs_embeds": embeds, "attention_mask": cache.prompt_mask, **cache.cross})

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        check_supported(generation_config, model_kwargs)
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "An exported model takes no drafts (`assistant_model`, `prompt_lookup_num_tokens`): what its graph "
                "has read stays read. Leave them out, or use the checkpoint that was exported."
            )
        super()._validate_generation_mode(generation_mode, *args)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        model_kwargs.pop("output_length", None)  # the encoder's alone, and it is done
        # CODEPATH: decoder-only SLMs (GPT-2), whose prompt and answer share positions.
        if not self.config.decoder.is_encoder_decoder:
            prompt = as_prompt_states(model_kwargs["encoder_outputs"], model_kwargs.get("attention_mask"))
            self.encoder.check_prompt(prompt.attention_mask, max_cache_length)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = self.new_cache(max(generation_config.num_beams, generation_config.num_return_sequences))
        elif not isinstance(cache, ExportedCache):
            raise ValueError("`past_key_values` is of another model. Pass one that this model returned, or none.")
        model_kwargs["past_key_values"] = cache

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hook of `generate()`: what is not in the cache yet."""
        cached = past_key_values.get_seq_length()
        check_continues(cached, input_ids.shape[1])
        return {
            "decoder_input_ids": input_ids[:, cached:],
            "past_key_values": past_key_values,
            "encoder_outputs": kwargs.get("encoder_outputs"),
            "attention_mask": kwargs.get("attention_mask"),
        }


def supported_defaults(generation_config: GenerationConfig) -> GenerationConfig:
    """A checkpoint's defaults without those that change no answer and would have each call refused."""
    defaults = copy.deepcopy(generation_config)
    for name in DEFAULTS_LEFT_OUT:
        setattr(defaults, name, None)
    return defaults


def check_supported(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` on what graphs cannot do."""
    reasons = {
        "output_attentions": "attentions stay in the graph",
        "output_hidden_states": "hidden states stay in the graph",
        "cache_implementation": "the runtime holds keys and values itself",
        "is_assistant": "what its graph has read stays read",
    }
    wanted = [name for name in reasons if getattr(generation_config, name, None)]
    reasons |= {
        "use_cache=False": "its graph reads no token twice",
        "llm_hidden_states": "the LLM is part of the graph that reads prompts",
        "decoder_attention_mask": "all answers of a batch have one length",
    }
    mask = model_kwargs.get("decoder_attention_mask")
    wanted += ["use_cache=False"] if generation_config.use_cache is False else []
    wanted += ["llm_hidden_states"] if model_kwargs.get("llm_hidden_states") is not None else []
    wanted += ["decoder_attention_mask"] if mask is not None and not bool(mask.all()) else []
    if wanted:
        raise ValueError(f"`{wanted[0]}` is not supported by an exported model: {reasons[wanted[0]]}. Leave it out.")


__all__ = ["ExportedCache", "ExportedEncoder", "ExportedLLM2SLM"]
