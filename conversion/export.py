"""Write an LLM-to-SLM or decoder-only model in the format of an engine that generates faster than PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from modeling_llm2slm.configuration_llm2slm import LLM2SLMConfig
from modeling_llm2slm.data.resources import check_disk_space
from modeling_llm2slm.files_llm2slm import first_line, open_weights, shape_of, weight_files
from modeling_llm2slm.inference.engine import exporting_engine
from modeling_llm2slm.inference.model import LLM2SLMForConditionalGeneration
from modeling_llm2slm.states.fingerprints import checkpoint_folder
from modeling_llm2slm.states.loading import load, load_model, with_article

from .output import converts, copy_processor, output_folder, size_of
from .parts import load_plain, tokenizer_of
from .report import Report, probe


@converts
def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    engine: str = "openvino",
    weights: str = "fp32",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """
    Export a model, and compare the result with PyTorch before it is put in place.

    Args:
        checkpoint: Folder of an LLM-to-SLM model or of a decoder-only one, such as its LLM; or a name on the Hub.
        output: The folder to write to. It holds all that `TextToText.from_pretrained` needs.
        engine: The engine that computes the exported model: `"openvino"`, `"onnx"`, `"inductor"`, `"llamacpp"` or
            another.
        weights: The format of the weights: `"fp32"`; `"bf16"` (OpenVINO only; computed in bfloat16); `"int8"` (one
            scale per row); `"int4"` (the model that writes in groups of 128, the LLM of an LLM-to-SLM model in int8).
        overwrite: Replace an existing folder.
        progress: Called with a few words at every step.

    Raises:
        ImportError: If the engine is not installed.
        OSError: If something cannot be read or written.
        ValueError: If the engine or its weights do not exist, the model is of another kind, or the result's logits
            differ from the checkpoint's.
    """
    target = exporting_engine(engine)
    target.check_export(weights)
    config, stored = _config_of(checkpoint), target.weights[weights]
    table = config.vocab_size * _width(config) * 4  # the embeddings are also a file of their own
    check_disk_space(output, int(_parameters_in(checkpoint) * stored.bytes) + table)
    progress("loading")
    model = _load(checkpoint, config)
    model.float().eval()  # an LLM with a dtype of its own keeps that when it is loaded
    state = model.state_dict()
    texts = probe(getattr(config, "encoder", config).vocab_size), probe(config.vocab_size)
    expected = _logits(model, *texts)
    report = Report(f"{checkpoint} becomes {output} for {engine}, weights in {weights}")
    with output_folder(output, (checkpoint,), int(size_of(state) / 4 * stored.bytes) + table) as folder:
        folder.mkdir()
        try:
            written = target.export(model, folder, weights, progress)
        except RuntimeError as error:  # of an engine; only some of them say that the disk is full
            raise OSError(
                f"{output} could not be written by {engine}; its disk may be full, or that of temporary files "
                f"({first_line(error)}). Free disk space, or choose another disk."
            ) from error
        _copy_tokenizers(checkpoint, config, folder, report)
        progress("comparing")
        with torch.no_grad():
            found = target.output_logits(written, *texts)
        report.compare("outputs", (found, expected), stored.tolerance)
        report.add("bytes", sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    return report


def _config_of(checkpoint: str | Path) -> Any:
    """Return the config of an LLM-to-SLM or decoder-only model; any other raises `ValueError`."""
    config = load(AutoConfig, checkpoint)
    if isinstance(config, LLM2SLMConfig):
        return config
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{checkpoint} is {with_article(config.model_type)} model, not an LLM-to-SLM checkpoint or a decoder-only "
            "model, which can be exported."
        )
    return config


def _width(config: Any) -> int:
    return config.prompt_size if isinstance(config, LLM2SLMConfig) else config.hidden_size


def _load(checkpoint: str | Path, config: Any) -> Any:
    if isinstance(config, LLM2SLMConfig):
        return load_model(LLM2SLMForConditionalGeneration, checkpoint, dtype=torch.float32)
    return load_plain(checkpoint)


@torch.no_grad()
def _logits(model: Any, prompt: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return the logits `(1, M, vocabulary)` that follow each token of an output."""
    if isinstance(model, LLM2SLMForConditionalGeneration):
        return model(input_ids=prompt, decoder_input_ids=output).logits
    return model(torch.cat([prompt, output], dim=1)).logits[:, prompt.shape[1] :]


def _copy_tokenizers(checkpoint: str | Path, config: Any, folder: Path, report: Report) -> None:
    if isinstance(config, LLM2SLMConfig):
        copy_processor(checkpoint, folder, report)
        return
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    report.add("tokenizer", "none in the source" if tokenizer is None else "copied")


def _parameters_in(checkpoint: str | Path) -> int:
    """Return the number of parameters in the files of a checkpoint; those of a lean one are without the LLM's."""
    weights = open_weights(weight_files(checkpoint_folder(checkpoint), on_hub=False))
    return sum(math.prod(shape_of(tensor)) for tensor in weights.values())
