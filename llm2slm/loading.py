"""What commands do before their work: quiet the libraries, load a model, claim the output, choose the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from modeling_llm2slm.inference.text_to_text import TextToText
    from modeling_llm2slm.settings import LoadSettings


def quiet_libraries(data: bool = False) -> None:
    """
    Keep the notes and progress bars of libraries away from the user.

    Args:
        data: Quiet `datasets` too; only commands that read data import it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if data:
        from datasets import disable_progress_bars

        disable_progress_bars()


@contextmanager
def claimed(output: Path | None, **options: Any) -> Iterator[None]:
    """Claim an output file, if there is one, before the work, see `modeling_llm2slm.data.output_paths`."""
    if output is None:
        yield
        return
    from modeling_llm2slm.data import output_paths

    with output_paths.claimed(output, **options):
        yield


def local_device(device: str) -> str:
    """Return the device of this process, where `torchrun` has started several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"{device}:{rank}" if rank is not None and device == "cuda" else device


def load_text_to_text(path: str, settings: LoadSettings | None = None, **options: Any) -> TextToText:
    """Load a model that generates text from text, without notes and progress bars of libraries."""
    quiet_libraries()
    from modeling_llm2slm.inference.text_to_text import TextToText

    if settings is not None:
        options |= {
            name: getattr(settings, name) for name in ("engine", "device", "quantize", "dtype", "allow_nonfinite")
        }
    return TextToText.from_pretrained(path, **options)
