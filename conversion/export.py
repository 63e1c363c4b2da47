"""Write an LLM-to-SLM model in the format of an engine that generates faster than PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_llm2slm.data.resources import check_disk_space
from modeling_llm2slm.files_llm2slm import first_line, open_weights, shape_of, weight_files
from modeling_llm2slm.inference.engine import exporting_engine
from modeling_llm2slm.inference.model import LLM2SLMForConditionalGeneration
from modeling_llm2slm.states.fingerprints import checkpoint_folder
from modeling_llm2slm.states.loading import load_model

from .output import composite_config, converts, copy_processor, output_folder, size_of
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
    Export an LLM-to-SLM model, and compare the result with PyTorch before it is put in place.

    Args:
        checkpoint: Folder of the model, or its name on the Hub.
        output: The folder to write to. It holds all that `TextToText.from_pretrained` needs.
        engine: The engine that computes the exported model: `"openvino"`, `"onnx"`, `"inductor"` or another.
        weights: The format of the weights: `"fp32"`; `"bf16"` (OpenVINO only; computed in bfloat16); `"int8"` (one
            scale per row); `"int4"` (the SLM in groups of 128, the rest in int8).
        overwrite: Replace an existing folder.
        progress: Called with a few words at every step.

    Raises:
        ImportError: If the engine is not installed.
        OSError: If something cannot be read or written.
        ValueError: If the engine or its weights do not exist, or the result's logits differ from the checkpoint's.
    """
    target = exporting_engine(engine)
    target.check_export(weights)
    config, stored = composite_config(checkpoint), target.weights[weights]
    table = config.vocab_size * config.prompt_size * 4  # the embeddings are also a file of their own
    check_disk_space(output, int(_parameters_in(checkpoint) * stored.bytes) + table)
    progress("loading")
    model = load_model(LLM2SLMForConditionalGeneration, checkpoint, dtype=torch.float32)
    model.float().eval()  # an LLM with a dtype of its own keeps that when it is loaded
    state = model.state_dict()
    texts = probe(model.config.encoder.vocab_size), probe(model.config.vocab_size)
    with torch.no_grad():
        expected = model(input_ids=texts[0], decoder_input_ids=texts[1]).logits
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
        copy_processor(checkpoint, folder, report)
        progress("comparing")
        with torch.no_grad():
            found = target.output_logits(written, *texts)
        report.compare("outputs", (found, expected), stored.tolerance)
        report.add("bytes", sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    return report


def _parameters_in(checkpoint: str | Path) -> int:
    """Return the number of parameters in the files of a checkpoint; those of a lean one are without the LLM's."""
    weights = open_weights(weight_files(checkpoint_folder(checkpoint), on_hub=False))
    return sum(math.prod(shape_of(tensor)) for tensor in weights.values())
