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
"""Configuration of an LLM-to-SLM model: the large model's, the small model's, and how the two meet."""

import copy
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config, PreTrainedConfig, T5Config


FUSIONS = ("add", "replace")
# The positions of these begin after the pad id, so that they have as many fewer than their configs say.
POSITIONS_AFTER_PAD = frozenset(
    (
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
    )
)
FOREIGN = {"transformers_weights", "attn_implementation", "_attn_implementation", "kernel_config", "fusion_config"}
MAX_LAYERS = 1000  # far beyond any model; each costs time and memory to build, even without its weights


@strict
class LLM2SLMConfig(PreTrainedConfig):
    r"""
    Configuration of [`LLM2SLMForConditionalGeneration`]: a large frozen LLM reads the prompt once, a projector maps
    what it read into the embedding space of a small language model (SLM), and the SLM writes the answer
    (Bergner et al., arXiv 2402.16844).

    Token ids, `vocab_size` and `hidden_size` are those of the SLM, the side that writes. An id left out is taken from
    the SLM's config: the start id is its `decoder_start_token_id`, else `bos_token_id`, else `eos_token_id`; the pad
    id is its `pad_token_id`, else `eos_token_id`.

    Args:
        encoder (`PreTrainedConfig` or `dict`, *optional*, defaults to `T5Config()`):
            The LLM's config. Of an encoder-decoder LLM only the encoder is used.
        decoder (`PreTrainedConfig` or `dict`, *optional*, defaults to `GPT2Config()`):
            The SLM's config.
        fusion (`str`, *optional*, defaults to `"add"`):
            What the SLM reads in place of the prompt (paper section 3.2): `"replace"`, the projected LLM states;
            `"add"`, these plus an embedding of the prompt's tokens.
        shared_tokenizer (`bool`, *optional*, defaults to `False`):
            Whether LLM and SLM have the same tokenizer. With `fusion="add"` the SLM's own embedding of the prompt is
            then added; otherwise the LLM's (frozen) embedding followed by a trained linear map.
        encoder_layer (`int`, *optional*):
            The LLM's states are `hidden_states[encoder_layer]` of the full LLM, and no layer above is built.
            `None`: its `last_hidden_state`.
        projector_layers (`int`, *optional*, defaults to 2):
            Linear layers of the projector, with a ReLU between each two.
        freeze_llm (`bool`, *optional*, defaults to `True`):
            Whether the LLM is frozen: no gradient, no dropout, not even in `train()`.
        encoder_dtype (`str`, *optional*):
            The LLM's own dtype where it differs from the rest, for instance `"bfloat16"`. It holds on every load,
            whatever `dtype=` is given for the rest.
        pad_token_id (`int`, *optional*): Pads answers.
        decoder_start_token_id (`int`, *optional*): Stands before every answer.
        eos_token_id (`int` or `list[int]`, *optional*): Ends an answer.
        llm_source (`dict`, *optional*):
            Where the LLM comes from, written by the factory: `name_or_path` (a repository, or a folder relative to the
            checkpoint), `revision`, `subfolder`, and `fingerprint`, which tells its weights from others.
        slm_source (`dict`, *optional*): The same for the SLM, without a fingerprint.
        lean (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint leaves out the LLM's weights, which are then read from `llm_source`.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether a `forward` that does not train returns a cache; `Trainer` turns it off.

    Raises:
        ValueError: If a value does not exist or does not fit; the message names the fix.

    Example:

    ```python
    >>> from transformers import GPT2Config, T5Config
    >>> from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration

    >>> config = LLM2SLMConfig(encoder=T5Config(d_model=512), decoder=GPT2Config(), fusion="add")
    >>> model = LLM2SLMForConditionalGeneration(config)
    ```
    """

    model_type = "llm2slm"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder": AutoConfig, "decoder": AutoConfig}

    encoder: Any = None
    decoder: Any = None
    fusion: str = "add"
    shared_tokenizer: bool = False
    encoder_layer: int | None = None
    projector_layers: int = 2
    freeze_llm: bool = True
    encoder_dtype: str | None = None
    llm_source: dict[str, Any] | None = None
    slm_source: dict[str, Any] | None = None
    lean: bool = False
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder = as_reader(_as_config(self.encoder, "encoder", default=T5Config))
        self.decoder = _as_config(self.decoder, "decoder", default=GPT2Config)
        self._take_ids_from_slm()
        self._check_values()
        super().__post_init__(**kwargs)

    @classmethod
    def own_fields(cls) -> set[str]:
        """Names of what is configured here, apart from the two configs and the LLM's dtype."""
        return set(cls.__annotations__) - {
            "sub_configs",
            "encoder",
            "decoder",
            "encoder_dtype",
            "llm_source",
            "slm_source",
            "lean",
            "use_cache",
            "is_encoder_decoder",
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LLM2SLMConfig":
        """As of every config, for values that come with a checkpoint; `ValueError` if they make no config."""
        _check_references(config_dict)
        try:
            return super().from_dict(config_dict, **kwargs)
        except (AttributeError, KeyError, OverflowError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"The config of the checkpoint is not sound: {' '.join(str(error).split())}") from error

    def to_dict(self) -> dict[str, Any]:
        """As of every config, without the places on this machine that the parts were loaded from."""
        values = super().to_dict()
        for part in ("encoder", "decoder"):
            if isinstance(values.get(part), dict):
                values[part].pop("_name_or_path", None)
        return values

    @property
    def vocab_size(self) -> int:
        """`int`: Size of the SLM's vocabulary, the one answers are written in."""
        return self.decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        """`int`: Width of the SLM, `d_slm`."""
        return self.get_text_config(decoder=True).hidden_size

    @property
    def prompt_size(self) -> int:
        """`int`: Width of the embeddings that the SLM reads: `d_slm`, but for a small OPT, which projects them."""
        return getattr(self.decoder, "word_embed_proj_dim", None) or llm_sizes(self.decoder).hidden_size

    @property
    def llm_positions(self) -> int | None:
        """`int`: How many positions the LLM has, if any number limits them."""
        return _positions(self.encoder)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """
        The SLM's config, from which sizes of caches and vocabularies are read: with `decoder=True`, that of its own
        decoder; with `encoder=True` the LLM's.
        """
        if encoder and not decoder:
            return self.encoder
        if not (decoder and self.decoder.is_encoder_decoder):
            return self.decoder
        config = self.decoder.get_text_config(decoder=True)  # a copy, where two halves share one config
        # T5 keeps the number of its decoder's layers under a name that transformers does not look for.
        config.num_hidden_layers = getattr(self.decoder, "num_decoder_layers", None) or config.num_hidden_layers
        return config

    def fits(self, prompt_length: int, output_length: int) -> bool:
        """Whether the SLM has positions for prompt and answer (with its start token, without its last)."""
        limit = _positions(self.decoder)
        used = prompt_length + output_length
        if self.decoder.is_encoder_decoder:
            used = max(prompt_length, output_length)
        return limit is None or used <= limit

    def needs_output_mask(self, prompt_width: int, answer_width: int) -> bool:
        """
        Whether a batch of these widths has more places than the SLM has positions, so that answers need a mask, as
        padding takes no positions. A GPT-Neo has no more places than positions: its own mask is as wide as they are.
        """
        return not self.fits(prompt_width, answer_width) and self.decoder.model_type != "gpt_neo"

    def check_length(self, prompt_length: int, output_length: int) -> None:
        """Raise `ValueError`, with both lengths and the fix, where [`~LLM2SLMConfig.fits`] is `False`."""
        if self.fits(prompt_length, output_length):
            return
        sizes = f"The prompt has {prompt_length} tokens and the answer up to {output_length}"
        limit = f"but the SLM has {_positions(self.decoder)} positions"
        both = f"{sizes}, together {prompt_length + output_length}, {limit} for both."
        raise ValueError(
            f"{f'{sizes}, {limit} for each.' if self.decoder.is_encoder_decoder else both} Shorten the prompt "
            "(`prompt_max_length` of the processor) or the answer (`max_new_tokens`, `target_max_length`), or use an "
            "SLM with more positions."
        )

    def check_llm_length(self, width: int) -> None:
        """Raise `ValueError` where prompts padded to `width` need more positions than the LLM has."""
        limit = self.llm_positions
        if limit is not None and width > limit:
            raise ValueError(
                f"The prompts are {width} tokens wide, padding included, but the LLM has {limit} positions. Shorten "
                "them (`prompt_max_length` of the processor)."
            )

    def _take_ids_from_slm(self) -> None:
        slm = self.decoder
        eos = _first_set(self.eos_token_id, getattr(slm, "eos_token_id", None))
        first_eos = eos[0] if isinstance(eos, list) else eos
        ids = {
            "eos_token_id": eos,
            "pad_token_id": _first_set(self.pad_token_id, getattr(slm, "pad_token_id", None), first_eos),
            "decoder_start_token_id": _first_set(
                self.decoder_start_token_id,
                getattr(slm, "decoder_start_token_id", None),
                getattr(slm, "bos_token_id", None),
                first_eos,
            ),
        }
        for name, value in ids.items():
            if value is None:
                raise ValueError(
                    f"`{name}` is not set and the SLM's config ({slm.model_type}) has no id to take its place. "
                    f"Pass `{name}=...`, an id of the SLM's tokenizer."
                )
            for token_id in value if isinstance(value, list) else [value]:
                if not 0 <= token_id < slm.vocab_size:
                    raise ValueError(
                        f"`{name}` is {token_id}, but the SLM's vocabulary has ids from 0 to {slm.vocab_size - 1}. "
                        f"Pass an id of the SLM's tokenizer as `{name}=...`."
                    )
            setattr(self, name, value)

    def _check_values(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"`fusion` is {self.fusion!r}, but it must be one of {', '.join(map(repr, FUSIONS))}.")
        for name in ("llm_source", "slm_source"):
            source = getattr(self, name) or {}
            if not all(value is None or isinstance(value, str) for value in source.values()):
                raise ValueError(f"`{name}` is {source!r}, but its values must be text.")
        _check_sizes(llm_sizes(self.encoder), "encoder")
        _check_sizes(self.get_text_config(decoder=True), "decoder")
        layers = llm_sizes(self.encoder).num_hidden_layers
        if self.encoder_layer is not None and self.encoder_layer not in range(layers + 1):
            raise ValueError(
                f"`encoder_layer` is {self.encoder_layer!r}, but the LLM ({self.encoder.model_type}) has {layers} "
                f"layers. Use 0 (the embeddings) to {layers}, or None for its last hidden state."
            )
        if not 1 <= self.projector_layers <= MAX_LAYERS:
            raise ValueError(f"`projector_layers` is {self.projector_layers}, but must be from 1 to {MAX_LAYERS}.")
        positions = _positions(self.decoder)
        if not self.decoder.is_encoder_decoder and positions is not None and positions < 2:
            raise ValueError(
                f"The SLM has {positions} positions, but prompt and answer share them and need at least 2. "
                "Raise its `max_position_embeddings`."
            )


def as_reader(config: PreTrainedConfig) -> PreTrainedConfig:
    """The LLM's config such that its encoder is built alone: T5Gemma's class asks for a config that says so."""
    if isinstance(getattr(config, "encoder", None), PreTrainedConfig):
        config.is_encoder_decoder = False
    return config


def llm_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """Where the sizes of what reads a prompt are: the config itself, or the encoder's in it (T5Gemma)."""
    encoder = getattr(config, "encoder", None)
    return encoder if isinstance(encoder, PreTrainedConfig) else config


def check_encoder_decoder_length(config: PreTrainedConfig, prompt_length: int, output_length: int) -> None:
    """Raise `ValueError` where a whole LLM has no positions for a prompt and an answer of these lengths."""
    limit = _positions(config)
    if limit is not None and max(prompt_length, output_length) > limit:
        raise ValueError(
            f"The prompt has {prompt_length} tokens and the answer up to {output_length}, but the LLM has {limit} "
            "positions for each. Shorten the prompt (`prompt_max_length`) or the answer (`max_new_tokens`)."
        )


def _positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has, if any number limits them."""
    positions = getattr(llm_sizes(config), "max_position_embeddings", None)
    if positions is not None and config.model_type in POSITIONS_AFTER_PAD:
        positions -= (config.pad_token_id or 0) + 1
    return positions


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _as_config(config: PreTrainedConfig | dict | None, name: str, default: type[PreTrainedConfig]) -> PreTrainedConfig:
    if config is None:
        return default()
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(
            config
        )  # models write into the config they are built from, and the caller's may serve two
    if not isinstance(config, dict):
        raise TypeError(f"`{name}` must be a config object, a dict or None, not {type(config).__name__}.")
    values = dict(config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(f'`{name}` is a dict without "model_type". Add it, for instance "model_type": "t5".')
    return AutoConfig.for_model(model_type, **values)


def _check_references(values: dict[str, Any]) -> None:
    """What a checkpoint brings may not choose other files to read, nor kernels to download and run."""
    parts = [part for part in (values, values.get("encoder"), values.get("decoder")) if isinstance(part, dict)]
    for key in FOREIGN:
        if any(part.get(key) is not None for part in parts):
            raise ValueError(f"The checkpoint sets `{key}`, which is the caller's to choose. Remove it.")


def _check_sizes(config: PreTrainedConfig, name: str) -> None:
    hidden_size = getattr(config, "hidden_size", None)
    if not isinstance(hidden_size, int) or hidden_size < 1:
        raise ValueError(
            f"`{name}` ({config.model_type}) has hidden size {hidden_size!r}, but a positive one is needed. Pass the "
            "config of a text model; of a multimodal model, its `text_config`."
        )
    for key in ("num_hidden_layers", "num_decoder_layers"):
        layers = getattr(config, key, None)
        if layers is not None and not (isinstance(layers, int) and 0 <= layers <= MAX_LAYERS):
            raise ValueError(f"`{name}` has {layers!r} as `{key}`, but a number up to {MAX_LAYERS} is needed.")
    heads = getattr(config, "num_attention_heads", None)
    own_head_size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    if heads and own_head_size is None and hidden_size % heads:
        raise ValueError(
            f"`{name}` ({config.model_type}) has hidden size {hidden_size}, which its {heads} attention heads do not "
            "divide. Change one of the two."
        )


__all__ = ["LLM2SLMConfig"]
