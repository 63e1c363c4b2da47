"""Fingerprints of weights, tokenizers and checkpoints: they tell which results belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint_llm2slm import LLM_PREFIX
from ..files_llm2slm import weight_files


PROBE = "The quick (brown) fox's 3,14 €: Äpfel, naïve\n\tdef f(x): return x**2  # 日本語 🙂"


def llm_fingerprint(model: str | Path) -> str:
    """Return [`weights_fingerprint`] of the LLM in an LLM-to-SLM checkpoint; `ValueError` if it contains none."""
    if not tensors_of(model, LLM_PREFIX):
        raise ValueError(f"{model} contains no LLM. If it is a lean checkpoint, make it full: llm2slm convert full.")
    return weights_fingerprint(model, LLM_PREFIX)


def weights_fingerprint(model: str | Path, prefix: str = "") -> str:
    """
    Return SHA-256 of the tensors in a checkpoint whose names start with `prefix`: of their names without the prefix,
    dtypes, shapes and bytes. Tensors are read from the files one after another, and no model is loaded.
    """
    digest, names = hashlib.sha256(), tensors_of(model, prefix)
    with ExitStack() as stack:
        files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(names.values())}
        for name in sorted(names):
            tensor = files[names[name]].get_tensor(name)
            digest.update(f"{name.removeprefix(prefix)} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_of(model: str | Path, prefix: str) -> dict[str, Path]:
    """Return the names of the tensors in a checkpoint that start with `prefix`, each with its weight file."""
    found = {}
    for file in weight_files(checkpoint_folder(model), on_hub=False):
        with safe_open(file, framework="pt") as tensors:
            found.update({name: file for name in tensors.keys() if name.startswith(prefix)})  # noqa: SIM118
    return found


def checkpoint_folder(model: str | Path) -> Path:
    """Return the local folder of a checkpoint, given as a folder or a name on the Hub."""
    if Path(model).is_dir():
        return Path(model)
    from transformers.utils import cached_file

    return Path(cached_file(str(model), "config.json") or model).parent


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """
    Return a SHA-256 over the vocabulary and rules of a tokenizer, without its padding and truncation. Tokenizers of
    equal fingerprints give every text the same ids.
    """
    content = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # not of the `tokenizers` library: compare the ids of a text with everything in it
        return hashlib.sha256(f"{content}{tokenizer(PROBE).input_ids}".encode()).hexdigest()
    backend = type(backend).from_str(backend.to_str())
    backend.no_padding()
    backend.no_truncation()
    return hashlib.sha256((content + backend.to_str()).encode()).hexdigest()


def checkpoint_fingerprint(model: str | Path, weights: Collection[str]) -> str:
    """
    Return SHA-256 of the files of a checkpoint that decide its outputs: its configs, and the files whose names match
    one of the patterns `weights`. [`fingerprint_of`] takes the patterns from the checkpoint's engine.
    """
    folder, digest = checkpoint_folder(model), hashlib.sha256()
    files = [folder / "config.json", folder / "generation_config.json"]
    files += sorted(path for path in folder.rglob("*") if any(fnmatch(path.name, pattern) for pattern in weights))
    for path in files:
        name = path.relative_to(folder)
        if path.is_file() and not name.parts[0].startswith("checkpoint-"):  # a training keeps these in its output
            with path.open("rb") as file:
                digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()
