"""Engines: a toy engine, defined and registered outside the package, loads, generates and can be named."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_llm2slm.benchmark.contestants import contestants
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.inference import engine as registry
from modeling_llm2slm.inference.engine import (
    Contestant,
    Engine,
    LoadOptions,
    Progress,
    WeightFormat,
    engine,
    engine_of,
    engines,
    exporting_engine,
    fingerprint_of,
    register_engine,
)
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import write_checkpoint
from tests.support.common import llm_tokenizer


class ReversingTextToText(TextToText):
    """Writes each prompt backwards, with a loop of its own: its model has no config and no `generate()`."""

    max_positions = None

    def features(self, prompts: list[str], targets: list[str] | None = None) -> dict[str, list[list[int]]]:
        return {"input_ids": self.tokenizer(prompts)["input_ids"]}

    def read(self, features: dict[str, list[list[int]]]) -> dict[str, Any]:
        return {"rows": torch.arange(len(features["input_ids"])), "ids": features["input_ids"]}

    def write(self, inputs: dict[str, Any], **generate_kwargs: Any) -> list[list[int]]:
        longest = generate_kwargs["max_new_tokens"]
        return [inputs["ids"][row][-2::-1][:longest] for row in inputs["rows"].tolist()]


class ToyModel:
    """A written model that has neither transformers' `forward()` nor its `generate()`."""

    def __init__(self, model: Any, error: float):
        self.model, self.error = model, error

    def next_logits(self, prompt: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=prompt, decoder_input_ids=output).logits[:, -1] * (1 + self.error)


class ToyEngine(Engine):
    name = "toy"
    error = 0.0  # of the logits of an exported model

    def can_load(self, path: str | Path) -> bool:
        return (Path(path) / "toy.txt").is_file()

    def load(self, path: str | Path, options: LoadOptions) -> TextToText:
        if options.quantize is not None:
            raise ValueError("The toy engine has no weights to quantize.")
        model: Any = SimpleNamespace()
        return ReversingTextToText(model, llm_tokenizer(), options.prompt_max_length, options.target_max_length)

    def export(self, model: Any, folder: Path, weights: str, progress: Progress = lambda stage: None) -> Any:
        (folder / "toy.txt").touch()
        return ToyModel(model, self.error)

    def output_logits(self, model: Any, prompt: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return torch.stack([model.next_logits(prompt, output[:, : end + 1]) for end in range(output.shape[1])], dim=1)

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
    assert list(engines()) == ["pytorch", "inductor", "llamacpp", "onnx", "openvino", "toy", "vllm"]
    names = "pytorch, inductor, llamacpp, onnx, openvino, toy, vllm"
    with pytest.raises(ValueError, match=rf"'tpu' does not exist\. Choose one of: {names}\."):
        engine("tpu")


def test_every_file_of_an_engine_identifies_a_checkpoint_unless_it_names_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint_of(checkpoint)
    (checkpoint / "toy.txt").write_text("changed")
    assert fingerprint_of(checkpoint) != before
    monkeypatch.setattr(ToyEngine, "files", ("*.txt",))
    before = fingerprint_of(checkpoint)
    (checkpoint / "notes.md").write_text("changed")
    assert fingerprint_of(checkpoint) == before


def test_an_engine_without_weights_exports_nothing() -> None:
    names = "inductor, llamacpp, onnx, openvino"
    with pytest.raises(ValueError, match=rf"'toy' does not export\. Choose one of: {names}\."):
        exporting_engine("toy")
    with pytest.raises(NotImplementedError, match="missing exports nothing"):
        Engine.export(MissingEngine(), None, Path("folder"), "fp32")


def test_an_export_is_compared_by_the_logits_of_its_own_engine(
    tmp_path: Path, toy: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyEngine, "weights", {"fp32": WeightFormat(bytes=4, tolerance=1e-3)})
    source = write_checkpoint("llm2slm", tmp_path)
    export(source, tmp_path / "exported", engine="toy")
    assert engine_of(tmp_path / "exported") is toy
    toy.error = 0.01
    with pytest.raises(ValueError, match="outputs differ"):
        export(source, tmp_path / "wrong", engine="toy")
    assert not (tmp_path / "wrong").exists()


def test_an_engine_that_cannot_be_imported_stops_only_those_who_ask_for_it(
    checkpoint: Path, toy: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = EntryPoint("broken", "no_such_package.engine:Engine", registry.ENTRY_POINTS)
    installed = [*entry_points(group=registry.ENTRY_POINTS), broken]
    monkeypatch.setattr(registry, "entry_points", lambda group: installed)
    registry._installed_engines.cache_clear()
    try:
        assert engine_of(checkpoint) is toy
        assert list(engines()) == ["pytorch", "inductor", "llamacpp", "onnx", "openvino", "toy", "vllm"]
        for ask in (engine, exporting_engine):
            with pytest.raises(ImportError, match=r"'broken' cannot be loaded: No module named 'no_such_package'"):
                ask("broken")
    finally:
        registry._installed_engines.cache_clear()


def test_contestants_of_an_engine_take_part_in_the_benchmark() -> None:
    assert "toy" in contestants()
    assert contestants()["toy"].can_run


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"a-package-that-nobody-has is not installed. Try: pip install 'a-package"):
        MissingEngine().check_installed()
    monkeypatch.setattr(registry, "is_installed", lambda package: False)
    with pytest.raises(ImportError, match=r"pip install 'modeling-llm2slm\[onnx\]'"):
        engine("onnx").check_installed()
