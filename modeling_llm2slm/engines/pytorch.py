"""PyTorch: checkpoints of every kind, on any device, with transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    CompileConfig,
)
from transformers.initialization import no_init_weights

from ..configuration_llm2slm import max_positions
from ..inference.engine import DEFAULT, BenchmarkModels, Contestant, Engine, LoadOptions
from ..inference.families import DecoderOnlyTextToText, EncoderDecoderTextToText, LLM2SLMTextToText
from ..inference.model import LLM2SLMForConditionalGeneration
from ..inference.text_to_text import TextToText
from ..states.loading import check_memory, load, load_model, to_device, with_article
from ..states.without_llm import LLM2SLMWithoutLLM
from .quantization import check_quantizer, quantize


MANY_POSITIONS = 2**15


class PyTorchEngine(Engine):
    """PyTorch with transformers' models. It loads every checkpoint that no other engine claims."""

    name = DEFAULT
    files = ("*.safetensors", "*.bin")

    def can_load(self, path: str | Path) -> bool:
        return True

    def load(self, path: str | Path, options: LoadOptions) -> TextToText:
        if options.quantize is not None:
            check_quantizer(options.quantize)
        config = load(AutoConfig, path)
        composite, encoder_decoder = config.model_type == "llm2slm", getattr(config, "is_encoder_decoder", False)
        auto_class: Any = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
        if type(config) not in auto_class._model_mapping:
            raise ValueError(f"{path} is {with_article(config.model_type)} model, which does not generate text.")
        processor = load(AutoProcessor if composite else AutoTokenizer, path)
        if composite and not hasattr(processor, "decoder_tokenizer"):  # stock falls back to a tokenizer
            raise OSError(f"{path}/processor_config.json is damaged or missing. Take another copy of the checkpoint.")
        if options.states is not None:
            if not composite:
                raise ValueError(
                    f"{path} is {with_article(config.model_type)} model; only LLM-to-SLM models take hidden states."
                )
            options.states.check(path, config, processor.tokenizer)
            auto_class = LLM2SLMWithoutLLM
        dtypes = _dtypes(config, options)
        llm_dtype = dtypes.get("encoder_dtype") or getattr(config, "encoder_dtype", None)
        check_memory(path, dtypes["dtype"], llm_dtype, 0 if composite else _mask_bytes(auto_class, config))
        model = load_model(auto_class, path, allow_nonfinite=options.allow_nonfinite, **dtypes)
        model = to_device(model, options.device or "cpu").eval()
        if options.quantize is not None:
            quantize(model, options.quantize)
        kind: Any = EncoderDecoderTextToText if encoder_decoder else DecoderOnlyTextToText
        text_to_text = (LLM2SLMTextToText if composite else kind)(
            model, processor, options.prompt_max_length, options.target_max_length
        )
        text_to_text.states = options.states
        return text_to_text

    def contestants(self) -> dict[str, Contestant]:
        return {
            "llm": Contestant(load=_load_llm, model="llm"),
            "llm-compiled": Contestant(load=_compiled(_load_llm), model="llm"),
            "slm": Contestant(load=_load_slm, model="slm"),
            "llm2slm": Contestant(load=_load_llm2slm),
            "llm2slm-compiled": Contestant(load=_compiled(_load_llm2slm)),
            "llm2slm-bfloat16": Contestant(load=partial(_load_llm2slm, dtype=torch.bfloat16), bits=16),
            "llm2slm-int8": Contestant(
                load=partial(_load_llm2slm, dtype=torch.bfloat16, to="int8"), bits=8, packages=("torchao",)
            ),
        }


def _dtypes(config: Any, options: LoadOptions) -> dict[str, Any]:
    """Return the dtypes to load a model in; that of a frozen LLM may be its own."""
    dtypes: dict[str, Any] = {"dtype": options.dtype or torch.float32}
    if options.keep_llm_dtype and config.model_type == "llm2slm":
        kept = config.encoder_dtype or config.dtype or torch.float32
        dtypes["encoder_dtype"] = str(kept if config.freeze_llm else dtypes["dtype"]).removeprefix("torch.")
    return dtypes


def _mask_bytes(auto_class: Any, config: Any) -> int:
    """Return the bytes of masks, whose size is the square of the max positions, if there are very many positions."""
    if (max_positions(config) or 0) < MANY_POSITIONS:
        return 0
    with torch.device("meta"), no_init_weights():
        return sum(buffer.nbytes for buffer in auto_class.from_config(config).buffers())


def _load_llm(models: BenchmarkModels, folder: Path, device: str) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(models.llm, dtype=_default_dtype(device)).to(device)


def _load_llm2slm(
    models: BenchmarkModels, folder: Path, device: str, dtype: torch.dtype | None = None, to: str | None = None
) -> LLM2SLMForConditionalGeneration:
    """Load both parts in float32 on a CPU, in bfloat16 elsewhere, unless a dtype is given."""
    dtype = dtype or _default_dtype(device)
    model: Any = LLM2SLMForConditionalGeneration.from_pretrained(models.llm2slm, dtype=dtype).to(device, dtype)
    if to is not None:
        quantize(model, to)
    return model


def _load_slm(models: BenchmarkModels, folder: Path, device: str) -> Any:
    return _load_llm2slm(models, folder, device).decoder


def _compiled(load: Callable[[BenchmarkModels, Path, str], Any]) -> Callable[[BenchmarkModels, Path, str], Any]:
    """Load the same model to generate with a static cache and a compiled step."""

    def load_compiled(models: BenchmarkModels, folder: Path, device: str) -> Any:
        model = load(models, folder, device)
        mode = "default" if device == "cpu" else "reduce-overhead"
        options = CompileConfig(fullgraph=True, dynamic=False, mode=mode)
        options._compile_all_devices = True
        model.generation_config.update(cache_implementation="static", compile_config=options)
        return model

    return load_compiled


def _default_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16
