"""Two checkpoints become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.checkpoint_llm2slm import LLM_PREFIX
from modeling_llm2slm.files_llm2slm import first_line
from modeling_llm2slm.inference.factory import have_same_tokenizer
from modeling_llm2slm.inference.text_to_text import load, load_model, one_sentence
from modeling_llm2slm.parts_llm2slm import llm_class, slm_class

from .output import output_folder, save_without_weights, write_weights
from .report import Report, check_finite, probe, slm_logits


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
HUB_ARGUMENTS = ("revision", "subfolder", "cache_dir", "token", "local_files_only")


def compose(
    llm: str | Path,
    slm: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    max_shard_size: int | str = "1GB",
    encoder_dtype: str | None = None,
    decoder_dtype: str | None = None,
    **kwargs: Any,
) -> Report:
    """
    Put an LLM and an SLM together without ever holding either in memory: a new projector, and all weights as they are.

    Weights stay mapped from their files and are written shard by shard, so that an LLM larger than the memory will do.

    Args:
        llm: Folder or repository of the LLM.
        slm: Folder or repository of the SLM.
        output: The folder to write to.
        force: Replace what is there.
        max_shard_size: The size of a shard, and of the memory needed where a dtype changes.
        encoder_dtype: The dtype to write the LLM in, such as `"bfloat16"` (default: its own).
        decoder_dtype: The dtype to write projector and SLM in (default: the SLM's own).
        kwargs:
            `fusion`, `encoder_layer` and other values of [`LLM2SLMConfig`]; `encoder_revision`, `decoder_revision` and
            other arguments of the repository, as for `from_encoder_decoder_pretrained`.

    Raises:
        OSError: If a source cannot be read or the output cannot be written.
        ValueError: If the parts do not fit, or the result is not what it was made from.
    """
    dtypes = {"encoder": _dtype("encoder", encoder_dtype), "decoder": _dtype("decoder", decoder_dtype)}
    report = Report(f"{llm} and {slm} become {output}")
    source = _put_together(str(llm), str(slm), kwargs)
    state = {name: tensor for name, tensor in source.state_dict().items() if name not in source.all_tied_weights_keys}
    cast = {}
    for name, tensor in state.items():
        dtype = dtypes["encoder" if name.startswith(LLM_PREFIX) else "decoder"]
        if dtype is not None and tensor.is_floating_point():
            cast[name] = dtype
    needed = sum(tensor.numel() * cast.get(name, tensor.dtype).itemsize for name, tensor in state.items())
    with output_folder(output, force, needed) as folder:
        save_without_weights(source, folder, Path(output).name)
        _write_dtypes(source, dtypes, folder)
        report.add("files of weights", write_weights(folder, state, cast, max_shard_size))
        report.add("bytes of weights", needed)
        _write_processor(llm, slm, folder, report, kwargs)
        _verify(source, folder, cast, report)
    return report


def _put_together(llm: str, slm: str, kwargs: dict[str, Any]) -> LLM2SLMForConditionalGeneration:
    """The composite of two checkpoints as they are, mapped from their files."""
    parts, hubs = {}, []
    for part, path, find_class in (("encoder", llm, llm_class), ("decoder", slm, slm_class)):
        hubs.append(hub := _hub(part, kwargs))
        config = load(AutoConfig, path, **hub)
        with one_sentence(path):
            auto_class = find_class(config)
            if type(config) not in auto_class._model_mapping:
                raise ValueError(f"a {config.model_type} model cannot be the {'LLM' if part == 'encoder' else 'SLM'}")
        parts[f"{part}_model"] = model = load_model(auto_class, path, **hub)
        check_finite(model.state_dict())
    if "shared_tokenizer" not in kwargs:
        kwargs = kwargs | {"shared_tokenizer": have_same_tokenizer(llm, slm, *hubs)}
    return LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(**parts, **kwargs)


def _hub(part: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one part's repository, without the part's name."""
    return {key: kwargs[f"{part}_{key}"] for key in HUB_ARGUMENTS if f"{part}_{key}" in kwargs}


def _dtype(part: str, name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`{part}_dtype` is {name!r}, but it must be a float such as bfloat16 or float32.")
    return dtype


def _write_dtypes(source: Any, dtypes: dict[str, torch.dtype | None], folder: Path) -> None:
    """The config of what is written, where dtypes are not those of `source`."""
    slm = dtypes["decoder"] or source.dtype
    llm = dtypes["encoder"] or source.encoder.llm.dtype
    config = AutoConfig.from_pretrained(folder)
    config.dtype = config.decoder.dtype = slm
    config.encoder.dtype = llm
    config.encoder_dtype = None if llm == slm else str(llm).removeprefix("torch.")
    config.architectures = [type(source).__name__]
    config.save_pretrained(folder)


def _write_processor(llm: str | Path, slm: str | Path, folder: Path, report: Report, kwargs: dict[str, Any]) -> None:
    hub = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in _hub(part, kwargs).items()}
    for path, part in ((Path(llm), "encoder"), (Path(slm), "decoder")):
        # Of a folder without a vocabulary, transformers may load a tokenizer of special tokens alone.
        place = path / (hub.get(f"{part}_subfolder") or "")
        if path.is_dir() and not any((place / name).is_file() for name in VOCABULARIES):
            report.add("processor", f"none, as {place} has no tokenizer")
            return
    try:
        processor = LLM2SLMProcessor.from_encoder_decoder_pretrained(str(llm), str(slm), **hub)
    except Exception as error:  # each tokenizer has its own
        report.add("processor", f"none, as a tokenizer is missing: {first_line(error)}")
        return
    processor.save_pretrained(folder)
    report.add("processor", "of both tokenizers")


@torch.no_grad()
def _verify(source: Any, folder: Path, cast: dict[str, torch.dtype], report: Report) -> None:
    written, expected = load_model(LLM2SLMForConditionalGeneration, folder), source.state_dict()
    state = written.state_dict()
    for name in expected.keys() - source.all_tied_weights_keys.keys():
        if not torch.equal(state[name], expected[name].to(cast.get(name))):
            raise ValueError(f"{name} is not what it was after the conversion; nothing is kept.")
    report.add("weights compared", len(expected))
    tolerance = 0.05 if cast else 0.0  # bfloat16 keeps 8 bits, through dozens of layers
    prompt, answer = probe(source.config.encoder.vocab_size), probe(source.config.vocab_size)
    states = [llm(input_ids=prompt).last_hidden_state for llm in (written.encoder.llm, source.encoder.llm)]
    report.compare("hidden states of the LLM", states, tolerance)
    logits = [slm_logits(slm, answer) for slm in (written.decoder, source.decoder)]
    report.compare("logits of the SLM", logits, tolerance)
