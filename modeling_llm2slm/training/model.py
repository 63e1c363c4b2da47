"""The model of a training: loaded as it trains, and turned back into one plain checkpoint when it has trained."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainer

from ..engines.quantization import check_quantizer, quantize_llm
from ..inference.factory import describe_source
from ..inference.saving import lean_source
from ..inference.text_to_text import TextToText
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..settings import shown
from ..states.store import StateStore
from ..states.without_llm import with_llm
from .adapters import lora_config
from .recipe import Recipe, cause_of


def load_to_train(recipe: Recipe) -> TextToText:
    """
    Load the checkpoint that a recipe starts from, as it trains: without its LLM (`llm_states`), with a quantized LLM,
    with an adapter, or as it is.

    Raises:
        ValueError: If `lora` or `quantize_llm` is set for a model that is not LLM-to-SLM, or `lora` has an unknown
            field.
    """
    if recipe.quantize_llm:
        check_quantizer(recipe.quantize_llm)
    text_to_text = TextToText.from_pretrained(
        recipe.model,
        prompt_max_length=recipe.prompt_max_length,
        target_max_length=recipe.target_max_length,
        states=StateStore(recipe.llm_states) if recipe.llm_states else None,
        keep_llm_dtype=True,
    )
    model = text_to_text.model
    if not isinstance(model, LLM2SLMForConditionalGeneration):
        if recipe.lora is not None or recipe.quantize_llm:
            raise ValueError(f"{recipe.model} is not an LLM-to-SLM model: lora and quantize_llm need one.")
        return text_to_text
    if not recipe.llm_states:
        refer_to_llm(model, recipe)  # before quantization and adapters change the model
    if recipe.quantize_llm:
        quantize_llm(model, recipe.quantize_llm)
    if recipe.lora is not None:
        text_to_text.model = _with_adapter(model, recipe.lora)
    return text_to_text


def _with_adapter(model: LLM2SLMForConditionalGeneration, options: dict[str, Any]) -> Any:
    from peft import get_peft_model

    try:
        config = lora_config(model, **options)
    except TypeError as error:
        raise ValueError(f"lora has a field that peft's LoraConfig does not know: {error}.") from error
    except (re.error, OverflowError) as error:
        raise ValueError(
            f"lora is {shown(options)}, with a pattern that is no regular expression: {error}."
        ) from error
    try:
        return get_peft_model(model, config)
    except ValueError:
        raise
    except Exception as error:  # each option raises its own exceptions
        raise ValueError(f"lora is {shown(options)}, which peft refuses: {cause_of(error)}.") from error


def refer_to_llm(model: LLM2SLMForConditionalGeneration, recipe: Recipe) -> None:
    """
    Set whether the Trainer saves the LLM with its checkpoints, and where a lean checkpoint finds it.

    Raises:
        ValueError: If a lean checkpoint cannot refer to this LLM, before any training.
    """
    if not recipe.quantize_llm and recipe.lora is None:  # otherwise the Trainer's checkpoints never hold the LLM
        model.include_llm = recipe.include_llm_in_checkpoints or not model.config.freeze_llm
    model.config.llm_source = source_of_llm(model, recipe)
    if not (model.include_llm and recipe.include_llm):
        lean_source(model)


def source_of_llm(model: Any, recipe: Recipe) -> dict[str, Any] | None:
    """Return where the LLM is: as the model's config says, or, if that folder is gone, in the recipe's `model`."""
    name = (model.config.llm_source or {}).get("name_or_path")
    is_gone = not name or (os.path.isabs(name) and not os.path.isdir(name))
    return describe_source(recipe.model) if is_gone else model.config.llm_source


def gather_sharded(trainer: Seq2SeqTrainer, recipe: Recipe) -> TextToText | None:
    """Return a whole model with the weights of a sharded one, on the first process; every process must call this."""
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    gathered = load_to_train(recipe)
    gathered.model.load_state_dict(state)
    return gathered


def merge_and_restore(recipe: Recipe, text_to_text: TextToText, folder: Path) -> TextToText:
    """
    Turn a trained model into a plain one: save its adapter to `folder` and merge it in, and put the original LLM back
    where `llm_states` or `quantize_llm` replaced it.
    """
    model = text_to_text.model
    if recipe.lora is not None:
        model.save_pretrained(folder / "adapter")
        model = model.merge_and_unload()
    if recipe.llm_states or recipe.quantize_llm:
        model = with_llm(model, recipe.model, dtype=model.dtype, encoder_dtype=model.config.encoder_dtype)
    text_to_text.model = model
    return text_to_text
