"""The benchmark of engines: prepared once, measured again each time, and which rows count."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engines
from benchmarks.engines_files import LLM, LLM2SLM, measure_files
from modeling_llm2slm.benchmark import benchmark
from modeling_llm2slm.data.parsing import read_json
from modeling_llm2slm.inference.engine import Contestant
from tests.support.exports import needs
from tests.support.quick_start import start_quickly


STOCK = ("llm", "llm2slm")


def test_contestants_are_prepared_once_and_measured_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def fail(models: Any, folder: Path) -> None:
        made.append(folder.name)
        raise RuntimeError("no such operator")

    found = {name: one for name, one in engines.contestants().items() if name in STOCK}
    found["llm-broken"] = Contestant(load=fail, make=fail, model="llm")  # type: ignore[arg-type]
    for module in (engines, benchmark):
        monkeypatch.setattr(module, "contestants", lambda: found)
    start_quickly(monkeypatch, benchmark)

    def run(*arguments: str) -> dict[str, Any]:
        options = ["--tiny", "--only", "t5-large_gpt2", "--rounds", "1", "--output", str(tmp_path / "engines.json")]
        monkeypatch.setattr(sys, "argv", ["engines", "--work", str(tmp_path / "work"), *options, *arguments])
        monkeypatch.setattr(engines, "INT8", (*STOCK, "llm-broken"))
        engines.main()
        return read_json(tmp_path / "engines.json") if (tmp_path / "engines.json").is_file() else {}

    with pytest.raises(SystemExit, match="Run with --prepare first"):
        run()
    assert run("--prepare") == {}
    assert "llm-broken is left out: no such operator" in capsys.readouterr().out
    first, second = (run("--note", note)["t5-large_gpt2"] for note in ("first", "second"))
    assert len(made) == 1
    assert second["note"] == "second"
    assert second["left_out"] == ["llm-broken"]
    assert first["contestants"] == second["contestants"]
    (cell,), (again,) = first["cells"].values(), second["cells"].values()
    assert cell["results"].keys() == set(STOCK)
    assert cell["results"]["llm"]["seconds"] != again["results"]["llm"]["seconds"]
    assert "llm2slm is " in capsys.readouterr().out


def test_rows_of_known_quality_count() -> None:
    seconds = {"llm": 9, "llm-ctranslate2-int8": 4, "slm": 1, "llm2slm": 6, "llm2slm-openvino-int8": 2, "llm2slm-x": 1}
    quality = engines.quality()
    rows = {name: {"seconds": value, "quality": quality.get(name)} for name, value in seconds.items()}
    assert engines.best(rows) == {
        "llm": "llm-ctranslate2-int8", "llm2slm": "llm2slm-openvino-int8", "llm2slm_any": "llm2slm-x",
        "speedup": 2, "speedup_any": 4,
    }  # fmt: skip
    assert quality["llm"] == quality["llm-ctranslate2-float32"] == 1
    assert quality["llm2slm-inductor-fp32"] == quality["llm2slm"]
    assert "llm2slm-inductor-int8" not in quality


@pytest.mark.slow
def test_a_file_is_timed_against_batches_of_ctranslate2(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    needs("openvino")
    models = engines.models_of(tmp_path / "work", engines.parts(tiny=True)["multi30k"].config)
    for name in (LLM, LLM2SLM[0]):
        (models.folder / name).mkdir()
        make = engines.contestants()[name].make
        assert make is not None
        make(models, models.folder / name)
    file = tmp_path / "multi30k" / "en-de" / "train.jsonl.gz"
    file.parent.mkdir(parents=True)
    rows = [{"source": f"A man has {number} dogs.", "target": f"Ein Mann hat {number} Hunde."} for number in range(40)]
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    result = measure_files(models, tmp_path, rounds=2, limit=30)
    assert result["best"]["llm2slm"] == LLM2SLM[0]
    assert set(result["prompts_per_second"]) == {f"{LLM}, 1024 tokens", f"{LLM}, 4096 tokens", LLM2SLM[0]}
    assert all(len(seconds) == 2 for seconds in result["seconds"].values())


def test_a_contestant_that_does_not_exist_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["engines", "--work", str(tmp_path), "--contestants", "llm", "llm-fast"])
    with pytest.raises(SystemExit):
        engines.main()
    assert "llm-fast is no contestant. Choose from: llm, " in capsys.readouterr().err
