"""Checkpoints to convert, and damages that every conversion must refuse."""

from __future__ import annotations

import json
import os
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import EncoderDecoderModel, GPT2LMHeadModel, T5EncoderModel, T5ForConditionalGeneration

from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor, lora_config
from tests.support.common import build_parts, gpt2_config, llm_tokenizer, slm_tokenizer, t5_config


def write_sources(folder: Path) -> Path:
    """Write an LLM and an SLM with tokenizers, a full and a lean checkpoint, an adapter, and two to import."""
    torch.manual_seed(1)
    T5ForConditionalGeneration(t5_config()).save_pretrained(folder / "llm")
    build_parts().slm.save_pretrained(folder / "slm")
    processor = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
    processor.tokenizer.save_pretrained(folder / "llm")
    processor.decoder_tokenizer.save_pretrained(folder / "slm")
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(folder / "llm", folder / "slm")
    for name in ("full", "lean"):
        model.save_pretrained(folder / name, include_llm=name == "full")
        processor.save_pretrained(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a deprecated attribute
        adapted = get_peft_model(model, lora_config(model, r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or ".modules_to_save." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "full")
    adapted.save_pretrained(folder / "adapter")
    decoder = GPT2LMHeadModel(gpt2_config(is_decoder=True, add_cross_attention=True))
    EncoderDecoderModel(encoder=T5EncoderModel(t5_config()), decoder=decoder).save_pretrained(folder / "two")
    (folder / "llava").mkdir()
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    projector = {f"mm_projector.{name}": torch.randn(shape) for name, shape in shapes.items()}
    save_file({**projector, "vision.weight": torch.ones(2)}, folder / "llava" / "model.safetensors")
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, in one file or in shards."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit(path: Path, **changes: Any) -> None:
    """Change values of a config; a dictionary changes values of one part."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config))


def same_bytes(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8)), name


def weights_file(folder: Path) -> Path:
    return next(file for file in folder.iterdir() if file.suffix == ".safetensors")


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = weights_file(folder)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return spoil


def _truncate(folder: Path) -> None:
    file = weights_file(folder)
    os.truncate(file, file.stat().st_size // 2)


def _lose_shard(folder: Path) -> None:
    file = weights_file(folder)
    tensors = load_file(file)
    index = {"metadata": {}, "weight_map": {}}
    for number, name in enumerate(tensors, 1):
        shard = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensors[name]}, folder / shard, metadata={"format": "pt"})
        index["weight_map"][name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    (folder / shard).unlink()


def _other_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 32}))


def _largest(tensors: dict[str, torch.Tensor]) -> str:
    return max(tensors, key=lambda name: tensors[name].numel())


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "missing shard": _lose_shard,
    "missing tensor": change_weights(lambda tensors: tensors.pop(_largest(tensors))),
    "wrong shapes": change_weights(
        lambda tensors: tensors.update({name: tensor[:-1].clone() for name, tensor in tensors.items()})
    ),
    "NaN": change_weights(lambda tensors: [tensor.view(-1)[:1].fill_(torch.nan) for tensor in tensors.values()]),
    "other type": _other_type,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: weights_file(folder).unlink(),
    "config no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],  # type: ignore[dict-item,return-value,func-returns-value]
}


@contextmanager
def full_disk(size: int = 60_000) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, so that writing fails in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def load(path: Path, **kwargs: Any) -> LLM2SLMForConditionalGeneration:
    """Load an LLM-to-SLM checkpoint."""
    return LLM2SLMForConditionalGeneration.from_pretrained(path, **kwargs)


def names_in(path: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint of one file."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return set(file.keys())
