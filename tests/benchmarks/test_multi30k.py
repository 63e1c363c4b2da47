"""The Multi30k experiment: its jobs, its statistics, and (slow) all of it at a tiny size."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sacrebleu.metrics import BLEU
from transformers import AutoConfig, T5ForConditionalGeneration

from benchmarks import multi30k, multi30k_report
from benchmarks.multi30k_experiment import EXPERIMENT, REFERENCES, Experiment, Job, choose_layers
from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.engines.exported import is_exported
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.training.recipe import parse_recipe
from tests.support.checkpoints import PAIRS, write_checkpoint, write_pairs
from tests.support.common import t5_config


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path / "data", tmp_path / "runs")


SHORT = EXPERIMENT.with_name("multi30k_short.yaml")
both = pytest.mark.parametrize("file", [EXPERIMENT, SHORT], ids=["whole", "short"])


@both
def test_each_job_comes_after_those_it_needs(tmp_path: Path, file: Path) -> None:
    experiment = Experiment(tmp_path, tmp_path, file)
    before: set[tuple[str, str]] = set()
    for job in experiment.jobs:
        assert {(job.pair, name) for name in job.needs} <= before, job.key
        before.add((job.pair, job.name))
    assert len(before) == len(experiment.jobs)


@both
def test_each_row_has_a_recipe_and_models(tmp_path: Path, file: Path) -> None:
    experiment = Experiment(tmp_path, tmp_path, file)
    for job in experiment.jobs:
        if job.row and "build" in job.row:
            recipe, arguments = parse_recipe(experiment.recipe(job))
            assert arguments.seed == job.seed
            assert bool(recipe.llm_states) == ("states" in job.needs)
            assert arguments.per_device_train_batch_size == (64 if file == SHORT else 32)
            for part in {"llm", "slm"} & set(job.row["build"]):
                known = {**experiment.settings["models"], **experiment.settings["rows"][job.pair]}
                assert job.row["build"][part] in known
    for model in experiment.settings["models"].values():
        AutoConfig.for_model(**model)


def test_a_failed_job_is_reported_and_blocks_those_that_need_it(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def start(job: Job, arguments: Any) -> Any:
        started.append(job.key)
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(multi30k, "_start", start)
    assert not multi30k.run(experiment, multi30k.argparse.Namespace(workers=2, only=None))
    assert started == ["en-de/tokenizer", "en-fr/tokenizer"]
    printed = capsys.readouterr().out
    assert "en-de/tokenizer: FAILED" in printed
    assert "en-de/llm-shallow: not started, because it needs en-de/tokenizer\n" in printed


def test_an_incomplete_store_is_not_done(experiment: Experiment, tmp_path: Path) -> None:
    job = next(job for job in experiment.jobs if job.name == "states")
    llm = next(other for other in experiment.jobs if other.key == f"{job.pair}/llm")
    folder = experiment.runs / job.pair / "states"
    folder.mkdir(parents=True)
    checkpoint = write_checkpoint("llm2slm", tmp_path / "checkpoint")
    prompts = write_pairs(tmp_path / "pairs.jsonl")
    encode(checkpoint, [prompts], folder)
    assert experiment.is_done(job)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    again = Experiment(experiment.data, experiment.runs)
    assert not again.is_done(job)
    assert not again.is_done(llm)


def test_results_of_other_settings_are_an_error(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {job.key: job for job in experiment.jobs}
    monkeypatch.setattr(Experiment, "_do_row", lambda *_: None)
    experiment.do(jobs["en-de/llm"])
    experiment.do(jobs["en-de/t5-add"])
    again = Experiment(experiment.data, experiment.runs)
    assert not again.is_done(jobs["en-de/t5-add"])
    again.settings["recipes"]["llm"]["learning_rate"] = 1.0
    for name in ("llm", "t5-add"):  # which needs the LLM
        with pytest.raises(ValueError, match=f"{name} was started by another version.*Remove it.*--runs"):
            again.check(jobs[f"en-de/{name}"])
    again.check(jobs["en-de/t5"])


def test_a_report_without_results_writes_nothing(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No LLM is done in .*--runs"):
        multi30k_report.report(experiment, tmp_path / "results", tmp_path / "plots")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no recipe .*x.yaml"),
        ("- 1\n", "x.yaml is not a recipe: it must map names"),
        ("rows: {en-de: {llm: {build", "x.yaml is not YAML"),
        ("model: m\n", "x.yaml is not an experiment: it has no vocabulary. See .*multi30k.yaml"),
    ],
)
def test_a_file_that_is_not_an_experiment_is_an_error_of_one_sentence(
    tmp_path: Path, content: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "multi30k").mkdir()
    if content is not None:
        (tmp_path / "x.yaml").write_text(content)
    words = ["multi30k", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*words, "--experiment", str(tmp_path / "x.yaml")])
    with pytest.raises(SystemExit, match=message):
        multi30k.main()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["--workers", "--threads"])
def test_zero_workers_or_threads_are_an_error(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["multi30k", option, "0"])
    with pytest.raises(SystemExit):
        multi30k.main()
    assert "--workers and --threads must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("failing", [True, False])
def test_unfinished_jobs_are_an_error(
    tmp_path: Path, failing: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "multi30k").mkdir()
    only = "en-de/tokenizer" if failing else "en-de/t5-add"
    words = ["multi30k", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--only", only]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(multi30k.signal, "signal", lambda *_: None)
    monkeypatch.setattr(multi30k, "_start", lambda *_: subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]))
    with pytest.raises(SystemExit) as stop:
        multi30k.main()
    assert stop.value.code == 1
    message = "FAILED" if failing else "not started, because it needs en-de/tokenizer, en-de/llm, en-de/states"
    assert f"{only}: {message}" in capsys.readouterr().out


@pytest.mark.parametrize(("encoder", "decoder"), [(None, [0, 2]), ([0, 0, 1, 1, 1], [0, 1, 1, 2, 2])])
def test_chosen_layers_decode_and_load(tmp_path: Path, encoder: list[int] | None, decoder: list[int]) -> None:
    model = T5ForConditionalGeneration(t5_config(num_layers=2, num_decoder_layers=3, is_encoder_decoder=True)).eval()
    choose_layers(model, encoder, decoder)
    layers = [*model.encoder.block, *model.decoder.block]
    assert len({id(layer) for layer in layers}) == len(layers) == len(encoder or [0, 1]) + len(decoder)
    model.save_pretrained(tmp_path)
    loaded, report = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    ids = torch.tensor([[5, 6, 7, 1]])
    found = [
        one.generate(ids, max_new_tokens=6, min_new_tokens=6, use_cache=cache, do_sample=False).tolist()
        for one in (model, loaded)
        for cache in (True, False)
    ]
    assert all(output == found[0] for output in found)


OUTPUTS = ["A man sits on a bench.", "Two dogs run.", "", "A woman with a red hat is reading a book outside."]
TEST_REFERENCES = [
    "A man is sitting on a bench.",
    "Two dogs run on grass.",
    "A cat.",
    "A lady in a red hat reads outside.",
]


def test_bleu_from_counts_equals_sacrebleu() -> None:
    counts = multi30k_report.sentence_counts(OUTPUTS, TEST_REFERENCES)
    assert multi30k_report.bleu_of(counts) == pytest.approx(BLEU().corpus_score(OUTPUTS, [TEST_REFERENCES]).score)
    few = (OUTPUTS[:1], TEST_REFERENCES[:1])  # no match of four words
    score = multi30k_report.bleu_of(multi30k_report.sentence_counts(*few))
    assert score == pytest.approx(BLEU().corpus_score(few[0], [few[1]]).score)


def test_intervals_are_paired() -> None:
    outputs, references = OUTPUTS * 5, TEST_REFERENCES * 5
    good = multi30k_report.sentence_counts(references, references)
    counts = {"llm": good, "same": good, "worse": multi30k_report.sentence_counts(outputs, references)}
    found = multi30k_report.bleu_intervals(counts, "llm", samples=200)
    assert found["same"]["relative_interval"] == pytest.approx([1, 1])
    low, high = found["worse"]["relative_interval"]
    assert low < found["worse"]["relative"] < 1
    assert low < high < 1
    assert found["worse"] == multi30k_report.bleu_intervals(counts, "llm", samples=200)["worse"]


def test_a_difference_has_an_interval() -> None:
    outputs, references = OUTPUTS * 5, TEST_REFERENCES * 5
    good, worse = (multi30k_report.sentence_counts(some, references) for some in (references, outputs))
    found = multi30k_report.difference(good, worse, samples=200)
    low, high = found["above_interval"]
    assert 0 < low < found["above"] < high
    assert found["above"] == pytest.approx(100 - BLEU().corpus_score(outputs, [references]).score)
    assert multi30k_report.difference(good, good, samples=20) == {"above": 0, "above_interval": [0, 0]}


def test_the_best_slm_alone_is_not_the_llm_or_its_origin() -> None:
    builds = {
        "shallow": {"llm": "t5-3-3"}, "llm": {"llm": "shallow"}, "small": {"llm": "t5-1-1"},
        "small-on": {"llm": "small"}, "cut": {"llm": "llm"}, "both": {"llm": "llm", "slm": "small"},
    }  # fmt: skip
    best = {"shallow": 9.0, "llm": 9.0, "small": 3.0, "small-on": 2.0, "cut": 9.0, "both": 4.0}
    jobs = [Job("xx-yy", name, (), {"build": parts}) for name, parts in builds.items()]
    rows = {name: {"training": {"best_metric": value}} for name, value in best.items()}
    counts = {name: multi30k_report.sentence_counts(OUTPUTS, TEST_REFERENCES) for name in builds}
    found = multi30k_report._best(jobs, rows, counts)
    assert (found["llm_to_slm"], found["slm_alone"], found["above"]) == ("both", "small", 0)
    assert "on_references" not in found  # the best one is trained on references
    rows["small-on"]["training"]["best_metric"] = 3.5
    jobs = [job for job in jobs if job.name != "small-on"]
    jobs += [Job("xx-yy", "small-on", (), {"build": builds["small-on"], "targets": "distilled"})]
    found = multi30k_report._best(jobs, rows, counts)
    assert (found["slm_alone"], found["on_references"]["slm_alone"]) == ("small-on", "small")


TINY: dict[str, Any] = {
    "vocabulary": 60,
    "max_new_tokens": 8,
    "distilled": {"num_beams": 2, "batch_size": 4},
    "models": {"t5": {"model_type": "t5", "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}},
    "recipes": {
        "all": {"prompt_column": "source", "metric": "bleu", "num_train_epochs": 1, "per_device_train_batch_size": 8}
    },
    "rows": {
        "xx-yy": {
            "shallow": {"build": {"llm": "t5"}, "recipe": "all"},
            "llm": {
                "build": {"llm": "shallow"},
                "encoder_layers": [0, 1, 1],
                "decoder_layers": [0, 1, 1],
                "recipe": "all",
            },
            "add": {"build": {"llm": "llm", "slm": "t5"}, "recipe": "all", "targets": "distilled", "seeds": 2},
            "alone": {"build": {"llm": "t5"}, "recipe": "all"},
            "cut": {"build": {"llm": "llm"}, "decoder_layers": [0], "recipe": "all"},
            "cut-add": {
                "build": {"llm": "llm", "slm": "llm"},
                "encoder_layers": [0],
                "decoder_layers": [2, 0],
                "recipe": "all",
            },
            "add-int8": {"openvino": "add"},
        }
    },
}


def test_an_unknown_engine_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, "distilled": {"engine": "ctranslate"}}))
    with pytest.raises(ValueError, match="tiny.yaml: unknown engine 'ctranslate'. Use ctranslate2"):
        Experiment(tmp_path, tmp_path / "runs", file)


def test_outputs_of_ctranslate2_equal_those_of_distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ctranslate2")
    llm = write_checkpoint("llm", tmp_path / "checkpoints")
    (tmp_path / "xx-yy").mkdir()
    rows = [{"number": at, "source": pair["prompt"], "target": pair["target"]} for at, pair in enumerate(PAIRS)]
    with gzip.open(tmp_path / "xx-yy" / REFERENCES["train"], "wt") as lines:
        lines.write("".join(json.dumps(row) + "\n" for row in rows))
    written = []
    for engine in ({}, {"engine": "ctranslate2"}):
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump({**TINY, "distilled": {"num_beams": 1, "batch_size": 4, **engine}}))
        experiment = Experiment(tmp_path, tmp_path / str(len(engine)), file)
        monkeypatch.setattr(experiment, "model", lambda pair, row: llm)
        experiment.do(Job("xx-yy", "distilled", ()))
        assert experiment.is_done(Job("xx-yy", "distilled", ()))
        path = tmp_path / str(len(engine)) / "xx-yy" / "distilled" / "train.jsonl"
        written.append([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    assert written[0] == written[1]
    assert [(row["number"], row["source"]) for row in written[0]] == [(row["number"], row["source"]) for row in rows]
    assert any(new["target"] != old["target"] for new, old in zip(written[0], rows, strict=True))


@pytest.mark.slow
def test_the_whole_experiment_at_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xx-yy").mkdir()
    rows: Any = [{"source": pair["prompt"], "target": pair["target"]} for pair in PAIRS * 4]
    for file in REFERENCES.values():
        with gzip.open(tmp_path / "xx-yy" / file, "wt") as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY, sort_keys=False))
    experiment = Experiment(tmp_path, tmp_path / "runs", file)
    for job in experiment.jobs:
        experiment.do(job)
        assert experiment.is_done(job)
    assert (tmp_path / "runs" / "xx-yy" / "states" / "store.json").is_file()
    model = LLM2SLMForConditionalGeneration.from_pretrained(experiment.model("xx-yy", "cut-add"))
    assert (model.config.encoder.num_layers, model.config.decoder.num_layers) == (3, 1)
    assert model.config.decoder.num_decoder_layers == 2
    perfect = [row["target"] for row in rows]  # models that train for a few steps have a BLEU of 0
    half = [output if at % 2 else "nothing" for at, output in enumerate(perfect)]
    for name, outputs in (("llm", perfect), ("add", half)):
        (tmp_path / "runs" / "xx-yy" / name / "outputs.json").write_text(json.dumps({"1": outputs, "4": outputs}))
    result = multi30k_report.report(experiment, tmp_path / "results", tmp_path / "plots")
    assert json.loads((tmp_path / "results" / "tiny-xx-yy.json").read_text()) == result["xx-yy"]
    rows = result["xx-yy"]["rows"]
    assert list(rows) == ["shallow", "llm", "add", "add-1", "alone", "cut", "cut-add", "add-int8"]
    assert is_exported(experiment.model("xx-yy", "add-int8"))
    assert 0 < rows["add-int8"]["time_by_llm"] < 1
    assert rows["llm"]["relative_1"] == rows["llm"]["time_by_llm"] == 1
    assert rows["cut"]["training"]["parameters"]["total"] < rows["llm"]["training"]["parameters"]["total"]
    assert result["xx-yy"]["seeds"]["add"]["bleu"] == [rows["add"]["bleu_1"], rows["add-1"]["bleu_1"]]
    best = result["xx-yy"]["best"]
    assert (best["llm_to_slm"], best["slm_alone"]) == ("add", "alone")
    assert best["above"] > 1
    assert best["above"] == pytest.approx(rows["add"]["bleu_1"] - rows["alone"]["bleu_1"])
    for name in ("tiny-xx-yy.svg", "tiny-xx-yy-training.svg"):
        assert (tmp_path / "plots" / name).is_file()
