"""
LLM-to-SLM models as graphs of an engine other than PyTorch, written by `llm2slm export`: the fastest way to generate
on a CPU.

There are up to three graphs. `prompt` turns token ids into the hidden states that the SLM reads, or into the keys and
values that it continues. `step` reads embeddings and returns the logits of the next token. `cross`, for an
encoder-decoder SLM only, returns the keys and values of the prompt that each step attends to. The SLM's embedding
table is a file of its own. Shapes: batch B, prompt length N, width d_slm.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig
from transformers.generation import GenerationMixin, GenerationMode
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..cache_llm2slm import PromptStates, as_prompt_states, check_continues, padding_to, reorder
from ..configuration_llm2slm import LLM2SLMConfig
from ..data.records import COUNT, MAPPING, TEXT, Kind, check_fields, mapping_to, read_record
from ..fusion_llm2slm import fusion_of
from ..generation_llm2slm import LLM2SLMGenerationMixin
from ..inference.engine import engine
from ..inference.families import LLM2SLMTextToText
from ..inference.parts import Part
from ..modeling_llm2slm import LLM2SLMEncoder
from ..states.files import check_files
from .decoding import FastDecoding
from .graphs import adds_embeddings


MANIFEST = "export.json"  # transformers' own; this package adds its details under "llm2slm"
EMBEDDINGS = "embeddings.safetensors"
DEFAULTS_LEFT_OUT = (
    "cache_implementation", "cache_config", "max_cache_len", "use_cache", "prompt_lookup_num_tokens", "is_assistant",
    "output_attentions", "output_hidden_states",
)  # fmt: skip
FIX = "Export the checkpoint again: llm2slm export."
COMPONENTS = Kind(
    "a mapping from graphs to files of this folder",
    lambda value: isinstance(value, dict) and "step" in value and all(map(_is_graph, value.values())),
)
DETAILS = {
    "weights": TEXT,
    "parameters": mapping_to(COUNT),
    "decode": COUNT,
    "options": MAPPING,
}
MASK_AHEAD = 256  # masks are allocated for this many more tokens


def is_exported(path: str | Path) -> bool:
    """Return whether `llm2slm export` wrote a folder."""
    return (Path(path) / MANIFEST).is_file() and "llm2slm" in read_manifest(path)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the content of `export.json`; `OSError` if it is damaged."""
    file = Path(path) / MANIFEST
    try:
        manifest = read_record(file, FIX, {"export_format": TEXT, "components": COMPONENTS})
        if "llm2slm" in manifest:
            check_fields(file, manifest["llm2slm"], FIX, DETAILS)
    except ValueError as error:
        raise OSError(str(error)) from error
    return manifest


def _is_graph(component: Any) -> bool:
    file = component.get("file") if isinstance(component, dict) else None
    return isinstance(file, str) and bool(file) and Path(file).name == file


def graph_size(path: str | Path, name: str) -> int:
    """Return the bytes of a graph of an exported model, with its weights, which may be in a file of their own."""
    graph = Path(path) / read_manifest(path)["components"][name]["file"]
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.stem}.*"))


class ExportedEncoder:
    """One graph that turns prompts into the hidden states that the SLM reads."""

    main_input_name = "input_ids"
    # These need only the config and the fusion.
    prompt_mask: Any = LLM2SLMEncoder.prompt_mask
    check_prompt: Any = LLM2SLMEncoder.check_prompt
    mask_before_output: Any = LLM2SLMEncoder.mask_before_output

    def __init__(self, config: LLM2SLMConfig, graph: Any, embed: Any):
        self.config = config
        self.fusion = fusion_of(config)
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
        """Turn prompt token ids `(B, N)` into the hidden states that the SLM reads, as [`LLM2SLMEncoder`] does."""
        mask = self.prompt_mask(input_ids, attention_mask)
        self.check_prompt(mask, output_length)
        assert input_ids is not None  # else `prompt_mask` has raised
        self.config.check_llm_length(input_ids.shape[1])
        padded = not bool(mask.all())
        if padded:
            order = padding_to(self.fusion.llm_padding, mask)
            input_ids, mask = reorder(input_ids, order), reorder(mask, order)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if adds_embeddings(self.fusion):
            inputs["inputs_embeds"] = self._embed(input_ids)
        outputs = self._graph.run(inputs)
        states, first = outputs["last_hidden_state"], outputs.get("first")
        # CODEPATH: fusion "cache" without the LLM's first token: the SLM reads the last prompt token again.
        if self.fusion.fills_cache and first is None:
            first = self._embed(input_ids[:, -1])
        # CODEPATH: a decoder-only SLM reads the prompt right before the output.
        if padded and self.fusion.llm_padding == "right" and not self.config.decoder.is_encoder_decoder:
            order = padding_to("left", mask)
            states, mask = reorder(states, order), reorder(mask, order)
        return PromptStates(last_hidden_state=states, attention_mask=mask, first=first)


class ExportedCache:
    """
    The cache of one batch. The engine's state holds the keys and values; like [`LLM2SLMCache`], the cache counts
    output tokens only.

    Args:
        state: A new state of the engine.
        repeats: Number of consecutive rows per prompt. The prompt is read once for all of them.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: Any, repeats: int = 1):
        self.state = state
        self.repeats = repeats
        self.prompt_mask: torch.Tensor | None = None  # (B, N) once the SLM has read the prompt
        self.output_length = 0
        self._mask: torch.Tensor | None = None  # the prompt's, followed by ones for outputs
        self.cross: dict[str, torch.Tensor] = {}  # for an encoder-decoder SLM: keys and values of the prompt
        self.rows: torch.Tensor | None = None  # the row of the state that each row of the next step continues
        self.is_private = False  # whether nobody else continues it

    @property
    def self_attention_cache(self) -> Any:
        """The state, to which a fusion may write the keys and values of the prompt."""
        return self.state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of output tokens read so far, the start token included."""
        return self.output_length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row continue another one in the next step."""
        self.rows = beam_idx if self.rows is None else self.rows[beam_idx]

    def mask_and_positions(self, new: int, read: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the mask over prompt and output, `new` more tokens of it included, and the positions of the last `read`
        tokens, for a decoder-only SLM.

        It takes few operations: after a step, which reads all weights, the processor's caches hold nothing they need.
        """
        assert self.prompt_mask is not None
        rows, prompt_length = self.prompt_mask.shape
        first_step = self.output_length == 0
        width = prompt_length + self.output_length + new
        if self._mask is None or len(self._mask) != rows or self._mask.shape[1] < width:
            self._mask = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(rows, width + MASK_AHEAD)], dim=1)
            self._prompt_lengths = self.prompt_mask.sum(-1, keepdim=True)
        mask = self._mask[:, :width]
        if first_step:
            return mask, (mask.cumsum(-1) - 1).clamp(min=0)[:, width - read :]
        return mask, self._prompt_lengths + torch.arange(self.output_length, self.output_length + new)

    def run(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Read more, and return the logits `(B, 1, vocabulary)` of the next token."""
        rows, self.rows = self.rows, None
        return self.state.run(inputs, rows)

    def expand(self) -> None:
        """Continue each row as `repeats` rows."""
        assert self.prompt_mask is not None
        self.keep(torch.arange(len(self.prompt_mask)).repeat_interleave(self.repeats))

    def keep(self, rows: torch.Tensor) -> None:
        """Continue only these rows, in this order."""
        assert self.prompt_mask is not None
        self.reorder_cache(rows)
        self.prompt_mask = self.prompt_mask[rows]
        self.cross = {name: tensor[rows] for name, tensor in self.cross.items()}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("The cache of an exported model cannot be cropped: its graph cannot forget tokens.")


class GraphModel(FastDecoding, GenerationMixin):
    """
    A model that an engine other than PyTorch computes as graphs, with transformers' `generate()`.

    Args:
        config (`PreTrainedConfig`): The config of the exported model.
        generation_config (`GenerationConfig`): The generation config of the exported model.
        graphs: The graphs by name, loaded by their engine.
        embeddings (`torch.Tensor` of shape `(vocabulary, width)`): The embedding of each output token.
        details: The details in `export.json`: `engine`, `weights`, `parameters`.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    device = torch.device("cpu")
    dtype = torch.float32  # of inputs and outputs, whatever the weights are
    cache_class = ExportedCache

    def __init__(
        self,
        config: Any,
        generation_config: GenerationConfig,
        graphs: dict[str, Any],
        embeddings: torch.Tensor,
        details: dict[str, Any],
    ):
        self.config = config
        self.generation_config = generation_config
        self.details = details
        self.graphs = graphs
        self._embeddings = embeddings

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """
        Load a model that `llm2slm export` wrote. It computes with `torch.get_num_threads()` threads, as set now.

        Args:
            path: The folder.

        Raises:
            ImportError: If its engine is not installed.
            OSError: If the folder is not an exported model, or is incomplete.
        """
        path = Path(path)
        if not is_exported(path):
            raise OSError(f"{path} is not an exported model: it has no {MANIFEST} of `llm2slm export`.")
        manifest = read_manifest(path)
        graph_engine: Any = engine(manifest["export_format"])
        graph_engine.check_installed()
        for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
            if not (path / name).is_file():  # transformers may take the defaults then
                raise OSError(f"{path} is incomplete: it has no {name}. {FIX}")
        check_files(path)
        config, table = AutoConfig.from_pretrained(path), load_file(path / EMBEDDINGS).get("weight")
        if table is None or table.dim() != 2 or table.shape[0] < config.vocab_size:
            raise OSError(f"{EMBEDDINGS} is damaged: it does not hold {config.vocab_size} embeddings. {FIX}")
        return cls(
            config,
            GenerationConfig.from_pretrained(path),
            graph_engine.load_graphs(path, manifest),
            table,
            {"engine": graph_engine.name, **manifest["llm2slm"]},
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Return nothing: `generate()` asks for it, and there are no experts."""
        return {}

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self._embeddings).float()

    def new_cache(self, repeats: int = 1) -> ExportedCache:
        """Return an empty cache."""
        return self.cache_class(self.graphs["step"].new_state(), repeats)

    def _set_cache(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> ExportedCache:
        """Put the cache to generate with into the arguments of the model, and return it."""
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = self.new_cache(max(generation_config.num_beams, generation_config.num_return_sequences))
            cache.is_private = True
        elif not isinstance(cache, self.cache_class):
            raise ValueError("`past_key_values` belongs to another model. Pass one that this model returned, or none.")
        model_kwargs["past_key_values"] = cache
        return cache

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        check_supported(generation_config, model_kwargs)
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "An exported model supports no assisted generation (`assistant_model`, `prompt_lookup_num_tokens`): "
                "its graph cannot forget tokens. Leave them out, or use the checkpoint that was exported."
            )
        super()._validate_generation_mode(generation_mode, *args)


class ExportedLLM2SLM(LLM2SLMGenerationMixin, GraphModel):
    """
    An LLM-to-SLM model on an engine other than PyTorch, with transformers' `generate()`: greedy, sampled, beams,
    streaming, padded batches, `encode_prompt()`. Several threads may generate at once.

    It does not train, and it returns no loss, attentions or hidden states. Its graph cannot forget tokens, so the
    model does not support assisted generation, and it cannot be the assistant.

    Args:
        config ([`LLM2SLMConfig`]): The config of the exported model.
        args: The generation config of the exported model; its graphs `prompt`, `step` and, for an encoder-decoder SLM,
            `cross`, loaded by their engine; the SLM's embedding of each token, `(vocabulary, d_slm)`; and the details
            in `export.json`: `engine`, `weights`, `parameters`.
    """

    def __init__(self, config: LLM2SLMConfig, *args: Any):
        super().__init__(config, *args)
        self.encoder = ExportedEncoder(config, self.graphs["prompt"], self._embed)

    def get_encoder(self, modality: str | None = None) -> ExportedEncoder:
        return self.encoder

    def encode_prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> PromptStates:
        """Do all work on prompts `(B, N)` once, for any number of calls of `generate(encoder_outputs=...)`."""
        return self.encoder(input_ids, attention_mask)

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
        Return the logits `(B, 1, vocabulary)` of the token after `decoder_input_ids`, and the cache to continue with.

        Args:
            input_ids: Prompts `(B, N)`. Not needed with `encoder_outputs`.
            attention_mask: 1 on prompt tokens, 0 on padding `(B, N)`. Default: inferred from the LLM's pad id.
            decoder_input_ids: The tokens of the outputs `(B, M)` that are not in the cache yet; the first one is the
                start token.
            encoder_outputs: From `encode_prompt`. Ignored once the prompt is in the cache.
            past_key_values: From an earlier call.
            return_dict: Always true.
        """
        if decoder_input_ids is None:
            raise ValueError("The output has no start token: pass `decoder_input_ids`.")
        cache = past_key_values if past_key_values is not None else self.new_cache()
        output_ids, states = decoder_input_ids, None
        if cache.prompt_mask is None:
            if encoder_outputs is None:
                encoder_outputs = self.encoder(input_ids, attention_mask, output_ids.shape[1])
            # Rows of the same prompt have the same first step.
            states = as_prompt_states(encoder_outputs, attention_mask).one_of_each()
            output_ids = output_ids[:: cache.repeats]
            cache.prompt_mask = self.encoder.mask_before_output(states.attention_mask)
        # CODEPATH: encoder-decoder SLMs (T5-small) against decoder-only ones (GPT-2).
        read = self._read_across if self.config.decoder.is_encoder_decoder else self._read_after_prompt
        logits = read(states, self._embed(output_ids), cache)
        cache.output_length += output_ids.shape[1]
        if states is not None and cache.repeats > 1:
            cache.expand()
            logits = logits.repeat_interleave(cache.repeats, dim=0)
        return Seq2SeqLMOutput(
            logits=logits,
            past_key_values=cache,
            encoder_last_hidden_state=states and states.last_hidden_state,
        )

    def _read_after_prompt(
        self, prompt: PromptStates | None, embeds: torch.Tensor, cache: ExportedCache
    ) -> torch.Tensor:
        """A decoder-only SLM reads `[P ; E(start, output)]`, or continues keys and values; later only new tokens."""
        new = embeds.shape[1]
        if prompt is not None:
            embeds = self.encoder.fusion.prepend(prompt, embeds, cache)
            if not embeds.shape[1]:  # the start token alone, whose logits are the LLM's
                return self.encoder.fusion.first_logits(prompt, embeds)
        mask, position_ids = cache.mask_and_positions(new, embeds.shape[1])
        return cache.run({"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position_ids})

    def _read_across(self, prompt: PromptStates | None, embeds: torch.Tensor, cache: ExportedCache) -> torch.Tensor:
        """An encoder-decoder SLM attends to the prompt's keys and values, which are computed once."""
        if prompt is not None:
            cache.cross = self.graphs["cross"].run({"last_hidden_state": prompt.last_hidden_state})
        assert cache.prompt_mask is not None
        return cache.run({"inputs_embeds": embeds, "attention_mask": cache.prompt_mask, **cache.cross})

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        model_kwargs.pop("output_length", None)  # only the encoder takes it, and has run
        # CODEPATH: decoder-only SLMs (GPT-2), where prompt and output share positions.
        if not self.config.decoder.is_encoder_decoder:
            prompt = as_prompt_states(model_kwargs["encoder_outputs"], model_kwargs.get("attention_mask"))
            self.encoder.check_prompt(prompt.attention_mask, max_cache_length)
        self._set_cache(generation_config, model_kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hook of `generate()`: pass the tokens that are not in the cache yet."""
        cached = past_key_values.get_seq_length()
        check_continues(cached, input_ids.shape[1])
        return {
            "decoder_input_ids": input_ids[:, cached:],
            "past_key_values": past_key_values,
            "encoder_outputs": kwargs.get("encoder_outputs"),
            "attention_mask": kwargs.get("attention_mask"),
        }


class ExportedText:
    """What [`TextToText`] of an exported model has in common: its parts come from `export.json`."""

    model: Any

    def parts(self) -> list[Part]:
        config, details = self.model.config, self.model.details
        # CODEPATH: LLM-to-SLM models have two configs, a decoder-only model has one.
        configs = {"LLM": getattr(config, "encoder", None), "SLM": getattr(config, "decoder", None), "model": config}
        return [
            Part(name, configs.get(name), count, details["weights"]) for name, count in details["parameters"].items()
        ]

    def parameters(self) -> dict[str, int]:
        total = sum(part.parameters for part in self.parts())
        return {"total": total, "trainable": 0, "decode": self.model.details["decode"]}

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        raise ValueError("An exported model cannot be saved again: copy its folder.")


class ExportedTextToText(ExportedText, LLM2SLMTextToText):
    """An LLM-to-SLM model that `llm2slm export` wrote for an engine other than PyTorch."""


def supported_defaults(generation_config: GenerationConfig) -> GenerationConfig:
    """Return a checkpoint's defaults without those that change no output and that every call would refuse."""
    defaults = copy.deepcopy(generation_config)
    for name in DEFAULTS_LEFT_OUT:
        setattr(defaults, name, None)
    return defaults


def check_supported(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for an argument of `generate()` that graphs do not support."""
    reasons = {
        "output_attentions": "its graph does not return attentions",
        "output_hidden_states": "its graph does not return hidden states",
        "cache_implementation": "the engine holds keys and values itself",
        "is_assistant": "its graph cannot forget tokens",
    }
    wanted = [name for name in reasons if getattr(generation_config, name, None)]
    reasons |= {
        "use_cache=False": "its graph reads each token once",
        "llm_hidden_states": "the LLM is part of the graph that reads prompts",
        "decoder_attention_mask": "all outputs of a batch have one length",
    }
    mask = model_kwargs.get("decoder_attention_mask")
    wanted += ["use_cache=False"] if generation_config.use_cache is False else []
    wanted += ["llm_hidden_states"] if model_kwargs.get("llm_hidden_states") is not None else []
    wanted += ["decoder_attention_mask"] if mask is not None and not bool(mask.all()) else []
    if wanted:
        raise ValueError(f"`{wanted[0]}` is not supported by an exported model: {reasons[wanted[0]]}. Leave it out.")


__all__ = ["ExportedCache", "ExportedEncoder", "ExportedLLM2SLM", "ExportedTextToText"]
