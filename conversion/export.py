"""Write an LLM-to-SLM model in the format of an engine that generates faster than PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modeling_llm2slm.engines.exported import ExportedLLM2SLM
from modeling_llm2slm.inference.engine import exporting_engine
from modeling_llm2slm.inference.model import LLM2SLMForConditionalGeneration
from modeling_llm2slm.states.loading import load_model

from .output import composite_config, copy_processor, output_folder, size_of
from .report import Report, check_finite, probe


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
    Export an LLM-to-SLM model, and compare the result with PyTorch before it is put in place.

    Args:
        checkpoint: Folder of the model, or its name on the Hub.
        output: The folder to write to. It holds all that `TextToText.from_pretrained` needs.
        engine: The engine that will compute it: `"openvino"`, `"onnx"`, or another one that exports.
        weights: How weights are stored: `"fp32"`; `"bf16"` (OpenVINO only; computed in bfloat16); `"int8"` (one scale
            per row); `"int4"` (the SLM in groups of 128, the rest in int8).
        overwrite: Replace an existing folder.
        progress: Called with a few words at every step.

    Raises:
        ImportError: If the engine is not installed.
        OSError: If something cannot be read or written.
        ValueError: If the engine or its weights do not exist, or the result's logits differ from the checkpoint's.
    """
    target = exporting_engine(engine)
    target.check_export(weights)
    composite_config(checkpoint)
    progress("loading")
    model = load_model(LLM2SLMForConditionalGeneration, checkpoint, dtype=torch.float32)
    model.float().eval()  # an LLM with a dtype of its own keeps that when it is loaded
    state = model.state_dict()
    check_finite(state)
    expected = output_logits(model)
    report = Report(f"{checkpoint} becomes {output} for {engine}, weights in {weights}")
    stored = target.weights[weights]
    with output_folder(output, overwrite, int(size_of(state) / 4 * stored.bytes)) as folder:
        folder.mkdir()
        written = target.export(model, folder, weights, progress)
        copy_processor(checkpoint, folder, report)
        progress("comparing")
        report.compare("outputs", (output_logits(written), expected), stored.tolerance)
        report.add("bytes", sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    return report


@torch.no_grad()
def output_logits(model: Any) -> torch.Tensor:
    """Return a model's logits `(1, M, vocabulary)` after each token of a fixed output for a fixed prompt."""
    config = model.config
    prompt, output = probe(config.encoder.vocab_size), probe(config.vocab_size)
    if not isinstance(model, ExportedLLM2SLM):
        return model(input_ids=prompt, decoder_input_ids=output).logits
    cache, logits = model.new_cache(), []  # it returns the logits of the last token only
    for token in output.split(1, dim=1):
        logits.append(model(input_ids=prompt, decoder_input_ids=token, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)
