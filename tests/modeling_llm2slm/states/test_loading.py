"""What loading refuses: sizes that no model can have, weights that are not finite, too little memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from modeling_llm2slm import LLM2SLMConfig
from modeling_llm2slm.configuration_llm2slm import llm_sizes
from modeling_llm2slm.data import resources
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.states import loading
from modeling_llm2slm.states.loading import check_finite, check_memory, load
from tests.support import families
from tests.support.checkpoints import write_bart
from tests.support.common import gpt2_config, t5_config


def change(path: Path, **values: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


WRONG = (0, -1, 10**9, "two", None, [], {}, 2.5)


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize(
    ("kind", "part", "size"),
    [
        ("slm", None, "n_layer"), ("slm", None, "n_head"), ("slm", None, "n_embd"), ("slm", None, "vocab_size"),
        ("slm", None, "n_positions"), ("llm", None, "num_layers"), ("llm", None, "num_heads"), ("llm", None, "d_ff"),
        ("llm", None, "d_kv"), ("llm", None, "num_decoder_layers"), ("llm2slm", "encoder", "num_layers"),
        ("llm2slm", "encoder", "num_heads"), ("llm2slm", "encoder", "d_model"), ("llm2slm", "decoder", "n_layer"),
        ("llm2slm", "decoder", "n_head"), ("llm2slm", "decoder", "n_positions"), ("llm2slm", "decoder", "vocab_size"),
    ],
)  # fmt: skip
def test_sizes_that_no_model_has_are_refused(
    copies: dict[str, Path], kind: str, part: str | None, size: str, value: Any
) -> None:
    if value is None and size == "num_decoder_layers":
        pytest.skip("the T5 config then takes num_layers")
    path = copies[kind]
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    change(path, **({size: value} if part is None else {part: {**values[part], size: value}}))
    with pytest.raises((OSError, ValueError)) as caught:
        TextToText.from_pretrained(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted({**families.SLMS, **families.LLMS}))
@pytest.mark.parametrize("size", ["num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_every_family_is_checked(name: str, size: str) -> None:
    is_slm = name in families.SLMS
    config = (families.SLMS if is_slm else families.LLMS)[name].config()
    setattr(llm_sizes(config), size, 0)
    parts = (t5_config(), config) if is_slm else (config, gpt2_config())
    with pytest.raises(
        ValueError, match=rf"`{'decoder' if is_slm else 'encoder'}`.* has (0 layers|{size} 0)|vocabulary has"
    ):
        LLM2SLMConfig(encoder=parts[0], decoder=parts[1], eos_token_id=0, pad_token_id=0, decoder_start_token_id=0)


def test_key_value_heads_must_divide_the_heads(tmp_path: Path) -> None:
    families.SLMS["llama"].config(num_attention_heads=4, num_key_value_heads=3).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="has 4 attention heads, which 3 key-value heads do not divide"):
        load(AutoConfig, tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("kind", "part"),
    [("llm", "encoder"), ("llm", "decoder"), ("slm", "transformer"), ("llm2slm", "encoder.llm"),
     ("llm2slm", "encoder.projector"), ("llm2slm", "decoder")],
)  # fmt: skip
def test_weights_that_are_not_finite_are_refused(copies: dict[str, Path], kind: str, part: str, value: float) -> None:
    file = copies[kind] / "model.safetensors"
    tensors = load_file(file)
    name = [name for name in tensors if name.startswith(part)][-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OSError, match=rf"is damaged: {name} in model.safetensors holds values that are not finite"):
        TextToText.from_pretrained(copies[kind])
    TextToText.from_pretrained(copies[kind], allow_nonfinite=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_values_of_every_dtype_are_checked(dtype: torch.dtype) -> None:
    large = torch.full((70,), 400.0 if dtype.itemsize == 1 else 60_000.0).to(dtype)  # their sum overflows in float16
    check_finite({"a": large, "none": large[:0], "number": torch.tensor(3), "meta": large.to("meta")}, "folder")
    with pytest.raises(OSError, match="folder is damaged: b holds"):
        check_finite({"a": large, "b": torch.tensor([1.0, torch.nan]).to(dtype)}, "folder")


def test_memory_is_checked_before_a_checkpoint_is_loaded(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda: 1000)
    for kind, path in checkpoints.items():
        TextToText.from_pretrained(path)  # mapped
        with pytest.raises(OSError, match=r"needs [\d.]+ kB of memory in .*bfloat16, but 1\.0 kB are free"):
            TextToText.from_pretrained(path, dtype="bfloat16")
        assert kind != "llm2slm" or check_memory(path, "float32", "float32") is None
    with pytest.raises(OSError, match=r"needs 2\.0 kB of memory"):
        check_memory(checkpoints["slm"], "auto", more=2000)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("max", "current", "stat")]
    for file, text in zip(files, ("5000\n", "4000\n", "anon 1\ninactive_file 500\n"), strict=True):
        file.write_text(text)
    monkeypatch.setattr(resources, "CONTROL_GROUPS", [tuple(map(str, files))])
    assert resources.free_memory() == 1500
    files[0].write_text("max\n")
    assert resources.free_memory() > 5000
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: SimpleNamespace(available=7))
    assert resources.free_memory() == 7


def test_bart_and_its_two_halves_load(tmp_path: Path) -> None:
    TextToText.from_pretrained(write_bart(tmp_path))
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for size in ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"):
        change(tmp_path, **{**values, size: 0})
        with pytest.raises(OSError, match="cannot be loaded: `config.json`"):
            TextToText.from_pretrained(tmp_path)


def test_weights_of_the_slm_that_are_not_used_are_counted(
    copies: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = copies["llm2slm"]
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["decoder"]["n_layer"] -= 1
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    TextToText.from_pretrained(path)
    assert "weights of the SLM that are not used, among them decoder.transformer.h." in caplog.text
