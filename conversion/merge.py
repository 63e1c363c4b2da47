"""Merge a LoRA adapter into the LLM-to-SLM checkpoint that it adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modeling_llm2slm.data.parsing import read_json
from modeling_llm2slm.inference.model import LLM2SLMForConditionalGeneration
from modeling_llm2slm.states.loading import load_model, one_sentence

from .output import composite_config, converts, copy_processor, output_folder, size_of
from .report import Report, composite_logits


@converts
def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    include_llm: bool = True,
    overwrite: bool = False,
) -> Report:
    """
    Add the weights of an adapter to those of its base.

    Args:
        adapter: The folder that peft saved the adapter to, or its name on the Hub.
        output: The folder to write to.
        base: Folder of the LLM-to-SLM checkpoint, or its name on the Hub (default: the one that the adapter names).
        include_llm: Whether the result contains the LLM, or only records where it is (a lean checkpoint).
        overwrite: Replace an existing folder.

    Raises:
        OSError: If something cannot be read or written, or the adapter belongs to another model.
        ValueError: If the outputs of the result differ from those of base and adapter.
    """
    from peft import PeftConfig, PeftModel

    if Path(adapter).is_dir() and not Path(adapter, "adapter_model.safetensors").is_file():
        raise OSError(f"{adapter} has no adapter_model.safetensors; pickled weights are not read.")
    with one_sentence(adapter):
        place = base if base is not None else PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not place:
        raise ValueError(f"{adapter} does not name the checkpoint that it adapts: name it with --base.")
    composite_config(place)
    model = load_model(LLM2SLMForConditionalGeneration, place)
    source = model.config.llm_source
    with one_sentence(adapter):
        adapted: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
    report = Report(f"{adapter} is merged into {place} as {output}")
    expected = composite_logits(adapted)
    with one_sentence(adapter):
        merged = adapted.merge_and_unload(safe_merge=True)
    merged.config.llm_source = source
    with output_folder(
        output, (adapter, place), size_of(merged.state_dict()), None if include_llm else source
    ) as folder:
        merged.save_pretrained(folder, include_llm, card={"name": Path(output).name})
        copy_processor(place, folder, report)
        written = load_model(LLM2SLMForConditionalGeneration, folder)
        tolerance = 0.05 if merged.dtype.itemsize < 4 else 1e-3  # a different order of sums; bfloat16 keeps 8 bits
        report.compare("outputs", (composite_logits(written), expected), tolerance)
        report.add("adapter", _describe(Path(adapter)))
    return report


def _describe(adapter: Path) -> str:
    file = adapter / "adapter_config.json"
    config = read_json(file) if file.is_file() else {}
    return f"{config.get('peft_type', 'an adapter')}, rank {config.get('r', 'unknown')}"
