"""Checkpoints spoilt at random: values and structure of configs, headers and indices of weights, single bytes."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 7, 64, 65536, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -2.5, 1e308, float("nan"),
    "", "x", "t5", "gpt2", "llm2slm", "float8_e4m3fn", "../../etc", "/etc/passwd", "~", "user/repository", "\x00",
    "💥",    [], [1, 2], [[]], {}, {"a": {"b": 1}}, {"model_type": "gpt2"}, {"model_type": "llm2slm"}, "a" * 5000,
)  # fmt: skip
CONFIG_KEYS = (
    "transformers_weights", "quantization_config", "attn_implementation", "auto_map", "dtype", "tie_word_embeddings",
    "torch_dtype", "rope_parameters", "name_or_path", "is_decoder", "add_cross_attention", "pruned_heads", "id2label",
    "num_labels", "sub_configs", "base_model_tp_plan", "extra_files", "model_type", "architectures", "encoder", "lean",
    "decoder", "llm_source", "fusion_config", "experts_implementation", "gradient_checkpointing", "vocab_size",
)  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    if isinstance(tree, dict | list):
        keys = tree if isinstance(tree, dict) else range(len(tree))
        return [(tree, key) for key in keys] + [place for key in keys for place in places(tree[key])]
    return []


def spoil_tree(tree: Any, rng: random.Random, new_keys: tuple[str, ...] = ()) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        container, key = rng.choice(places(tree))
        what = rng.randrange(5)
        if what == 0 and isinstance(container, dict) and len(container) > 1:
            del container[key]
        elif what == 1 and new_keys and isinstance(container, dict):
            container[rng.choice(new_keys)] = copy.deepcopy(rng.choice(VALUES))
        elif what == 2 and isinstance(container[key], int) and not isinstance(container[key], bool):
            container[key] = rng.choice(
                (container[key] + 1, container[key] - 1, container[key] * 1000, -container[key])
            )
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))  # a shared one may come to hold itself


def spoil_bytes(data: bytes, rng: random.Random, until: int | None = None) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16))):
        position = rng.randrange(min(len(spoilt), until or len(spoilt)))
        what = rng.randrange(3)
        if what == 0:
            spoilt[position] = rng.randrange(256)
        elif what == 1:
            del spoilt[position : position + rng.choice((1, 1, 100))]
        else:
            spoilt[position:position] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 8))))
        if not spoilt:
            break
    return bytes(spoilt)


def spoil_config(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice(("config.json",) * 6 + ("generation_config.json", "processor_config.json"))
    text = file.read_text()
    if rng.random() < 0.15:
        file.write_bytes(spoil_bytes(text.encode(), rng))
        return
    tree = json.loads(text)
    spoil_tree(tree, rng, CONFIG_KEYS)
    file.write_text(json.dumps(tree))


def spoil_header(folder: Path, rng: random.Random) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        file.write_bytes(spoil_bytes(data, rng, until=8 + length))
        return
    tree = json.loads(data[8 : 8 + length])
    spoil_tree(tree, rng, ("__metadata__", "decoder.lm_head.weight", "../x", "dtype"))
    header = json.dumps(tree).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def spoil_index(folder: Path, rng: random.Random) -> None:
    header = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    names = [name for name in json.loads(header[8 : 8 + length]) if name != "__metadata__"]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    tree = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    spoil_tree(tree, rng, ("metadata", "weight_map"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree))


def spoilt(source: Path, target: Path, seed: int) -> Path:
    """A copy of a checkpoint, spoilt in a way that the seed decides."""
    rng = random.Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py", "README.md"))
    rng.choice((spoil_config, spoil_config, spoil_config, spoil_header, spoil_header, spoil_index))(target, rng)
    return target
