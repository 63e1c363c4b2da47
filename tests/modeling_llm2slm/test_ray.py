"""
Workers of a Ray cluster, here two on this machine: the outputs of one process, also if a worker is killed.

Every run loads the package in new processes: `make test-ray` installs Ray and runs these tests.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2slm import GenerateBatches, LLM2SLMProcessor, TextToText
from modeling_llm2slm.data.cluster import connected
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.settings import DistillSettings, EncodeSettings, GenerateFileSettings, RaySettings
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.states.store import StateStore
from modeling_llm2slm.training.distillation import distill
from tests.support.checkpoints import write_checkpoint


ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RAY = RaySettings(ray="local", ray_workers=2)
ROWS = [{"prompt": " ".join(f"src{(7 * row + word) % 60 + 1}" for word in range(row % 9 + 1))} for row in range(48)]


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": 3, "include_dashboard": False}
    ray.init(**own, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("composite"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A folder of two files, and a row between them that is torn."""
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "part-0.jsonl").write_text("\n".join([*lines[:20], '{"prompt": "src1']))
    (tmp_path / "rows" / "part-1.jsonl").write_text("\n".join(lines[20:]))
    return f"file://{tmp_path}/rows"


def settings(**changes: Any) -> GenerateFileSettings:
    return GenerateFileSettings(**{"max_new_tokens": 5, "batch_size": 4, "skip_bad_rows": True, **changes})


def pid_of(item: int) -> tuple[int, int]:
    time.sleep(0.05)
    return item, os.getpid()


def make_pid_of() -> Callable[[int], tuple[int, int]]:
    return pid_of


def make_failing() -> Callable[[int], int]:
    raise ValueError("There is no model.")


def kill_a_worker() -> None:
    import psutil

    workers = [process for process in psutil.process_iter(["cmdline"]) if is_worker(process.info["cmdline"])]
    os.kill(workers[0].pid, signal.SIGKILL)


def is_worker(command: list[str] | None) -> bool:
    return bool(command) and "ray::" in command[0] and "_Worker" in command[0]  # as Ray names the process of an actor


def test_results_of_a_killed_worker_arrive_once() -> None:
    with connected(RAY, "cpu") as workers:
        assert workers is not None
        results, killed = [], None
        for index, (item, pid) in workers.map(make_pid_of, {}, range(40)):
            results.append((index, item))
            if killed is None:
                killed = pid
                os.kill(pid, signal.SIGKILL)
        assert sorted(results) == [(number, number) for number in range(40)]


def test_an_error_in_a_worker_is_raised_here() -> None:
    with connected(RAY, "cpu") as workers:
        assert workers is not None
        with pytest.raises(ValueError, match="There is no model"):
            list(workers.map(make_failing, {}, [1]))


def test_outputs_are_those_of_one_process_although_a_worker_is_killed(
    composite: str, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == 2:
            kill_a_worker()

    expected = generate_file(composite, data, tmp_path / "one.jsonl", settings())
    report = generate_file(composite, data, tmp_path / "two.jsonl", settings(), ray=RAY, progress=progress)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert (report.rows, report.duplicates, report.tokens) == (len(ROWS), expected.duplicates, expected.tokens)
    assert steps == sorted(set(steps))
    assert caplog.text.count(f"{data}: 1 bad row was skipped: 20.") == 2
    with pytest.raises(ValueError, match="row 20 is not JSON"):
        generate_file(composite, data, tmp_path / "three.jsonl", settings(skip_bad_rows=False), ray=RAY)


def test_an_interrupted_run_resumes_with_the_same_samples(composite: str, data: str, tmp_path: Path) -> None:
    sampling = settings(sample=True, temperature=2.0, seed=3)

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        generate_file(composite, data, tmp_path / "two.jsonl", sampling, ray=RAY, progress=stop)
    report = generate_file(composite, data, tmp_path / "two.jsonl", sampling, ray=RAY)
    assert report.kept >= 8
    generate_file(composite, data, tmp_path / "one.jsonl", sampling)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_encode_writes_the_same_hidden_states(composite: str, data: str, tmp_path: Path) -> None:
    options = EncodeSettings(batch_size=8, skip_bad_rows=True)
    encode(composite, [data], tmp_path / "one", options)
    encode(composite, [data], tmp_path / "two", options, ray=RAY)
    one, two = StateStore(tmp_path / "one"), StateStore(tmp_path / "two")
    assert one.description == two.description
    for ids in LLM2SLMProcessor.from_pretrained(composite)(text=[row["prompt"] for row in ROWS])["input_ids"]:
        assert one.hidden_states(ids).equal(two.hidden_states(ids))


def test_distill_writes_the_same_targets(tmp_path: Path, data: str) -> None:
    llm = write_checkpoint("llm", tmp_path / "llm")
    options = DistillSettings(max_new_tokens=4, num_beams=2, batch_size=16, skip_bad_rows=True)
    assert distill(llm, data, tmp_path / "one.jsonl", options) == len(ROWS)
    distill(llm, data, tmp_path / "two.jsonl", options, ray=RAY)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_rows_of_ray_data_get_a_column_of_outputs(composite: str) -> None:
    rows = ray.data.from_items([{"id": number, **row} for number, row in enumerate(ROWS)])
    options = {"model": composite, "settings": settings()}
    rows = rows.map_batches(GenerateBatches, fn_constructor_kwargs=options, batch_size=16, concurrency=2)
    found = {row["id"]: row["model_output"] for row in rows.take_all()}
    expected = TextToText.from_pretrained(composite).generate([row["prompt"] for row in ROWS], max_new_tokens=5)
    assert [found[number] for number in range(len(ROWS))] == expected


def test_ray_serve_has_the_routes_of_the_server(composite: str) -> None:
    from ray import serve

    from modeling_llm2slm.serving.ray_serve import build

    try:
        serve.start(http_options={"port": 8765})
        serve.run(build({"model": composite, "max_new_tokens": 8, "name": "tiny"}))
        body = json.dumps({"model": "tiny", "prompt": ROWS[3]["prompt"], "max_tokens": 5}).encode()
        request = urllib.request.Request("http://127.0.0.1:8765/v1/completions", body)
        with urllib.request.urlopen(request, timeout=120) as response:
            (choice,) = json.load(response)["choices"]
        model = TextToText.from_pretrained(composite)
        assert choice["text"] == model.generate([ROWS[3]["prompt"]], max_new_tokens=5)[0]
        with urllib.request.urlopen("http://127.0.0.1:8765/v1/models", timeout=120) as response:
            assert json.load(response)["data"][0]["id"] == "tiny"
    finally:
        serve.shutdown()
