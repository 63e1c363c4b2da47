"""The contestants of a benchmark: those of every engine, and the LLM on CTranslate2 for comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ..configuration_llm2slm import LLM2SLMConfig
from ..evaluation.timing import Timing, seconds_of, time_tokens
from ..inference.engine import BenchmarkModels, Contestant, engines
from .cells import Cell


TimedContestant = Callable[[Cell], Timing]


def contestants() -> dict[str, Contestant]:
    """Return all contestants by name, those of PyTorch first."""
    found: dict[str, Contestant] = {}
    for engine in engines().values():
        found |= engine.contestants()
    return {**found, **_ctranslate2("float32", 32), **_ctranslate2("int8", 8)}


def load_contestant(name: str, models: BenchmarkModels, device: str) -> TimedContestant:
    """Load a contestant, and return a function that times it on a cell."""
    contestant = contestants()[name]
    loaded = contestant.load(models, models.folder / name, device)
    reader = _reader(contestant, models)
    # The SLM alone gets a start token more, since it has one in the LLM-to-SLM model's cache too.
    longer = int(contestant.model == "slm" and not reader.is_encoder_decoder)
    if not hasattr(loaded, "generate"):
        return partial(_time_whole, loaded, reader.vocab_size)
    model = endless(loaded)

    def time_cell(cell: Cell) -> Timing:
        own = Cell(cell.prompt + longer, cell.output, cell.batch, cell.beams)
        ids = own.ids(reader.vocab_size).to(model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return time_tokens(model, inputs, own.output, num_beams=own.beams)

    return time_cell


def endless(model: Any) -> Any:
    """Remove a model's end token, in place, so that each output has as many tokens as its cell says."""
    for part in (model, getattr(model, "decoder", None)):  # the SLM of an LLM-to-SLM model also generates alone
        config = getattr(part, "generation_config", None)
        if config is not None:
            config.eos_token_id, config.pad_token_id = None, 0
    return model


def _reader(contestant: Contestant, models: BenchmarkModels) -> Any:
    """Return the config of the model that reads the prompt."""
    if contestant.model == "llm":
        return AutoConfig.from_pretrained(models.llm)
    config = LLM2SLMConfig.from_pretrained(models.llm2slm)
    return config.decoder if contestant.model == "slm" else config.encoder


def _time_whole(generate: Callable[[torch.Tensor, int, int], Any], vocab_size: int, cell: Cell) -> Timing:
    """Time outputs of two lengths, of which the shorter gives the time of the first token."""
    ids = cell.ids(vocab_size)
    first, total = (seconds_of(partial(generate, ids, length, cell.beams)) for length in (1, cell.output))
    return Timing(total, cell.output, first, (total - first) / max(cell.output - 1, 1))


def _ctranslate2(weights: str, bits: int) -> dict[str, Contestant]:
    contestant = Contestant(
        load=partial(_load_ctranslate2, weights=weights), make=partial(_make_ctranslate2, weights=weights),
        model="llm", bits=bits, packages=("ctranslate2",),
    )  # fmt: skip
    return {f"llm-ctranslate2-{weights}": contestant}


def _make_ctranslate2(models: BenchmarkModels, folder: Path, weights: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(models.llm).convert(str(folder), quantization=weights, force=True)  # the folder exists


def _load_ctranslate2(
    models: BenchmarkModels, folder: Path, device: str, weights: str
) -> Callable[[torch.Tensor, int, int], Any]:
    import ctranslate2

    translator = ctranslate2.Translator(
        str(folder),
        device="cuda" if device != "cpu" else "cpu",
        intra_threads=torch.get_num_threads(),
        inter_threads=1,
        compute_type=weights,
    )
    tokenizer = AutoTokenizer.from_pretrained(models.llm)

    def generate(ids: torch.Tensor, new_tokens: int, num_beams: int) -> Any:
        rows = ids.clamp(max=len(tokenizer) - 1).tolist()  # a config may have more ids than its tokenizer has tokens
        prompts = [tokenizer.convert_ids_to_tokens(row) for row in rows]
        return translator.translate_batch(
            prompts, beam_size=num_beams, min_decoding_length=new_tokens, max_decoding_length=new_tokens
        )

    return generate
