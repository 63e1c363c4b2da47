# Copyright 2026 The modeling-llm2slm authors.
# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Configuration of an LLM-to-SLM model: the LLM's, the SLM's, their fusion, and the quirks of model families."""

import copy
import os
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config, PreTrainedConfig, T5Config

from .fusion_llm2slm import fusion_of


class Quirks(NamedTuple):
    """Needs of a model family that most families do not have, and that transformers declares in no class."""

    positions_after_pad: bool = False  # positions begin after the pad id, so fewer are left than the config says
    mask_limited_to_positions: bool = False  # an attention mask must not be wider than the max positions
    decoder_layers: str | None = None  # the config's own name for the number of its decoder's layers
    embedding_size: str = "hidden_size"  # the config's name for the width of its embeddings
    feed_forward_size: str = "intermediate_size"  # the config's name for the width of its feed-forward layers
    head_size: str = "head_dim"  # the config's name for the width of an attention head


_AFTER_PAD = "camembert data2vec-text ibert longformer mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl"
_T5 = Quirks(decoder_layers="num_decoder_layers", feed_forward_size="d_ff", head_size="d_kv")
# By `model_type`. A new quirk is a field above and an entry here.
QUIRKS = {
    **dict.fromkeys(_AFTER_PAD.split(), Quirks(positions_after_pad=True)),
    **dict.fromkeys(("longt5", "mt5", "pop2piano", "switch_transformers", "t5", "umt5"), _T5),
    "gpt_neo": Quirks(mask_limited_to_positions=True),
    "opt": Quirks(embedding_size="word_embed_proj_dim"),
    "prophetnet": Quirks(decoder_layers="num_decoder_layers"),
}
# A checkpoint's config must not set these: they choose other files to read, or kernels to download and run.
FOREIGN = {"transformers_weights", "attn_implementation", "_attn_implementation", "kernel_config", "fusion_config"}
CHECKS: list[Callable[[Any], None]] = []  # those of the values, which the installed package adds


@strict
class LLM2SLMConfig(PreTrainedConfig):
    r"""
    Configuration of [`LLM2SLMForConditionalGeneration`]: a frozen LLM reads the prompt once, a projector maps its
    hidden states into the embedding space of a small language model (SLM), and the SLM writes the output
    (Bergner et al., arXiv 2402.16844). Token ids, `vocab_size` and `hidden_size` are the SLM's.

    Args:
        encoder (`PreTrainedConfig` or `dict`, *optional*, defaults to `T5Config()`):
            The LLM's config. Only the encoder of an encoder-decoder LLM is used.
        decoder (`PreTrainedConfig` or `dict`, *optional*, defaults to `GPT2Config()`): The SLM's config.
        fusion (`str`, *optional*, defaults to `"add"`):
            What the SLM reads for the prompt (paper section 3.2): `"replace"`, the projected hidden states; `"add"`,
            these plus an embedding of the prompt tokens; `"cache"`, no embeddings but the LLM's own keys and values,
            for an SLM that is made of layers of the LLM; or another [`Fusion`] that was registered.
        shared_tokenizer (`bool`, *optional*, defaults to `False`):
            Whether LLM and SLM have the same tokenizer. `fusion="add"` then uses the SLM's embedding of the prompt,
            and otherwise the LLM's (frozen) embedding followed by a trained linear map.
        decoder_layers (`list[int]`, *optional*):
            For `fusion="cache"`, the layer of the LLM that each layer of the SLM continues. Default: the
            `cut_from_layers` of the SLM's config.
        llm_first_token (`bool`, *optional*, defaults to `True`):
            For `fusion="cache"`, whether the first output token comes from the LLM's logits, and no loss trains it.
        encoder_layer (`int` or `list[int]`, *optional*):
            Use `hidden_states[encoder_layer]` of the full LLM, those of several layers concatenated, and build no
            layer above. Default: its `last_hidden_state`.
        projector_layers (`int`, *optional*, defaults to 2): Linear layers of the projector, with ReLUs between them.
        freeze_llm (`bool`, *optional*, defaults to `True`): No gradient and no dropout in the LLM, even in `train()`.
        encoder_dtype (`str`, *optional*):
            The LLM's own dtype, such as `"bfloat16"`. It holds on every load, whatever `dtype=` is given.
        llm_source (`dict`, *optional*):
            Where the LLM comes from, written by the factory: `name_or_path` (a repository, or a folder relative to the
            checkpoint), `revision`, `subfolder`, and the `fingerprint` of its weights.
        slm_source (`dict`, *optional*): The same for the SLM, without a fingerprint.
        lean (`bool`, *optional*, defaults to `False`): The checkpoint has no LLM weights; `llm_source` has them.
        pad_token_id (`int`, *optional*): Pads outputs. Default: the SLM's, else its end token.
        decoder_start_token_id (`int`, *optional*):
            Starts every output. Default: the SLM's `decoder_start_token_id`, else `bos_token_id`, else `eos_token_id`.
        eos_token_id (`int` or `list[int]`, *optional*): Ends an output. Default: the SLM's.
        use_cache (`bool`, *optional*, defaults to `True`): Return a cache outside training; `Trainer` turns it off.

    Raises:
        ValueError: If a value does not exist or does not fit, as far as the installed package can tell.
    """

    model_type = "llm2slm"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder": AutoConfig, "decoder": AutoConfig}

    encoder: Any = None
    decoder: Any = None
    fusion: str = "add"
    shared_tokenizer: bool = False
    decoder_layers: list[int] | None = None
    llm_first_token: bool = True
    encoder_layer: int | list[int] | None = None
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
        self.encoder = _as_config(self.encoder, "encoder", default=T5Config)
        self.decoder = _as_config(self.decoder, "decoder", default=GPT2Config)
        if llm_sizes(self.encoder) is not self.encoder:  # T5Gemma's class for the encoder alone asks for this
            self.encoder.is_encoder_decoder = False
        self._take_ids_from_slm()
        for check in CHECKS:
            check(self)
        fusion_of(self).prepare()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LLM2SLMConfig":
        """Build a config from values of a checkpoint. Raise `ValueError` if they do not make one."""
        parts = [
            values for values in (config_dict, *map(config_dict.get, cls.sub_configs)) if isinstance(values, dict)
        ]
        for key in FOREIGN:
            if any(part.get(key) is not None for part in parts):
                raise ValueError(f"The checkpoint sets `{key}`, which is the caller's to choose. Remove it.")
        try:
            return super().from_dict(config_dict, **kwargs)
        except (AttributeError, KeyError, OverflowError, TypeError, StrictDataclassError) as error:
            cause = " ".join(str(error.__cause__ or error).split())  # the cause of a strict error has no class name
            raise ValueError(f"The config of the checkpoint is invalid: {cause}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return all values but the folders of this machine that the parts were loaded from."""
        values = super().to_dict()
        for part in ("encoder", "decoder"):
            if isinstance(values.get(part), dict):
                values[part].pop("_name_or_path", None)
        for part in ("llm_source", "slm_source"):
            if os.path.isabs((values.get(part) or {}).get("name_or_path") or ""):
                values[part] = {key: value for key, value in values[part].items() if key != "name_or_path"}
        return values

    @property
    def vocab_size(self) -> int:
        """`int`: Size of the SLM's vocabulary."""
        return self.decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        """`int`: Width of the SLM, `d_slm`."""
        return self.get_text_config(decoder=True).hidden_size

    @property
    def llm_hidden_size(self) -> int:
        """`int`: Width of what a fusion reads of each token, `d_llm`: hidden states, or keys and values."""
        return fusion_of(self).states_size(llm_sizes(self.encoder).hidden_size)

    @property
    def prompt_size(self) -> int:
        """`int`: Width of the embeddings that the SLM reads: `d_slm`, but for a small OPT, which projects them."""
        return getattr(llm_sizes(self.decoder), quirks_of(self.decoder).embedding_size)

    @property
    def llm_positions(self) -> int | None:
        """`int`: The LLM's max positions, or `None` if it has no limit."""
        return max_positions(self.encoder)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the SLM's config; with `decoder=True`, that of its own decoder; with `encoder=True` the LLM's."""
        if encoder and not decoder:
            return self.encoder
        return decoder_sizes(self.decoder) if decoder else self.decoder

    def output_flags(self, kwargs: dict[str, Any], part: PreTrainedConfig) -> dict[str, Any]:
        """Return which attentions and hidden states are requested by `kwargs`, this config or that of a part."""
        names = ("output_attentions", "output_hidden_states")
        return {name: kwargs.get(name, getattr(self, name) or getattr(part, name, False)) for name in names}

    def fits(self, prompt_length: int, output_length: int) -> bool:
        """Return whether prompt and output (its start token counts, its last does not) fit in the SLM's positions."""
        return fits(self.decoder, prompt_length - fusion_of(self).shared_positions, output_length)

    def needs_output_mask(self, prompt_width: int, output_width: int) -> bool:
        """Return whether a padded batch is wider than the SLM's max positions, so that outputs need a mask."""
        return not (self.fits(prompt_width, output_width) or quirks_of(self.decoder).mask_limited_to_positions)

    def check_length(self, prompt_length: int, output_length: int) -> None:
        """Raise `ValueError`, with both lengths and the fix, if [`~LLM2SLMConfig.fits`] is `False`."""
        if not self.fits(prompt_length, output_length):
            check_length(self.decoder, prompt_length, output_length, "SLM")

    def check_llm_length(self, width: int) -> None:
        """Raise `ValueError` if prompts padded to `width` need more positions than the LLM has."""
        if self.llm_positions is not None and width > self.llm_positions:
            raise ValueError(
                f"The prompts are {width} tokens wide, padding included, but the LLM has {self.llm_positions} "
                "positions. Shorten them (`prompt_max_length` of the processor)."
            )

    def _take_ids_from_slm(self) -> None:
        slm = self.decoder
        eos = _first_set(self.eos_token_id, getattr(slm, "eos_token_id", None))
        first_eos = eos[0] if isinstance(eos, list) else eos
        starts = [getattr(slm, name, None) for name in ("decoder_start_token_id", "bos_token_id")]
        self.eos_token_id = eos
        self.pad_token_id = _first_set(self.pad_token_id, getattr(slm, "pad_token_id", None), first_eos)
        self.decoder_start_token_id = _first_set(self.decoder_start_token_id, *starts, first_eos)


def quirks_of(config: PreTrainedConfig) -> Quirks:
    """Return the quirks of a model's family."""
    return QUIRKS.get(config.model_type, Quirks())


def llm_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config that holds the sizes of what reads a prompt: `config`, or the encoder's in it (T5Gemma)."""
    encoder = getattr(config, "encoder", None)
    return encoder if isinstance(encoder, PreTrainedConfig) else config


def decoder_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config that holds the sizes of a model's decoder: a copy, where two halves share one config."""
    if not config.is_encoder_decoder:
        return config
    sizes = config.get_text_config(decoder=True)
    if (name := quirks_of(config).decoder_layers) is not None:  # transformers does not look for it there
        sizes.num_hidden_layers = getattr(config, name)
    return sizes


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the max positions of a model, or `None` if it has no limit."""
    positions = getattr(llm_sizes(config), "max_position_embeddings", None)
    if positions is not None and quirks_of(config).positions_after_pad:
        positions -= (config.pad_token_id or 0) + 1
    return positions


def fits(config: PreTrainedConfig, prompt_length: int, output_length: int) -> bool:
    """Return whether a model has positions for a prompt and an output of these lengths."""
    used = prompt_length + output_length if _share_positions(config) else max(prompt_length, output_length)
    limit = max_positions(config)
    return limit is None or used <= limit


def _share_positions(config: PreTrainedConfig) -> bool:
    return not config.is_encoder_decoder and llm_sizes(config) is config


def check_length(config: PreTrainedConfig, prompt_length: int, output_length: int, part: str = "LLM") -> None:
    """Raise `ValueError`, with both lengths and the fix, if [`fits`] is `False` for the model, the `part`."""
    if not fits(config, prompt_length, output_length):
        shared = f", together {prompt_length + output_length}" if _share_positions(config) else ""
        raise ValueError(
            f"The prompt has {prompt_length} tokens and the output up to {output_length}{shared}, but the {part} has "
            f"{max_positions(config)} positions for {'both' if shared else 'each'}. Shorten the prompt "
            "(`prompt_max_length` of the processor) or the output (`max_new_tokens`, `target_max_length`), or use "
            f"an {part} with more positions."
        )


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _as_config(config: PreTrainedConfig | dict | None, name: str, default: type[PreTrainedConfig]) -> PreTrainedConfig:
    if config is None:
        return default()
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config)  # a model writes into its config, and the caller may use theirs for another one
    if not isinstance(config, dict):
        raise TypeError(f"`{name}` must be a config object, a dict or None, not {type(config).__name__}.")
    if config.get("model_type") is None:
        raise ValueError(f'`{name}` is a dict without "model_type". Add it, for instance "model_type": "t5".')
    return AutoConfig.for_model(**config)


__all__ = ["LLM2SLMConfig"]
