"""A full checkpoint becomes a lean one, and a lean one a full one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.files_llm2slm import WEIGHTS
from modeling_llm2slm.inference.factory import describe_source
from modeling_llm2slm.inference.text_to_text import load, load_model

from .output import composite_config, copy_processor, output_folder, size_of
from .report import Report, check_finite, composite_logits


def lean(
    checkpoint: str | Path,
    output: str | Path,
    *,
    llm: str | Path | None = None,
    revision: str | None = None,
    force: bool = False,
    max_shard_size: int | str = "50GB",
) -> Report:
    """
    Leave out the LLM, and say where it is.

    Args:
        checkpoint: Folder or repository of a full checkpoint.
        output: The folder to write to.
        llm: Folder or repository of the LLM (default: what the checkpoint says).
        revision: The revision of that repository (default: the newest the cache has).
        force: Replace what is there.
        max_shard_size: The size of a shard.

    Raises:
        OSError: If something cannot be read or written.
        ValueError: If it is not known where the LLM is, or `llm` is another model.
    """
    model = _load_as(checkpoint, lean=False)
    if llm is not None:
        source = describe_source(str(llm), revision=revision)
        if source is None:
            raise ValueError(f"{llm} is neither a folder nor the id of a repository.")
        load(AutoConfig, str(llm), revision=revision)  # if it is not there, said in its own name
        model.config.llm_source = source
    return _save(model, checkpoint, output, False, force, max_shard_size)


def full(
    checkpoint: str | Path,
    output: str | Path,
    *,
    llm: str | Path | None = None,
    force: bool = False,
    max_shard_size: int | str = "50GB",
) -> Report:
    """
    Take in the LLM.

    Args:
        checkpoint: Folder or repository of a lean checkpoint.
        output: The folder to write to.
        llm: Folder or repository of the LLM (default: what the checkpoint says).
        force: Replace what is there.
        max_shard_size: The size of a shard.

    Raises:
        OSError: If something cannot be read or written, or the LLM is not the one of the checkpoint.
    """
    model = _load_as(checkpoint, lean=True, encoder_pretrained_model_name_or_path=llm)
    return _save(model, checkpoint, output, True, force, max_shard_size)


def _load_as(checkpoint: str | Path, lean: bool, **kwargs: Any) -> LLM2SLMForConditionalGeneration:
    config = composite_config(checkpoint)
    if config.lean != lean:
        kind, other = ("lean", "full") if config.lean else ("full", "lean")
        raise ValueError(f"{checkpoint} is {kind} already: there is nothing to make {kind}, only `{other}`.")
    return load_model(LLM2SLMForConditionalGeneration, checkpoint, **kwargs)


def _save(
    model: Any, checkpoint: str | Path, output: str | Path, include_llm: bool, force: bool, max_shard_size: int | str
) -> Report:
    report = Report(f"{checkpoint} becomes {'full' if include_llm else 'lean'} in {output}")
    state = model.state_dict()
    check_finite(state)
    left_out = {} if include_llm else model.encoder.llm.state_dict()
    named = None if include_llm else model.config.llm_source
    with output_folder(output, force, size_of(state) - size_of(left_out), named) as folder:
        model.save_pretrained(folder, include_llm, max_shard_size=max_shard_size, card={"name": Path(output).name})
        copy_processor(checkpoint, folder, report)
        written = load_model(LLM2SLMForConditionalGeneration, folder)
        report.compare("answers", (composite_logits(written), composite_logits(model)))
        files = list(folder.glob("*.safetensors"))
        report.add("bytes of weights", sum(file.stat().st_size for file in files))
        report.add("files of weights", len(files) if len(files) > 1 else WEIGHTS)
        report.add("the LLM", _place(model, include_llm))
    return report


def _place(model: Any, include_llm: bool) -> str:
    if include_llm:
        return "in the checkpoint"
    source = model.config.llm_source
    return f"in {source['name_or_path']}, fingerprint {source.get('fingerprint')}"
