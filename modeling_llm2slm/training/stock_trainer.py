"""Uploads by the stock `Trainer`, with the checks and the card of `model.push_to_hub`."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..checkpoint_llm2slm import is_local
from ..inference.model import LLM2SLMForConditionalGeneration
from ..inference.model_card import CardDetails, extend_card, has_file_by_hand, model_card
from ..inference.saving import adapter_of, check_source_is_public


logger = logging.get_logger(__name__)


def extend_trainer() -> None:
    """
    Extend the stock `Trainer`, which uploads the folder of `save_pretrained` itself and has no hook for it: an
    [`LLM2SLMForConditionalGeneration`] is uploaded as by its `push_to_hub`. Nothing changes for other models.
    """
    Trainer.init_hf_repo = _checked(Trainer.init_hf_repo)
    Trainer.create_model_card = _with_our_card(Trainer.create_model_card)


class UploadCodeAndCard(TrainerCallback):
    """Copies the code and the card of a checkpoint to the folder that the Trainer uploads during training."""

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint, folder = Path(args.output_dir, f"checkpoint-{state.global_step}"), Path(args.output_dir)
        card = [] if has_file_by_hand(folder / "README.md") else ["README.md"]
        for pattern in ("*.py", *card):
            for file in checkpoint.glob(pattern):
                shutil.copy(file, folder / file.name)


def _checked(init_hf_repo: Any) -> Any:
    @functools.wraps(init_hf_repo)
    def checked(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        model, adapter = _parts(trainer)
        if model is None:
            return init_hf_repo(trainer, *args, **kwargs)
        if not model.include_llm:
            check_source_is_public(model.config.llm_source or {})
        base = getattr(adapter, "base_model_name_or_path", None)
        if base and (is_local(base) or Path(base).is_dir()):
            logger.warning(f"The adapter names the folder {base} as its base, which nobody else has.")
        init_hf_repo(trainer, *args, **kwargs)
        model.uploaded = Path(trainer.args.output_dir).resolve(), trainer.hub_model_id
        trainer.add_callback(UploadCodeAndCard)
        return None

    return checked


def _with_our_card(create_model_card: Any) -> Any:
    @functools.wraps(create_model_card)
    def with_our_card(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        (model, adapter), file = _parts(trainer), Path(trainer.args.output_dir, "README.md")
        if model is None:
            return create_model_card(trainer, *args, **kwargs)
        if has_file_by_hand(file) or not trainer.is_world_process_zero():
            return None
        file.unlink(missing_ok=True)  # the Trainer calls a method of peft's models where a card names peft
        create_model_card(trainer, *args, **kwargs)
        name = trainer.hub_model_id or file.absolute().parent.name
        card = extend_card(model_card(model, name, CardDetails(adapter=adapter)), ModelCard.load(file))
        file.write_text(str(card), encoding="utf-8")
        return None

    return with_our_card


def _parts(trainer: Trainer) -> tuple[Any, Any]:
    """Return the model of a Trainer, `None` if it is not LLM-to-SLM, and the config of its adapter, if it has one."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, LLM2SLMForConditionalGeneration):
        return None, None
    return base, adapter_of(base) if base is model else model.active_peft_config
