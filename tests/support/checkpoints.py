"""Tiny checkpoints on disk, of the three kinds that the same code trains and scores, and a task for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, BartForConditionalGeneration

from modeling_llm2slm.conversion.build import build
from modeling_llm2slm.training.trainer import TextToTextTrainer
from tests.support.common import gpt2_config, llm_tokenizer, t5_config


KINDS = ("llm", "slm", "llm2slm")
# Targets are prompts said backwards, so no position can be copied blindly.
WORDS = (
    ["src1", "src2", "src3", "src4", "src5", "src6"],
    ["src9", "src8"],
    ["src4", "src20", "src7", "src1"],
    ["src30"],
    ["src11", "src12", "src13"],
    ["src40", "src41", "src42", "src43", "src44"],
    ["src2", "src2", "src3"],
    ["src60", "src61"],
)
PAIRS = [{"prompt": " ".join(words), "target": " ".join(reversed(words))} for words in WORDS]
PROMPTS = [pair["prompt"] for pair in PAIRS]
TARGETS = [pair["target"] for pair in PAIRS]


def write_pairs(path: Path, pairs: Sequence[dict[str, Any]] = PAIRS) -> str:
    """Write examples as JSON lines."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return str(path)


def write_parts(folder: Path) -> tuple[str, str, str]:
    """Write the configs of an LLM and an SLM and the tokenizer of both. Return the three paths."""
    tokenizer = llm_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    configs = {
        "t5": t5_config(dropout_rate=0.1),
        "gpt2": gpt2_config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, initializer_range=0.1),
    }
    for name, config in configs.items():
        config.to_json_file(folder / f"{name}.json")
    return str(folder / "t5.json"), str(folder / "gpt2.json"), str(folder / "tokenizer")


def write_checkpoint(kind: str, folder: Path) -> str:
    """Write a checkpoint with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    llm, slm, tokenizer = write_parts(folder)
    parts = {
        "llm": {"llm": llm, "llm_tokenizer": tokenizer},
        "slm": {"slm": slm, "slm_tokenizer": tokenizer},
        "llm2slm": {"llm": llm, "slm": slm, "llm_tokenizer": tokenizer},
    }
    build(**parts[kind]).save_pretrained(folder / kind)
    return str(folder / kind)


def write_bart(folder: Path, **generation: Any) -> str:
    """Write an LLM with 64 positions, random weights and generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = llm_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = BartConfig(
        **sizes, **heads, **ids, vocab_size=len(tokenizer), max_position_embeddings=64, forced_eos_token_id=None
    )
    model = BartForConditionalGeneration(config)
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    return str(folder)


def sample_by_default(path: str | Path) -> None:
    """Make a checkpoint sample by default, as Qwen's and Llama's do."""
    file = Path(path) / "generation_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, "do_sample": True, "temperature": 9.0, "top_p": 0.99}), encoding="utf-8")


class StoppedError(Exception):
    pass


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """End a run at this step, as if its process had died."""
    training_step = TextToTextTrainer.training_step

    def stopping(self: TextToTextTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise StoppedError
        return training_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(TextToTextTrainer, "training_step", stopping)
        with pytest.raises(StoppedError):
            yield
