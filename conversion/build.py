"""Building a checkpoint to train: from pretrained parts, from configs with random weights, or from a mix of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from modeling_llm2slm.inference.text_to_text import DecoderOnlyTextToText, EncoderDecoderTextToText, TextToText, load


if TYPE_CHECKING:
    from modeling_llm2slm.configuration_llm2slm import LLM2SLMConfig


def build(
    llm: str | None = None,
    slm: str | None = None,
    llm_tokenizer: str | None = None,
    slm_tokenizer: str | None = None,
    *,
    preset: str | None = None,
    prompt_max_length: int | None = None,
    target_max_length: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> TextToText:
    """
    Builds an LLM-to-SLM composite of two models, or a model to train alone where only one is given.

    A model is a folder or a name on the Hub, whose weights are loaded, or a config file (`.json`), which gets random
    weights and the special tokens of its tokenizer.

    Args:
        llm: The model that reads; without an `slm` it is an encoder-decoder of its own (a T5).
        slm: The model that writes; without an `llm` it is a decoder-only model of its own (a GPT-2).
        llm_tokenizer: Its tokenizer, a folder or a name on the Hub (default: the one that comes with the model).
        slm_tokenizer: The same for the SLM (default: as above, and `llm_tokenizer` for a config file).
        preset: In place of both models, the name of a preset of a composite, or the path to one: random weights.
        prompt_max_length: The composite's processor cuts prompts to this many tokens (default: never).
        target_max_length: The same for answers.
        max_new_tokens: The longest answer where `generate()` is told no other (default: what the SLM brings).
        seed: For the weights that are random.
        kwargs: Arguments of [`LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained`] (of a composite only).

    Raises:
        ValueError: If nothing is given to build from, or parts do not fit together.
        OSError: If a model or a tokenizer is not there, or cannot be loaded.
    """
    set_seed(seed)
    lengths = prompt_max_length, target_max_length
    built: TextToText
    for source in filter(None, (llm, slm, preset)):
        if _is_config(source) and not Path(source).is_file():
            raise FileNotFoundError(f"There is no config file {source}.")
    if preset is not None:
        if llm or slm:
            raise ValueError("A preset names both models: give either a preset or an LLM and an SLM.")
        built = _build_preset(preset, llm_tokenizer, slm_tokenizer, lengths, kwargs)
    elif llm and slm:
        built = _build_composite(llm, slm, llm_tokenizer, slm_tokenizer, lengths, kwargs)
    elif kwargs:
        raise ValueError(f"Only a composite of an LLM and an SLM has {', '.join(kwargs)}.")
    elif llm:
        built = EncoderDecoderTextToText(*_part(AutoModelForSeq2SeqLM, llm, _tokenizer(llm, llm_tokenizer, "LLM")))
    elif slm:
        built = DecoderOnlyTextToText(*_part(AutoModelForCausalLM, slm, _tokenizer(slm, slm_tokenizer, "SLM")))
    else:
        raise ValueError("There is nothing to build from: name an LLM, an SLM, both, or a preset.")
    if max_new_tokens is not None:
        built.model.generation_config.max_new_tokens = max_new_tokens
    return built


def _build_composite(
    llm: str,
    slm: str,
    llm_tokenizer: str | None,
    slm_tokenizer: str | None,
    lengths: tuple[int | None, int | None],
    kwargs: dict[str, Any],
) -> TextToText:
    from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
    from modeling_llm2slm.inference.factory import are_same_tokenizer

    reader = _tokenizer(llm, llm_tokenizer, "LLM")
    writer = _tokenizer(slm, slm_tokenizer or (llm_tokenizer if _is_config(slm) else None), "SLM", fallback=llm)
    parts: dict[str, Any] = {}
    if _is_config(llm):
        parts["encoder_model"], _ = _part(AutoModelForTextEncoding, llm, reader)
    if _is_config(slm):
        encoder_decoder = load(AutoConfig, slm).is_encoder_decoder
        parts["decoder_model"], _ = _part(
            AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM, slm, writer
        )
    options = {"shared_tokenizer": are_same_tokenizer(reader, writer), **parts, **kwargs}
    paths = (None if _is_config(llm) else llm, None if _is_config(slm) else slm)
    try:
        model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(*paths, **options)
    except (AttributeError, SafetensorError) as error:  # no such dtype; a damaged file
        raise OSError(f"{llm} and {slm} cannot be put together: {str(error).splitlines()[0]}") from error
    return EncoderDecoderTextToText(model, LLM2SLMProcessor(reader, writer, *lengths))


def _build_preset(
    preset: str,
    llm_tokenizer: str | None,
    slm_tokenizer: str | None,
    lengths: tuple[int | None, int | None],
    kwargs: dict[str, Any],
) -> TextToText:
    from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
    from modeling_llm2slm.inference.factory import are_same_tokenizer

    file = preset if _is_config(preset) else _preset_file(preset)
    reader = _tokenizer(file, llm_tokenizer, "LLM")
    writer = _tokenizer(file, slm_tokenizer or llm_tokenizer, "SLM")
    config = load(LLM2SLMConfig, file, shared_tokenizer=are_same_tokenizer(reader, writer), **kwargs)
    _check_vocabulary(preset, config.encoder, reader)
    _check_vocabulary(preset, config.decoder, writer)
    processor = LLM2SLMProcessor(reader, writer, *lengths)
    return EncoderDecoderTextToText(LLM2SLMForConditionalGeneration(config).eval(), processor)


def preset_config(preset: str) -> LLM2SLMConfig:
    """The config of a preset, by its name or the path to one; `ValueError` if there is none of that name."""
    from modeling_llm2slm import LLM2SLMConfig

    return load(LLM2SLMConfig, preset if _is_config(preset) else _preset_file(preset))


def _preset_file(name: str) -> str:
    from importlib.resources import files

    folder = Path(str(files("modeling_llm2slm.configuration")))
    if not (folder / f"{name}.json").is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise ValueError(f"There is no preset {name!r}; there are {names}.")
    return str(folder / f"{name}.json")


def _is_config(source: str) -> bool:
    return source.endswith(".json")


def _tokenizer(model: str, tokenizer: str | None, part: str, fallback: str | None = None) -> PreTrainedTokenizerBase:
    if tokenizer is None and _is_config(model):
        tokenizer = fallback if fallback is not None and not _is_config(fallback) else None
        if tokenizer is None:
            raise ValueError(f"{model} is a config, which brings no tokenizer: name one for the {part}.")
    return load(AutoTokenizer, tokenizer or model)


def _part(
    auto_class: Any, source: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with the weights of a checkpoint, or with random ones where `source` is a config file."""
    config = part_config(source, tokenizer)
    if type(config) not in auto_class._model_mapping:
        raise ValueError(f"{source} is a {config.model_type} model, which cannot take this part.")
    if not _is_config(source):
        return load(auto_class, source, dtype="auto"), tokenizer
    return auto_class.from_config(config).eval(), tokenizer


def part_config(source: str, tokenizer: PreTrainedTokenizerBase | str) -> PreTrainedConfig:
    """The config of a model; of a config file, with the special tokens of a tokenizer, or of where one is."""
    config = load(AutoConfig, source)
    if not _is_config(source):
        return config
    if isinstance(tokenizer, str):
        tokenizer = load(AutoTokenizer, tokenizer)
    _check_vocabulary(source, config, tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder and tokenizer.bos_token_id is None:
        config.decoder_start_token_id = tokenizer.pad_token_id  # as in T5
    return config


def _check_vocabulary(source: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"{source}: the {config.model_type} config has a vocabulary of {config.vocab_size}, but the tokenizer has "
            f"{len(tokenizer)} tokens. Set vocab_size to that or more."
        )
