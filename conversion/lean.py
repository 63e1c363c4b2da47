"""Remove the LLM from a full checkpoint, or add it to a lean one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from modeling_llm2slm.files_llm2slm import WEIGHTS
from modeling_llm2slm.inference.factory import describe_source
from modeling_llm2slm.inference.model import LLM2SLMForConditionalGeneration
from modeling_llm2slm.states.loading import load, load_model

from .output import composite_config, converts, copy_processor, output_folder, size_of
from .report import Report, composite_logits


@converts
def lean(
    checkpoint: str | Path,
    output: str | Path,
    *,
    llm: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> Report:
    """
    Leave out the LLM, and record where it is.

    Args:
        checkpoint: Folder of a full checkpoint, or its name on the Hub.
        output: The folder to write to.
        llm: Folder of the LLM, or its name on the Hub (default: the one that the checkpoint names).
        revision: Revision of the LLM on the Hub (default: the newest one in the cache).
        overwrite: Replace an existing folder.
        max_shard_size: Maximum size of a weight file.

    Raises:
        OSError: If something cannot be read or written.
        ValueError: If the place of the LLM is unknown, or if `llm` is another model.
    """
    if llm is not None and Path(llm).is_file():
        raise ValueError(f"--llm {llm} is not a checkpoint folder.")
    model = _load_as(checkpoint, lean=False)
    if llm is not None:
        source = describe_source(str(llm), revision=revision)
        if source is None:
            raise ValueError(f"{llm} is neither a folder nor a name on the Hub.")
        load(AutoConfig, str(llm), revision=revision)  # a missing LLM raises an error that names it
        model.config.llm_source = source
    return _save(model, checkpoint, output, False, overwrite, max_shard_size)


@converts
def full(
    checkpoint: str | Path,
    output: str | Path,
    *,
    llm: str | Path | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> Report:
    """
    Add the LLM.

    Args:
        checkpoint: Folder of a lean checkpoint, or its name on the Hub.
        output: The folder to write to.
        llm: Folder of the LLM, or its name on the Hub (default: the one that the checkpoint names).
        overwrite: Replace an existing folder.
        max_shard_size: Maximum size of a weight file.

    Raises:
        OSError: If something cannot be read or written, or if the LLM is not the one of the checkpoint.
    """
    model = _load_as(checkpoint, lean=True, encoder_pretrained_model_name_or_path=llm)
    return _save(model, checkpoint, output, True, overwrite, max_shard_size)


def _load_as(checkpoint: str | Path, lean: bool, **kwargs: Any) -> LLM2SLMForConditionalGeneration:
    config = composite_config(checkpoint)
    if config.lean != lean:
        kind, other = ("lean", "full") if config.lean else ("full", "lean")
        raise ValueError(f"{checkpoint} is {kind} already. Use `{other}` to convert it the other way.")
    return load_model(LLM2SLMForConditionalGeneration, checkpoint, **kwargs)


def _save(
    model: Any,
    checkpoint: str | Path,
    output: str | Path,
    include_llm: bool,
    overwrite: bool,
    max_shard_size: int | str,
) -> Report:
    report = Report(f"{checkpoint} becomes {'full' if include_llm else 'lean'} in {output}")
    state = model.state_dict()
    left_out = {} if include_llm else model.encoder.llm.state_dict()
    named = None if include_llm else model.config.llm_source
    inputs = checkpoint, (model.config.llm_source or {}).get("name_or_path")
    with output_folder(output, inputs, size_of(state) - size_of(left_out), named) as folder:
        model.save_pretrained(folder, include_llm, max_shard_size=max_shard_size, card={"name": Path(output).name})
        copy_processor(checkpoint, folder, report)
        written = load_model(LLM2SLMForConditionalGeneration, folder)
        report.compare("outputs", (composite_logits(written), composite_logits(model)))
        files = list(folder.glob("*.safetensors"))
        report.add("bytes of weights", sum(file.stat().st_size for file in files))
        report.add("files of weights", len(files) if len(files) > 1 else WEIGHTS)
        report.add("the LLM", _location(model, folder, include_llm))
    return report


def _location(model: Any, folder: Path, include_llm: bool) -> str:
    if include_llm:
        return "in the checkpoint"
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))["llm_source"]
    known = f"fingerprint {written['fingerprint']}" if written.get("fingerprint") else "of unknown fingerprint"
    return f"in {model.config.llm_source['name_or_path']}, {known}"
