"""What workers of a cluster compute, here in this process and in another order; `test_ray.py` has a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling_llm2slm import LLM2SLMProcessor
from modeling_llm2slm.data import cluster
from modeling_llm2slm.inference import files
from modeling_llm2slm.settings import DistillSettings, EncodeSettings, GenerateFileSettings, RaySettings
from modeling_llm2slm.states import encoding
from modeling_llm2slm.states.store import StateStore
from modeling_llm2slm.training.distillation import distill
from tests.support.checkpoints import PROMPTS, write_checkpoint, write_pairs


RAY = RaySettings(ray="local", ray_workers=2)
SAMPLING: dict[str, Any] = {"sample": True, "temperature": 2.0, "seed": 4}


class StoppedError(Exception):
    pass


class InlineWorkers:
    """Does what `Workers` does, with the same pickles, in this process; the last item comes first."""

    def call(self, function: Any, *arguments: Any) -> Any:
        return cluster._opened(cluster._call(function, arguments))

    def map(self, make: Any, arguments: Any, items: Any) -> Iterator[tuple[int, Any]]:
        worker = cluster._Worker(make, arguments)
        for index, item in reversed(list(enumerate(items))):
            batch = {"index": np.array([index]), "item": np.array([cluster.pickle.dumps(item)], dtype=object)}
            yield index, cluster._opened(worker(batch)["result"][0])


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def connected(settings: RaySettings, device: str) -> Iterator[InlineWorkers | None]:
        yield None if settings.ray is None else InlineWorkers()

    for module in (files, encoding):
        monkeypatch.setattr(module, "connected", connected)


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("composite"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "rows.jsonl", [{"prompt": text} for text in [*PROMPTS, PROMPTS[2]] * 2])


def settings(**changes: Any) -> GenerateFileSettings:
    return GenerateFileSettings(**{"max_new_tokens": 4, "batch_size": 3, **changes})


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_generate_writes_the_outputs_of_one_process(
    options: dict[str, Any], composite: str, data: str, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    expected = files.generate_file(composite, data, one, settings(**options))
    report = files.generate_file(composite, data, two, settings(**options), ray=RAY)
    assert two.read_bytes() == one.read_bytes()
    assert (report.rows, report.duplicates, report.tokens, report.truncated) == (
        expected.rows, expected.duplicates, expected.tokens, expected.truncated,
    )  # fmt: skip


@pytest.mark.parametrize("ray", [RAY, RaySettings()], ids=["resumed by workers", "resumed by one process"])
def test_an_interrupted_run_resumes(ray: RaySettings, composite: str, data: str, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise StoppedError

    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with pytest.raises(StoppedError):
        files.generate_file(composite, data, two, settings(**SAMPLING), ray=RAY, progress=stop)
    assert files.generate_file(composite, data, two, settings(**SAMPLING), ray=ray).kept > 0
    files.generate_file(composite, data, one, settings(**SAMPLING))
    assert two.read_bytes() == one.read_bytes()


def test_encode_writes_the_hidden_states_of_one_process(composite: str, data: str, tmp_path: Path) -> None:
    for name, ray in (("one", RaySettings()), ("two", RAY)):
        encoding.encode(composite, [data], tmp_path / name, EncodeSettings(batch_size=3), ray=ray)
    one, two = StateStore(tmp_path / "one"), StateStore(tmp_path / "two")
    assert one.description == two.description
    for ids in LLM2SLMProcessor.from_pretrained(composite)(text=PROMPTS)["input_ids"]:
        assert one.hidden_states(ids).equal(two.hidden_states(ids))


def test_distill_writes_the_targets_of_one_process(data: str, tmp_path: Path) -> None:
    llm, one, two = write_checkpoint("llm", tmp_path / "llm"), tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    options = DistillSettings(max_new_tokens=3, num_beams=2, batch_size=3)
    distill(llm, data, one, options)
    distill(llm, data, two, options, ray=RAY)
    assert two.read_bytes() == one.read_bytes()


def test_an_error_of_a_worker_is_the_error_of_the_run(composite: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Engine 'none' does not exist"):
        files.generate_file(composite, data, tmp_path / "one.jsonl", settings(engine="none"), ray=RAY)
