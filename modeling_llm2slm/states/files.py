"""The JSON files of a checkpoint: what their values may be, checked before libraries read them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from ..data.causes import no_file
from ..data.parsing import read_json
from ..data.records import MAPPING, NUMBER, SWITCH, TEXT, WHOLE, Kind, mapping_to, read_record, whole_number
from ..files_llm2slm import INDEX, first_line


# Files that hold a whole vocabulary, whatever the class of the tokenizer calls its own.
VOCABULARY = re.compile(r"tokenizer\.json|tekken\.json|.*\.(model|tiktoken)")
FIX = "Correct the file, or take another copy of the checkpoint."
POSITIVE, FEW = whole_number(1), whole_number(1, 1000)
IDS = Kind(
    "a token id or a list of them",
    lambda value: all(map(WHOLE.holds, value)) if isinstance(value, list) else WHOLE.holds(value),
)
SIDE = Kind("left or right", lambda value: value in ("left", "right"))
SPECIAL_TOKEN = Kind("a text or a mapping", lambda value: isinstance(value, str | dict))
LENGTH = Kind("a number above 0", lambda value: type(value) in (int, float) and value > 0)
TOKENS = {f"{name}_token": SPECIAL_TOKEN for name in ("bos", "cls", "eos", "mask", "pad", "sep", "unk")}
# Values that a library accepts when it loads a file, and fails on later, or whose error does not name the file.
FILES: dict[str, dict[str, Kind]] = {
    "config.json": {"model_type": TEXT},
    "generation_config.json": {
        "assistant_early_exit": Kind("null: no model exits early", lambda value: value is None),
        "bad_words_ids": Kind(
            "a list of lists of token ids",
            lambda value: isinstance(value, list) and all(isinstance(ids, list) and IDS.holds(ids) for ids in value),
        ),
        "forced_bos_token_id": WHOLE,
        **dict.fromkeys(("num_beams", "num_return_sequences"), FEW),
        **dict.fromkeys(("max_length", "max_new_tokens", "max_cache_len"), POSITIVE),
        **dict.fromkeys(
            (
                "bos_token_id", "decoder_start_token_id", "encoder_no_repeat_ngram_size", "min_length",
                "min_new_tokens", "no_repeat_ngram_size", "num_assistant_tokens", "pad_token_id",
                "prompt_lookup_num_tokens", "top_k",
            ),
            WHOLE,
        ),
        **dict.fromkeys(("begin_suppress_tokens", "eos_token_id", "forced_eos_token_id", "suppress_tokens"), IDS),
        **dict.fromkeys(
            (
                "assistant_confidence_threshold", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
                "guidance_scale", "length_penalty", "max_time", "min_p", "repetition_penalty", "temperature", "top_p",
                "typical_p",
            ),
            NUMBER,
        ),
        **dict.fromkeys(
            (
                "do_sample", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
                "remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "use_cache",
            ),
            SWITCH,
        ),
    },
    "processor_config.json": {"prompt_max_length": POSITIVE, "target_max_length": whole_number(2)},
    "special_tokens_map.json": TOKENS,
    "tokenizer_config.json": {
        **TOKENS,
        "added_tokens_decoder": MAPPING,
        "model_max_length": LENGTH,
        "padding_side": SIDE,
        "truncation_side": SIDE,
    },
    INDEX: {"weight_map": mapping_to(TEXT)},
    "adapter_config.json": {"base_model_name_or_path": TEXT},
}  # fmt: skip


def check_files(folder: str | Path) -> None:
    """Raise `OSError` for a JSON file of a local checkpoint that is damaged or holds a value that cannot work."""
    for place in _places(folder):
        for path in place.iterdir() if place.is_dir() else ():
            if not path.is_file() and (path.name in FILES or (path.exists() and not path.is_dir())):
                raise no_file(path)
        for name, fields in FILES.items():
            if (place / name).is_file():
                try:
                    values = read_record(place / name, FIX, fields, optional=name != INDEX)
                    _check_finite(place / name, values)
                    if name == "tokenizer_config.json":
                        _check_vocabulary(place, values.get("llm_tokenizer_class") or values.get("tokenizer_class"))
                except ValueError as error:
                    raise OSError(str(error)) from error


def damaged_file(folder: str | Path) -> str | None:
    """Return a sentence about the first JSON or safetensors file of a checkpoint that is damaged, or `None`."""
    for path in (path for place in _places(folder) if place.is_dir() for path in sorted(place.iterdir())):
        try:
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np"):
                    pass
        except (ValueError, SafetensorError) as error:
            cause = first_line(error).removesuffix(".")
            return f"{path} is truncated or corrupted ({cause}). Take another copy of the checkpoint."
        except OSError:  # not what failed
            continue
    return None


def _places(folder: str | Path) -> tuple[Path, Path]:
    return Path(folder), Path(folder, "decoder_tokenizer")


def _check_vocabulary(folder: Path, tokenizer_class: Any) -> None:
    """Raise `ValueError` if the files of a vocabulary are missing: transformers loads a tokenizer without one then."""
    found = tokenizer_class_from_name(tokenizer_class) if isinstance(tokenizer_class, str) else None
    names = getattr(found, "vocab_files_names", {})  # none for tokenizers of bytes
    missing = [names[file] for file in ("vocab_file", "merges_file") if file in names]
    missing = [name for name in missing if not (folder / name).is_file()]
    if missing and not any(VOCABULARY.fullmatch(path.name) and path.is_file() for path in folder.iterdir()):
        raise ValueError(
            f"{folder} has neither tokenizer.json nor {' and '.join(missing)}: its tokenizer is empty. {FIX}"
        )


def _check_finite(path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `ValueError` for a number that is not finite. Lists are not searched: limits in them may be infinite."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_finite(path, value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} cannot be read: {prefix}{name} is {value}, but it must be {NUMBER.words}. {FIX}")
