"""Engines: a toy engine, defined and registered outside the package, loads, generates and can be named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_llm2slm.benchmark.contestants import contestants
from modeling_llm2slm.inference import engine as registry
from modeling_llm2slm.inference.engine import (
    Contestant,
    Engine,
    LoadOptions,
    engine,
    engine_of,
    engines,
    exporting_engine,
    register_engine,
)
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.common import llm_tokenizer


class ReversingTextToText(TextToText):
    """Writes each prompt backwards, with a loop of its own: its model has no `generate()`."""

    def features(self, prompts: list[str], targets: list[str] | None = None) -> dict[str, list[list[int]]]:
        return {"input_ids": self.tokenizer(prompts)["input_ids"]}

    def read(self, features: dict[str, list[list[int]]]) -> dict[str, Any]:
        return {"rows": torch.arange(len(features["input_ids"])), "ids": features["input_ids"]}

    def write(self, inputs: dict[str, Any], **generate_kwargs: Any) -> list[list[int]]:
        longest = generate_kwargs["max_new_tokens"]
        return [inputs["ids"][row][-2::-1][:longest] for row in inputs["rows"].tolist()]


class ToyEngine(Engine):
    name = "toy"

    def can_load(self, path: str | Path) -> bool:
        return (Path(path) / "toy.txt").is_file()

    def load(self, path: str | Path, options: LoadOptions) -> TextToText:
        if options.quantize is not None:
            raise ValueError("The toy engine has no weights to quantize.")
        model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace()))
        return ReversingTextToText(model, llm_tokenizer(), options.prompt_max_length, options.target_max_length)

    def contestants(self) -> dict[str, Contestant]:
        return {"toy": Contestant(load=lambda models, folder, device: lambda ids, new_tokens, num_beams: None)}


class MissingEngine(ToyEngine):
    name = "missing"
    packages = ("a-package-that-nobody-has",)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyEngine]:
    monkeypatch.setattr(registry, "_registered", {})
    toy = ToyEngine()
    register_engine(toy)
    return toy


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "toy.txt").touch()
    return tmp_path


def test_text_to_text_loads_and_generates_with_a_registered_engine(checkpoint: Path) -> None:
    model = TextToText.from_pretrained(checkpoint, target_max_length=2)
    prompts = ["src1 src2 src3", "src4", "src1 src2 src3"]
    assert model.generate(prompts, batch_size=2) == ["src3 src2", "src4", "src3 src2"]
    assert model.generate(prompts[:1], max_new_tokens=3) == ["src3 src2 src1"]


def test_options_reach_the_engine(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="no weights to quantize"):
        TextToText.from_pretrained(checkpoint, quantize="int8")


def test_an_engine_is_found_by_name_and_by_what_it_loads(checkpoint: Path, toy: ToyEngine, tmp_path: Path) -> None:
    assert engine("toy") is engine_of(checkpoint) is toy
    assert engine_of(tmp_path / "elsewhere").name == "pytorch"
    assert list(engines()) == ["pytorch", "onnx", "openvino", "toy"]
    with pytest.raises(ValueError, match=r"'tpu' does not exist\. Choose one of: pytorch, onnx, openvino, toy\."):
        engine("tpu")


def test_an_engine_without_weights_exports_nothing(toy: ToyEngine) -> None:
    with pytest.raises(ValueError, match=r"'toy' does not export\. Choose one of: onnx, openvino\."):
        exporting_engine("toy")
    with pytest.raises(NotImplementedError, match="toy exports nothing"):
        toy.export(None, Path("folder"), "fp32")


def test_contestants_of_an_engine_take_part_in_the_benchmark() -> None:
    assert "toy" in contestants()
    assert contestants()["toy"].can_run


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"a-package-that-nobody-has is not installed. Try: pip install 'a-package"):
        MissingEngine().check_installed()
    monkeypatch.setattr(registry, "is_installed", lambda package: False)
    with pytest.raises(ImportError, match=r"pip install 'modeling-llm2slm\[onnx\]'"):
        engine("onnx").check_installed()
