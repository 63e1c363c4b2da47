"""Build a model to train: from pretrained parts, from configs with random weights, or from a mix of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from modeling_llm2slm.configuration_llm2slm import LLM2SLMConfig
from modeling_llm2slm.data.causes import no_file
from modeling_llm2slm.files_llm2slm import first_line
from modeling_llm2slm.inference.factory import are_same_tokenizer
from modeling_llm2slm.inference.families import (
    DecoderOnlyTextToText,
    EncoderDecoderTextToText,
    LLM2SLMTextToText,
)
from modeling_llm2slm.inference.model import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import BuildSettings
from modeling_llm2slm.states.loading import load, with_article


VOCABULARY_MULTIPLE = 128  # to which vocabularies are padded, at most
CONFIG_SETTINGS = ("fusion", "encoder_layer", "encoder_dtype", "decoder_dtype", "encoder_revision", "decoder_revision")


def build(
    llm: str | None = None,
    slm: str | None = None,
    settings: BuildSettings = BuildSettings(),  # noqa: B008 - immutable
    *,
    preset: str | None = None,
    **config: Any,
) -> TextToText:
    """
    Build an LLM-to-SLM model in memory, or a model to train alone if only one of `llm` and `slm` is given.

    A model is a folder or a name on the Hub, whose weights are loaded, or a config file (`.json`), which gives random
    weights and the special tokens of its tokenizer. [`compose`] puts two pretrained models together without loading
    them into memory.

    Args:
        llm: The LLM. Without an `slm`, it is an encoder-decoder model such as T5.
        slm: The SLM. Without an `llm`, it is a decoder-only model such as GPT-2.
        settings: Tokenizers, fusion, dtypes, lengths and the seed.
        preset: The name of a preset, or the path of one, in place of both models. It gives random weights.
        config: Fields of [`BuildSettings`], which override `settings`, and other arguments of
            [`LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained`].

    Raises:
        OSError: If a model or a tokenizer does not exist or cannot be loaded.
        ValueError: If nothing is named, or if the parts do not fit together.
    """
    settings, config = with_overrides(settings, config)
    set_seed(settings.seed)
    for source in filter(None, (llm, slm, preset)):
        if is_config(source) and not Path(source).is_file():
            raise no_file(source, "config file")
    if preset is not None:
        if llm or slm:
            raise ValueError("A preset names both models: give either a preset or an LLM and an SLM.")
        built: TextToText = _build_preset(preset, settings, config)
    elif llm and slm:
        built = _build_composite(llm, slm, settings, config)
    elif llm or slm:
        built = _build_alone(llm, slm, settings, config)
    else:
        raise ValueError("Nothing to build from: name an LLM, an SLM, both, or a preset.")
    if settings.max_new_tokens is not None:
        built.model.generation_config.max_new_tokens = settings.max_new_tokens
    return built


def with_overrides(settings: BuildSettings, config: dict[str, Any]) -> tuple[BuildSettings, dict[str, Any]]:
    """Return settings with those that `config` overrides, and the rest of `config` with the model's own settings."""
    names = {field.name for field in fields(BuildSettings)}
    settings = replace(settings, **{name: value for name, value in config.items() if name in names})
    for part in ("encoder", "decoder"):
        float_dtype(f"{part}_dtype", getattr(settings, f"{part}_dtype"))
    values = {name: getattr(settings, name) for name in CONFIG_SETTINGS}
    values["llm_first_token"] = False if settings.slm_first_token else None
    rest = {name: value for name, value in config.items() if name not in names}
    return settings, {**{name: value for name, value in values.items() if value is not None}, **rest}


def float_dtype(name: str, value: str | None) -> torch.dtype | None:
    """Return the dtype that a setting names, or `None` if it is not set; raise `ValueError` unless it is a float."""
    dtype = None if value is None else getattr(torch, value, None)
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`{name}` is {value!r}, but it must be a float such as bfloat16 or float32.")
    return dtype


def is_config(source: str) -> bool:
    """Whether a model is named by its config file, which gives random weights."""
    return source.endswith(".json")


def _build_alone(llm: str | None, slm: str | None, settings: BuildSettings, config: dict[str, Any]) -> TextToText:
    if config:
        raise ValueError(f"{', '.join(config)} needs both an LLM and an SLM.")
    if llm:
        tokenizer = load_tokenizer(llm, settings.llm_tokenizer, "LLM")
        return EncoderDecoderTextToText(_load_or_create(AutoModelForSeq2SeqLM, llm, tokenizer, "LLM"), tokenizer)
    assert slm
    tokenizer = load_tokenizer(slm, settings.slm_tokenizer, "SLM")
    return DecoderOnlyTextToText(_load_or_create(AutoModelForCausalLM, slm, tokenizer, "SLM"), tokenizer)


def _build_composite(llm: str, slm: str, settings: BuildSettings, config: dict[str, Any]) -> TextToText:
    default = settings.llm_tokenizer if is_config(slm) else None
    reader = load_tokenizer(llm, settings.llm_tokenizer, "LLM")
    writer = load_tokenizer(slm, settings.slm_tokenizer or default, "SLM", fallback=llm)
    parts: dict[str, Any] = {}
    if is_config(llm):
        parts["encoder_model"] = _load_or_create(AutoModelForTextEncoding, llm, reader, "LLM")
    if is_config(slm):
        is_encoder_decoder = load(AutoConfig, slm).is_encoder_decoder
        auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        parts["decoder_model"] = _load_or_create(auto_class, slm, writer, "SLM")
    options = {"shared_tokenizer": are_same_tokenizer(reader, writer), **parts, **config}
    paths = (None if is_config(llm) else llm, None if is_config(slm) else slm)
    try:
        model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(*paths, **options)
    except SafetensorError as error:  # a damaged file
        raise OSError(f"{llm} and {slm} cannot be put together: {first_line(error)}") from error
    return LLM2SLMTextToText(model, new_processor(reader, writer, settings))


def _build_preset(preset: str, settings: BuildSettings, config: dict[str, Any]) -> TextToText:
    file = _preset_file(preset)
    reader = load_tokenizer(file, settings.llm_tokenizer, "LLM")
    writer = load_tokenizer(file, settings.slm_tokenizer or settings.llm_tokenizer, "SLM")
    for name in ("encoder_revision", "decoder_revision"):
        if name in config:
            raise ValueError(f"A preset has random weights and no {name}: leave it out.")
    composite = load(LLM2SLMConfig, file, shared_tokenizer=are_same_tokenizer(reader, writer), **config)
    written = PreTrainedConfig.get_config_dict(file)[0]
    for part, tokenizer in (("encoder", reader), ("decoder", writer)):
        config_of_part = getattr(composite, part)
        is_open = _leaves_vocabulary_open(written.get(part) or {}, config_of_part, tokenizer)
        _check_vocabulary(preset, config_of_part, tokenizer, is_open)
    model = LLM2SLMForConditionalGeneration(composite).eval()
    return LLM2SLMTextToText(model, new_processor(reader, writer, settings))


def new_processor(
    reader: PreTrainedTokenizerBase, writer: PreTrainedTokenizerBase, settings: BuildSettings
) -> LLM2SLMProcessor:
    """Return the processor of the LLM's tokenizer and the SLM's, with the lengths of the settings."""
    return LLM2SLMProcessor(reader, writer, settings.prompt_max_length, settings.target_max_length)


def preset_config(preset: str) -> LLM2SLMConfig:
    """Return the config of a preset, by its name or its path; an unknown name raises `ValueError`."""
    return load(LLM2SLMConfig, _preset_file(preset))


def _preset_file(preset: str) -> str:
    if is_config(preset):
        _check_preset(Path(preset))
        return preset
    folder = Path(str(files("modeling_llm2slm.configuration")))
    if not (folder / f"{preset}.json").is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise ValueError(f"There is no preset {preset!r}; there are {names}.")
    return str(folder / f"{preset}.json")


def _check_preset(file: Path) -> None:
    """Raise an error if a config file does not exist, or is not that of an LLM-to-SLM model."""
    if not file.is_file():
        raise no_file(file, "config file")
    kind = PreTrainedConfig.get_config_dict(file)[0].get("model_type")
    if kind != LLM2SLMConfig.model_type:
        raise ValueError(
            f"{file} is a {kind} config, but --preset needs an llm2slm config, such as configuration/tiny.json."
        )


def load_tokenizer(
    model: str, tokenizer: str | None, part: str, fallback: str | None = None
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a part.

    Args:
        model: The part, whose own tokenizer is loaded by default. A config file has none.
        tokenizer: A folder or a name on the Hub, in place of the part's own.
        part: `"LLM"` or `"SLM"`, for the error that names the option.
        fallback: The model whose tokenizer a config file gets.
    """
    if tokenizer is None and is_config(model):
        tokenizer = fallback if fallback is not None and not is_config(fallback) else None
        if tokenizer is None:
            raise ValueError(f"{model} is a config without a tokenizer: add --{part.lower()}-tokenizer.")
    return load(AutoTokenizer, tokenizer or model)


def _load_or_create(auto_class: Any, source: str, tokenizer: PreTrainedTokenizerBase, part: str) -> PreTrainedModel:
    config = part_config(source, tokenizer)
    check_part(auto_class, config, source, part)
    if is_config(source):
        return auto_class.from_config(config).eval()
    return load(auto_class, source, dtype="auto")


def check_part(auto_class: Any, config: PreTrainedConfig, source: str, part: str) -> None:
    """Raise `ValueError` if a model of this kind cannot be the LLM or the SLM."""
    if type(config) not in auto_class._model_mapping or isinstance(config, LLM2SLMConfig):
        raise ValueError(f"{source}: {with_article(config.model_type)} model cannot be the {part}.")


def part_config(source: str, tokenizer: PreTrainedTokenizerBase | str) -> PreTrainedConfig:
    """Return the config of a part; a config file gets the special tokens of the tokenizer (or of the one named)."""
    config = load(AutoConfig, source)
    if not is_config(source):
        return config
    if isinstance(tokenizer, str):
        tokenizer = load(AutoTokenizer, tokenizer)
    if _leaves_vocabulary_open(PreTrainedConfig.get_config_dict(source)[0], config, tokenizer):
        config.vocab_size = len(tokenizer)
    _check_vocabulary(source, config, tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder and tokenizer.bos_token_id is None:
        config.decoder_start_token_id = tokenizer.pad_token_id  # as in T5
    return config


def _leaves_vocabulary_open(
    written: Mapping[str, Any], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """
    Whether a config file has no `vocab_size`, and the default of its family is not that of the tokenizer. It may be
    padded up to a multiple of 128, as T5's is.
    """
    return "vocab_size" not in written and not 0 <= config.vocab_size - len(tokenizer) < VOCABULARY_MULTIPLE


def _check_vocabulary(
    source: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, is_open: bool = False
) -> None:
    if is_open or config.vocab_size < len(tokenizer):
        default = " the default of its family," if is_open else ""
        raise ValueError(
            f"{source}: the {config.model_type} config has a vocabulary of {config.vocab_size},{default} but the "
            f"tokenizer has {len(tokenizer)} tokens. Set vocab_size to that or more."
        )
