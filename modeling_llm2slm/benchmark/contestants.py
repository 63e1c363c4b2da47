"""What `llm2slm benchmark` compares: each contestant is made once, in a folder, and then loaded and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CompileConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from ..conversion.build import preset_config
from ..engines.quantization import quantize
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..parts_llm2slm import slm_class


FIRST_ID = 10  # token ids below are special ones


@dataclass(frozen=True)
class Timing:
    """Seconds of one answer: until its first token, of each token after it (a median where it is known), in all."""

    first: float
    token: float
    total: float


@dataclass(frozen=True)
class Cell:
    """
    What is answered: random prompts, and answers of exactly `answer` tokens.

    Args:
        prompt: Tokens of a prompt, in the vocabulary of the model that reads it.
        answer: Tokens of an answer.
        batch: Prompts at once.
        beams: Beams to search with; 1 is greedy.
        preset: Which preset it is measured on; empty for given checkpoints.
        contestants: Names in [`CONTESTANTS`]; empty for all that can run.
        repeats: Rounds, in each of which every contestant answers once.
    """

    prompt: int = 64
    answer: int = 64
    batch: int = 1
    beams: int = 1
    preset: str = ""
    contestants: tuple[str, ...] = ()
    repeats: int = 5

    @property
    def key(self) -> str:
        return f"{self.preset or 'given'} {self.prompt}/{self.answer} batch {self.batch} beams {self.beams}"

    def ids(self, vocab_size: int) -> torch.Tensor:
        """The prompts, the same for all models of a vocabulary."""
        generator = torch.Generator().manual_seed(self.prompt)
        return torch.randint(FIRST_ID, vocab_size, (self.batch, self.prompt), generator=generator)


@dataclass(frozen=True)
class Models:
    """
    Args:
        folder: Where what is made of the two is kept.
        llm: The LLM with its decoder, a folder or a name on the Hub.
        llm2slm: The composite, likewise.
    """

    folder: Path
    llm: str
    llm2slm: str


Answer = Callable[[Cell], Timing]
Load = Callable[[Models, str, int], Answer]


class _StepClock(StoppingCriteria):
    """Notes the time at which each token is done, and never stops."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def time_generation(model: Any, cell: Cell, inputs: Mapping[str, Any], **options: Any) -> Timing:
    """One answer by stock `generate()`; the model must have no end token."""
    clock = _StepClock()
    model.generate(
        **inputs, max_new_tokens=cell.answer, do_sample=False, num_beams=cell.beams,
        stopping_criteria=StoppingCriteriaList([clock]), **options,
    )  # fmt: skip
    total = time.perf_counter() - clock.times[0]
    steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
    return Timing(clock.times[1] - clock.times[0], sorted(steps)[len(steps) // 2] if steps else 0.0, total)


def _endless(model: Any) -> Any:
    """The model, which ends nowhere now, so that every answer has as many tokens as the cell says."""
    # Of an LLM-to-SLM model the SLM, which answers alone as well.
    for part in (model, getattr(model, "decoder", None)):
        config = getattr(part, "generation_config", None)
        if config is not None:
            config.eos_token_id, config.pad_token_id = None, 0
    return model


def _prompts(model: Any, cell: Cell, vocab_size: int) -> dict[str, torch.Tensor]:
    ids = cell.ids(vocab_size).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def load_llm(models: Models, device: str, threads: int, **kwargs: Any) -> Answer:
    """The LLM under its own `generate()`."""
    model = _endless(AutoModelForSeq2SeqLM.from_pretrained(models.llm, dtype=_dtype(device)).to(device))
    return lambda cell: time_generation(model, cell, _prompts(model, cell, model.config.vocab_size), **kwargs)


def load_composite(models: Models, device: str, dtype: torch.dtype | None = None) -> LLM2SLMForConditionalGeneration:
    """The LLM-to-SLM model; both parts in float32 on a CPU, in bfloat16 elsewhere."""
    dtype = dtype or _dtype(device)
    return _endless(LLM2SLMForConditionalGeneration.from_pretrained(models.llm2slm, dtype=dtype).to(device, dtype))


def load_llm2slm(
    models: Models,
    device: str,
    threads: int,
    dtype: torch.dtype | None = None,
    quantized: str | None = None,
    **kwargs: Any,
) -> Answer:
    model = load_composite(models, device, dtype)
    if quantized is not None:
        quantize(model, quantized)
    return lambda cell: time_generation(model, cell, _prompts(model, cell, model.config.encoder.vocab_size), **kwargs)


def load_slm(models: Models, device: str, threads: int) -> Answer:
    """
    The SLM alone, which reads a prompt of as many tokens of its own: a decoder-only one a start token more, as it has
    in the composite's cache.
    """
    slm: Any = load_composite(models, device).decoder

    def answer(cell: Cell) -> Timing:
        longer = 0 if slm.config.is_encoder_decoder else 1
        own = Cell(cell.prompt + longer, cell.answer, cell.batch, cell.beams)
        return time_generation(slm, own, _prompts(slm, own, slm.config.vocab_size))

    return answer


def compiled(load: Callable[..., Answer]) -> Load:
    """The same with a static cache and a compiled step."""

    def load_compiled(models: Models, device: str, threads: int) -> Answer:
        options = CompileConfig(
            fullgraph=True, dynamic=False, mode="default" if device == "cpu" else "reduce-overhead"
        )
        options._compile_all_devices = True
        return load(models, device, threads, cache_implementation="static", compile_config=options)

    return load_compiled


def make_ctranslate2(models: Models, output: Path, weights: str) -> None:
    """The LLM in the form that CTranslate2 reads."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(models.llm).convert(str(output), quantization=weights)


def load_ctranslate2(models: Models, device: str, threads: int, weights: str) -> Answer:
    """The LLM under CTranslate2, which tells no times of tokens: two answers of different lengths do."""
    import ctranslate2

    translator = ctranslate2.Translator(
        str(models.folder / f"llm-ctranslate2-{weights}"),
        device="cuda" if device != "cpu" else "cpu",
        intra_threads=threads,
        inter_threads=1,
        compute_type=weights,
    )
    tokenizer = AutoTokenizer.from_pretrained(models.llm)
    size = AutoConfig.from_pretrained(models.llm).vocab_size

    def answer(cell: Cell) -> Timing:
        prompts = [tokenizer.convert_ids_to_tokens(row) for row in cell.ids(min(size, len(tokenizer))).tolist()]
        times = []
        for length in (1, cell.answer):
            start = time.perf_counter()
            translator.translate_batch(
                prompts, beam_size=cell.beams, min_decoding_length=length, max_decoding_length=length
            )
            times.append(time.perf_counter() - start)
        return Timing(times[0], (times[1] - times[0]) / max(cell.answer - 1, 1), times[1])

    return answer


def make_exported(models: Models, output: Path, runtime: str, weights: str) -> None:
    """What `llm2slm export` writes."""
    from modeling_llm2slm.conversion import export

    export(models.llm2slm, output, runtime=runtime, weights=weights)


def load_exported(models: Models, device: str, threads: int, name: str) -> Answer:
    """An exported model, which computes on a CPU whatever the device of the others is."""
    from ..engines.exported import ExportedLLM2SLM

    model: Any = _endless(ExportedLLM2SLM.from_pretrained(models.folder / name))
    return lambda cell: time_generation(model, cell, _prompts(model, cell, model.config.encoder.vocab_size))


@dataclass(frozen=True)
class Contestant:
    """
    Args:
        load: Loads it, on a device, with a number of threads, ready to answer.
        bits: Of a weight that a token goes through, on a CPU; of an exported model its files tell.
        small: It decodes with the SLM.
        make: Makes what `load` reads, once; it is kept in the folder, under the contestant's name.
        needs: The package it runs on; empty for what the others need as well.
    """

    load: Load
    bits: int = 32
    small: bool = True
    make: Callable[[Models, Path], None] | None = None
    needs: str = ""

    @property
    def can_run(self) -> bool:
        return not self.needs or find_spec(self.needs) is not None


def _ctranslate2(weights: str, bits: int) -> Contestant:
    return Contestant(
        partial(load_ctranslate2, weights=weights), bits, small=False, make=partial(make_ctranslate2, weights=weights),
        needs="ctranslate2",
    )  # fmt: skip


def _exported(runtime: str, weights: str) -> dict[str, Contestant]:
    name, make = f"llm2slm-{runtime}-{weights}", partial(make_exported, runtime=runtime, weights=weights)
    needs = {"openvino": "openvino", "onnx": "onnxruntime"}[runtime]
    return {name: Contestant(partial(load_exported, name=name), make=make, needs=needs)}


CONTESTANTS = {
    "llm": Contestant(load_llm, small=False),
    "llm-compiled": Contestant(compiled(load_llm), small=False),
    "llm-ctranslate2-float32": _ctranslate2("float32", 32),
    "llm-ctranslate2-int8": _ctranslate2("int8", 8),
    "slm": Contestant(load_slm),
    "llm2slm": Contestant(load_llm2slm),
    "llm2slm-compiled": Contestant(compiled(load_llm2slm)),
    "llm2slm-bfloat16": Contestant(partial(load_llm2slm, dtype=torch.bfloat16), bits=16),
    "llm2slm-int8": Contestant(partial(load_llm2slm, dtype=torch.bfloat16, quantized="int8"), bits=8, needs="torchao"),
    **_exported("openvino", "fp32"),
    **_exported("openvino", "bf16"),
    **_exported("openvino", "int8"),
    **_exported("openvino", "int4"),
    **_exported("onnx", "fp32"),
    **_exported("onnx", "int8"),
}


def make_models(preset: str, folder: Path) -> Models:
    """LLM and composite of a preset's sizes with random weights, those of the LLM's encoder in both, in float32."""
    models = Models(folder, str(folder / "llm"), str(folder / "llm2slm"))
    if (folder / "llm2slm" / "config.json").is_file():
        return models
    set_seed(0)
    config = preset_config(preset)
    llm_config = type(config.encoder)(**config.encoder.to_dict() | {"is_encoder_decoder": True, "dtype": "float32"})
    llm = AutoModelForSeq2SeqLM.from_config(llm_config).eval()
    llm.save_pretrained(models.llm)
    tokenizer_of(llm_config).save_pretrained(models.llm)
    del llm
    decoder: Any = slm_class(config.decoder).from_config(config.decoder).eval()
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        models.llm, decoder_model=decoder, fusion=config.fusion, shared_tokenizer=config.shared_tokenizer,
        encoder_dtype=torch.float32,
    )  # fmt: skip
    model.save_pretrained(models.llm2slm)
    return models


def tokenizer_of(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """A tokenizer with a word for each id, as CTranslate2 reads words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = ["<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(3, config.vocab_size))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16
