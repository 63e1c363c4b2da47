"""Time a file of prompts: LLM-to-SLM as `llm2slm generate --file` against the LLM in CTranslate2's own batches."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.tokenizer import train_tokenizer
from modeling_llm2slm import LLM2SLMProcessor
from modeling_llm2slm.data.loading import load_examples, load_prompts
from modeling_llm2slm.evaluation.timing import seconds_of, time_in_turns
from modeling_llm2slm.inference.engine import BenchmarkModels
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.settings import DataSettings, GenerateFileSettings


NEW_TOKENS = 20
TRAINING_ROWS = 4000  # of the tokenizer
LLM = "llm-ctranslate2-int8"
LLM2SLM = ("llm2slm-openvino-int8", "llm2slm-inductor-int8", "llm2slm-inductor-fp32")
BATCH_TOKENS = (1024, 4096)  # of CTranslate2: the faster one counts


def measure_files(models: BenchmarkModels, data: Path, rounds: int, limit: int) -> dict[str, Any]:
    """
    Return prompts per second of each way, as medians of alternating rounds on one thread.

    Every output has 20 tokens, since random weights do not end. Tokenizing, decoding and writing count, loading does
    not. Equal prompts are generated for once by `generate_file`.
    """
    file = data / "multi30k" / "en-de" / "train.jsonl.gz"
    tokenizer = _tokenizer(models.folder / "tokenizer", file)
    prompts = load_prompts(file, DataSettings(prompt_column="source", limit=limit))["prompt"][:]
    ways: dict[str, Callable[[int], float]] = {
        f"{LLM}, {tokens} tokens": _ctranslate2(models, tokenizer, prompts, tokens) for tokens in BATCH_TOKENS
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in LLM2SLM:
            if (models.folder / name).is_dir():
                LLM2SLMProcessor(tokenizer, tokenizer).save_pretrained(models.folder / name)
                ways[name] = partial(_generate_file, models.folder / name, file, Path(folder, "outputs.txt"), limit)
        seconds = time_in_turns(ways, range(rounds), progress=lambda turn, name: print(turn, name, flush=True))
    speeds = {name: limit / statistics.median(times) for name, times in seconds.items()}
    llm, llm2slm = (
        max((name for name in speeds if name.startswith(kind)), key=lambda name: speeds[name])
        for kind in ("llm-", "llm2slm-")
    )
    return {
        "prompts": limit,
        "new_tokens": NEW_TOKENS,
        "prompts_per_second": speeds,
        "best": {"llm": llm, "llm2slm": llm2slm, "speedup": speeds[llm2slm] / speeds[llm]},
        "seconds": seconds,
    }


def _tokenizer(folder: Path, file: Path) -> Any:
    """Return a tokenizer of Multi30k, trained once."""
    if not folder.is_dir():
        rows = load_examples(file, DataSettings(prompt_column="source", limit=TRAINING_ROWS), "target")
        train_tokenizer([*rows["prompt"][:], *rows["target"][:]]).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _ctranslate2(
    models: BenchmarkModels, tokenizer: Any, prompts: list[str], batch_tokens: int
) -> Callable[[int], float]:
    import ctranslate2

    folder = str(models.folder / LLM)
    translator = ctranslate2.Translator(folder, intra_threads=1, inter_threads=1, compute_type="int8")
    words = AutoTokenizer.from_pretrained(models.llm)  # CTranslate2 reads words, one for each id

    def generate() -> None:
        rows = [words.convert_ids_to_tokens(ids) for ids in tokenizer(prompts)["input_ids"]]
        results = translator.translate_batch(
            rows, beam_size=1, max_batch_size=batch_tokens, batch_type="tokens",
            min_decoding_length=NEW_TOKENS, max_decoding_length=NEW_TOKENS,
        )  # fmt: skip
        outputs = [words.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        tokenizer.batch_decode(outputs, skip_special_tokens=True)

    return lambda turn: seconds_of(generate)


def _generate_file(model: Path, file: Path, output: Path, limit: int, turn: int) -> float:
    # A second thread would encode ahead.
    settings = GenerateFileSettings(
        prompt_column="source", limit=limit, overlap=False, max_new_tokens=NEW_TOKENS, overwrite=True
    )
    return generate_file(model, file, output, settings, min_new_tokens=NEW_TOKENS).seconds
