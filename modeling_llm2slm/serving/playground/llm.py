"""Find and load the LLM that an LLM-to-SLM model is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from ...checkpoint_llm2slm import is_local
from ...files_llm2slm import first_line
from ...inference.text_to_text import TextToText
from ...states.loading import load


class ComparedLLM(NamedTuple):
    """
    The LLM of a comparison, or one sentence that says why there is none.

    Args:
        text_to_text: The whole LLM; `None` if there is none.
        reason: Why there is none.
    """

    text_to_text: TextToText | None = None
    reason: str = ""


def load_llm(text_to_text: TextToText, llm: str | None = None, device: Any = "cpu") -> ComparedLLM:
    """
    Load the whole LLM, decoder included, that an LLM-to-SLM model was built on.

    Args:
        text_to_text: The LLM-to-SLM model.
        llm: The LLM: a folder, or a name on the Hub. Default: the one that the checkpoint names.
        device: Where to put it. On a CPU it is loaded in float32, elsewhere in the dtype of the LLM in the model.

    Raises:
        OSError: If `llm` was given and cannot be loaded.
        ValueError: If `llm` was given and has no decoder, or if the model is not an LLM-to-SLM model.
    """
    if not text_to_text.is_llm2slm:
        raise ValueError("The playground needs an LLM-to-SLM model. Leave out --playground.")
    config = text_to_text.model.config
    try:
        name = llm or _named_llm(config)
        _check_decoder(name)
        dtype = None if str(device) == "cpu" else config.encoder_dtype
        return ComparedLLM(TextToText.from_pretrained(name, dtype=dtype, device=device))
    except (ImportError, OSError, ValueError) as error:
        if llm is not None:
            raise
        return ComparedLLM(reason=f"Only LLM-to-SLM is shown: {first_line(error)}")


def _named_llm(config: Any) -> str:
    source = config.llm_source or {}
    name = source.get("name_or_path") or ""
    if not name or name.startswith("."):
        raise ValueError("the checkpoint does not say where its LLM is. Name it with --llm.")
    subfolder = source.get("subfolder")
    if subfolder and not is_local(name):
        raise ValueError(f"its LLM is in the subfolder {subfolder} of {name}. Download it, and name it with --llm.")
    return str(Path(name, subfolder)) if subfolder else name


def _check_decoder(name: str) -> None:
    """Raise `ValueError` for an LLM that only encodes. Some of them load as a decoder, but generate nonsense."""
    config = load(AutoConfig, name)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    alone = any(architecture.endswith("EncoderModel") for architecture in config.architectures or ())
    if alone or (masked and not config.is_encoder_decoder):
        raise ValueError(f"the LLM {name} has no decoder, so it generates no text by itself.")
