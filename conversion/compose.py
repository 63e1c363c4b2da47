"""Compose a pretrained LLM and a pretrained SLM into one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, set_seed

from modeling_llm2slm.checkpoint_llm2slm import LLM_PREFIX
from modeling_llm2slm.inference.factory import REPOSITORY_ARGUMENTS, are_same_tokenizer
from modeling_llm2slm.inference.model import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.parts_llm2slm import llm_class, slm_class
from modeling_llm2slm.settings import BuildSettings
from modeling_llm2slm.states.loading import load, load_model, one_sentence

from .build import check_part, float_dtype, new_processor, with_overrides
from .output import output_folder, save_without_weights, write_weights
from .report import Report, probe, slm_logits


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def compose(
    llm: str | Path,
    slm: str | Path,
    output: str | Path,
    settings: BuildSettings = BuildSettings(),  # noqa: B008 - immutable
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
    **config: Any,
) -> Report:
    """
    Compose an LLM and an SLM into one checkpoint, with new fusion modules, without loading their weights into memory.

    Weights stay mapped from their files and are written shard by shard, so the LLM may be larger than the memory.

    Args:
        llm: Folder of the LLM, or its name on the Hub.
        slm: Folder of the SLM, or its name on the Hub.
        output: The folder to write to.
        settings:
            `max_shard_size` is also the memory that a change of dtype needs. The dtypes default to those of the parts;
            the projector gets the SLM's.
        overwrite: Replace an existing folder.
        progress: Called with a few words at every step.
        config:
            Fields of [`BuildSettings`], which override `settings`; other values of [`LLM2SLMConfig`]; other arguments
            of the two repositories, such as `encoder_subfolder`.

    Raises:
        OSError: If a part cannot be read, or if the output cannot be written.
        ValueError: If the parts do not fit together, or if the result differs from them.
    """
    settings, config = with_overrides(settings, config)
    dtypes = {part: float_dtype(f"{part}_dtype", config.pop(f"{part}_dtype", None)) for part in ("encoder", "decoder")}
    set_seed(settings.seed)
    report = Report(f"{llm} and {slm} become {output}")
    progress("loading")
    processor = _find_processor(str(llm), str(slm), settings, config)
    is_shared = isinstance(processor, LLM2SLMProcessor) and are_same_tokenizer(
        processor.tokenizer, processor.decoder_tokenizer
    )
    source = _put_together(str(llm), str(slm), {"shared_tokenizer": is_shared, **config})
    if settings.max_new_tokens is not None:
        source.generation_config.max_new_tokens = settings.max_new_tokens
    state = {name: tensor for name, tensor in source.state_dict().items() if name not in source.all_tied_weights_keys}
    cast = _changed_dtypes(state, dtypes)
    needed = sum(tensor.numel() * cast.get(name, tensor.dtype).itemsize for name, tensor in state.items())
    with output_folder(output, overwrite, needed) as folder:
        progress("writing")
        save_without_weights(source, folder, Path(output).name)
        _write_dtypes(source, dtypes, folder)
        report.add("files of weights", write_weights(folder, state, cast, settings.max_shard_size))
        report.add("bytes of weights", needed)
        _write_processor(processor, folder, report)
        progress("comparing")
        _verify(source, folder, cast, report)
    return report


def _find_processor(llm: str, slm: str, settings: BuildSettings, config: dict[str, Any]) -> LLM2SLMProcessor | str:
    """Return the processor of both tokenizers, or the reason why there is none."""
    tokenizers = []
    for path, named, part in ((llm, settings.llm_tokenizer, "encoder"), (slm, settings.slm_tokenizer, "decoder")):
        if named is not None:
            tokenizers.append(load(AutoTokenizer, named))
            continue
        hub = _hub(part, config)
        # transformers may load a tokenizer of special tokens alone from a folder without a vocabulary.
        place = Path(path) / (hub.get("subfolder") or "")
        if Path(path).is_dir() and not any((place / name).is_file() for name in VOCABULARIES):
            return f"none, as {place} has no tokenizer"
        try:
            tokenizers.append(load(AutoTokenizer, path, **hub))
        except OSError as error:
            return f"none, as a tokenizer is missing: {error}"
    reader, writer = tokenizers
    return new_processor(reader, writer, settings)


def _put_together(llm: str, slm: str, config: dict[str, Any]) -> LLM2SLMForConditionalGeneration:
    """Return the model of two checkpoints as they are, mapped from their files."""
    parts = {}
    for part, role, path, find_class in (("encoder", "LLM", llm, llm_class), ("decoder", "SLM", slm, slm_class)):
        hub = _hub(part, config)
        part_config = load(AutoConfig, path, **hub)
        with one_sentence(path):
            auto_class = find_class(part_config)
        check_part(auto_class, part_config, path, role)
        parts[f"{part}_model"] = load_model(auto_class, path, **hub)
    return LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(**parts, **config)


def _hub(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of one part's repository, without the prefix of the part."""
    return {key: config[f"{part}_{key}"] for key in REPOSITORY_ARGUMENTS if f"{part}_{key}" in config}


def _changed_dtypes(state: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype | None]) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor that does not keep its own."""
    changed = {}
    for name, tensor in state.items():
        dtype = dtypes["encoder" if name.startswith(LLM_PREFIX) else "decoder"]
        if dtype is not None and tensor.is_floating_point():
            changed[name] = dtype
    return changed


def _write_dtypes(source: Any, dtypes: dict[str, torch.dtype | None], folder: Path) -> None:
    """Write the config again with the dtypes of the weights, which may differ from those of `source`."""
    slm = dtypes["decoder"] or source.dtype
    llm = dtypes["encoder"] or source.encoder.llm.dtype
    config = AutoConfig.from_pretrained(folder)
    config.dtype = config.decoder.dtype = slm
    config.encoder.dtype = llm
    config.encoder_dtype = None if llm == slm else str(llm).removeprefix("torch.")
    config.architectures = [type(source).__name__]
    config.save_pretrained(folder)


def _write_processor(processor: LLM2SLMProcessor | str, folder: Path, report: Report) -> None:
    if isinstance(processor, str):
        report.add("processor", processor)
        return
    processor.save_pretrained(folder)
    report.add("processor", "of both tokenizers")


@torch.no_grad()
def _verify(source: Any, folder: Path, cast: dict[str, torch.dtype], report: Report) -> None:
    written, expected = load_model(LLM2SLMForConditionalGeneration, folder), source.state_dict()
    state = written.state_dict()
    for name in expected.keys() - source.all_tied_weights_keys.keys():
        if not torch.equal(state[name], expected[name].to(cast.get(name))):
            raise ValueError(f"{name} changed in the conversion; nothing was written.")
    report.add("weights compared", len(expected))
    tolerance = 0.05 if cast else 0.0  # bfloat16 keeps 8 bits, through dozens of layers
    prompt, output = probe(source.config.encoder.vocab_size), probe(source.config.vocab_size)
    hidden_states = [llm(input_ids=prompt).last_hidden_state for llm in (written.encoder.llm, source.encoder.llm)]
    report.compare("hidden states of the LLM", hidden_states, tolerance)
    logits = [slm_logits(slm, output) for slm in (written.decoder, source.decoder)]
    report.compare("logits of the SLM", logits, tolerance)
