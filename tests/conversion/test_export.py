"""Exports: complete folders that are compared before they are put in place, and errors of one sentence."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.data import resources
from modeling_llm2slm.engines import graph_engine
from modeling_llm2slm.engines.exported import ExportedLLM2SLM, ExportedTextToText
from modeling_llm2slm.engines.graph_engine import GraphEngine
from modeling_llm2slm.evaluation.evaluate import evaluate
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import EvaluateSettings
from tests.support.commands import run, widen_terminal
from tests.support.common import t5_config
from tests.support.exports import checkpoint, exported_folder, needs, reuse_graphs


KIND = ("gpt2", "add_shared")
TEXTS = ["out11 out52 out7 out93", "out85 out29"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    needs("openvino")
    return checkpoint(*KIND, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(source, tmp_path_factory) -> Path:
    return exported_folder(tmp_path_factory, *KIND)


def test_a_folder_is_complete_in_itself(source, folder, tmp_path) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    whole, exported = TextToText.from_pretrained(source), TextToText.from_pretrained(moved)
    assert isinstance(exported, ExportedTextToText)
    expected = whole.generate(TEXTS, max_new_tokens=12)
    assert len(set(expected)) == 2
    assert exported.generate(TEXTS, max_new_tokens=12) == expected
    assert "".join(exported.stream(TEXTS[0], max_new_tokens=12)) == expected[0]
    assert exported.parameters() == {**whole.parameters(), "trainable": 0}
    assert [part.name for part in exported.parts()] == [part.name for part in whole.parts()]


def test_commands_take_an_exported_model(folder, tmp_path, capsys) -> None:
    assert run("info", folder) == 0
    assert "fp32" in capsys.readouterr().out
    assert run("generate", folder, TEXTS[0], "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out.startswith("out")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": text, "target": text}) + "\n" for text in TEXTS))
    result = evaluate(str(folder), pairs, EvaluateSettings(timed_outputs=1, max_new_tokens=4))
    assert result["examples"] == 2
    assert result["device"] == "cpu"


def test_weights_are_stored_once(source, folder) -> None:
    size = sum(file.stat().st_size for file in folder.glob("*") if file.suffix in (".bin", ".safetensors"))
    model = TextToText.from_pretrained(source).model
    table = model.get_input_embeddings().weight.nbytes
    unused = model.encoder.llm.get_input_embeddings().weight.nbytes - model.encoder.llm.shared.weight.nbytes
    assert unused == 0
    weights = sum(tensor.nbytes for tensor in model.parameters())
    assert weights <= size < weights + table / 2


@pytest.fixture
def traced(folder, monkeypatch) -> None:
    reuse_graphs(folder, monkeypatch)


@pytest.mark.usefixtures("traced")
def test_the_command_replaces_a_folder_only_if_asked(source, tmp_path, capsys) -> None:
    written = tmp_path / "exported"
    written.mkdir()
    (written / "precious").write_text("")
    assert run("export", source, written) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert [file.name for file in written.iterdir()] == ["precious"]
    assert run("export", source, written, "--overwrite") == 0
    assert "outputs, largest difference" in capsys.readouterr().out
    assert TextToText.from_pretrained(written).generate(TEXTS, max_new_tokens=4)
    assert not (written / "precious").exists()


@pytest.mark.usefixtures("traced")
def test_an_llm_with_a_dtype_of_its_own_becomes_float32(source, tmp_path, monkeypatch) -> None:
    model = LLM2SLMForConditionalGeneration.from_pretrained(source, encoder_dtype="bfloat16")
    model.save_pretrained(tmp_path / "source")
    dtypes = set()
    graphs_of = graph_engine.graphs_of

    def look(model: LLM2SLMForConditionalGeneration) -> dict[str, Any]:
        dtypes.update(parameter.dtype for parameter in model.parameters())
        return graphs_of(model)

    monkeypatch.setattr(graph_engine, "graphs_of", look)
    with pytest.raises(ValueError, match="outputs differ"):  # the graphs hold weights that were never rounded
        export(tmp_path / "source", tmp_path / "exported")
    assert dtypes == {torch.float32}


@pytest.mark.usefixtures("traced")
def test_a_result_that_differs_is_not_put_in_place(source, tmp_path, monkeypatch) -> None:
    table = graph_engine.embedding_table
    monkeypatch.setattr(graph_engine, "embedding_table", lambda *args: table(*args).roll(1, 0).contiguous())
    with pytest.raises(ValueError, match="outputs differ"):
        export(source, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "weights", "part"),
    [("openvino", "bf16", 0.75), ("openvino", "int8", 0.5), ("openvino", "int4", 0.5), ("onnx", "int8", 0.7)],
)
def test_quantized_weights_are_smaller_and_generate_the_same(
    source, folder, tmp_path_factory, engine, weights, part, capsys
) -> None:
    needs(engine)
    small = exported_folder(tmp_path_factory, *KIND, weights, engine)
    assert not capsys.readouterr().out
    sizes = [
        sum(file.stat().st_size for file in place.glob("*") if file.suffix in (".bin", ".data"))
        for place in (small, folder)
    ]
    assert sizes[0] < part * sizes[1]
    text_to_text = TextToText.from_pretrained(small)
    assert {part.dtype for part in text_to_text.parts()} == {weights}
    # With few bits, so narrow a model reproduces only the first tokens that it learned.
    length = {"openvino-int8": 6, "openvino-int4": 1, "onnx-int8": 4}.get(f"{engine}-{weights}", 8)
    expected = TextToText.from_pretrained(source).generate(TEXTS, max_new_tokens=length)
    assert text_to_text.generate(TEXTS, max_new_tokens=length) == expected


def test_a_wrong_argument_is_an_error_of_one_sentence(source, tmp_path, capsys) -> None:
    assert run("export", source, tmp_path / "e", "--engine", "tpu") == 1
    assert "Choose one of: inductor, llamacpp, onnx, openvino." in capsys.readouterr().err
    assert run("export", source, tmp_path / "e", "--weights", "int2") == 1
    assert "Choose one of: fp32, bf16, int8, int4." in capsys.readouterr().err
    T5ForConditionalGeneration(t5_config()).save_pretrained(tmp_path / "t5")
    assert run("export", tmp_path / "t5", tmp_path / "e") == 1
    assert "is a t5 model, not an LLM-to-SLM checkpoint" in capsys.readouterr().err
    assert run("export", source, tmp_path / "e", "--engine", "onnx", "--weights", "bf16") == 1
    assert "onnx has no 'bf16' weights. Choose one of: fp32, int8, int4." in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, capsys) -> None:
    version = importlib.metadata.version

    def without(package: str) -> str:
        if package == "openvino":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("modeling_llm2slm.inference.engine.version", without)
    assert run("export", tmp_path, tmp_path / "e") == 1
    assert "Error: openvino is not installed. Try: pip install 'modeling-llm2slm[openvino]'" in capsys.readouterr().err


def test_an_older_transformers_names_the_version(source, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers.exporters", None)
    assert run("export", source, tmp_path / "e") == 1
    assert "needs transformers 5.23 or newer" in capsys.readouterr().err


def test_an_exported_model_cannot_be_changed(folder, tmp_path) -> None:
    exported = TextToText.from_pretrained(folder)
    with pytest.raises(ValueError, match="copy its folder"):
        exported.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="runs on the CPU, not on cuda"):
        TextToText.from_pretrained(folder, device="cuda")
    with pytest.raises(ValueError, match="its LLM and its dtype cannot be changed"):
        TextToText.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(OSError, match="is not an exported model"):
        ExportedLLM2SLM.from_pretrained(tmp_path)
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "openvino_step.bin").unlink()
    with pytest.raises(OSError, match="cannot be loaded"):
        TextToText.from_pretrained(broken)
    (broken / "export.json").write_text("{")
    with pytest.raises(OSError, match="export.json is truncated or corrupted"):
        TextToText.from_pretrained(broken)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch, capsys):
    widen_terminal(monkeypatch)


def test_an_export_to_a_disk_that_is_too_small_is_refused_before_the_model_is_loaded(
    source, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr("modeling_llm2slm.conversion.export.load_model", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(OSError, match=r"needs [\d.]+ kB, but 1\.0 kB are free. Free disk space"):
        export(source, tmp_path / "out", weights="int8")


def test_an_engine_that_fails_while_it_writes_names_the_output(source, tmp_path, monkeypatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Check 'file.good()' failed")

    monkeypatch.setattr(GraphEngine, "export", fail)
    with pytest.raises(OSError, match="out could not be written by openvino; its disk may be full"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: [],
        lambda manifest: {**manifest, "export_format": 3},
        lambda manifest: {**manifest, "components": []},
        lambda manifest: {**manifest, "components": {"prompt": {"file": "../x.xml"}, "step": {"file": "y.xml"}}},
        lambda manifest: {**manifest, "llm2slm": "x"},
        lambda manifest: {**manifest, "llm2slm": {**manifest["llm2slm"], "decode": "many"}},
        lambda manifest: {**manifest, "llm2slm": {**manifest["llm2slm"], "parameters": {"LLM": None}}},
    ],
)
def test_a_damaged_manifest_is_named(folder, tmp_path, spoil) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    manifest = json.loads((broken / "export.json").read_text())
    (broken / "export.json").write_text(json.dumps(spoil(manifest)))
    with pytest.raises(OSError, match="export.json cannot be read: .*Export the checkpoint again"):
        TextToText.from_pretrained(broken)


def test_exported_weights_that_are_not_finite_are_refused(folder, tmp_path) -> None:
    for name in ("embeddings.safetensors", "openvino_prompt.bin", "openvino_step.bin"):
        broken = Path(shutil.copytree(folder, tmp_path / name))
        data = bytearray((broken / name).read_bytes())
        middle = len(data) // 2
        data[middle : middle + 64] = b"\xff" * 64  # NaN, wherever a number begins
        (broken / name).write_bytes(data)
        with pytest.raises(OSError, match="holds values that are not finite"):
            TextToText.from_pretrained(broken)
        TextToText.from_pretrained(broken, allow_nonfinite=True)
