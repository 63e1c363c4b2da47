"""What holds of workers without a cluster; `tests/modeling_llm2slm/test_ray.py` has one."""

from __future__ import annotations

import sys

import pytest

from llm2slm import _with_bare_ray
from modeling_llm2slm.data.cluster import _call, _fitting, _opened, connected
from modeling_llm2slm.settings import RaySettings


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r"ray is not installed\. Try: pip install 'modeling-llm2slm\[ray\]'"),
        connected(RaySettings(ray=""), "cpu"),
    ):
        pass


def test_no_cluster_is_used_unless_it_is_asked_for() -> None:
    with connected(RaySettings(ray_workers=2), "cpu") as workers:
        assert workers is None


def test_an_exception_keeps_its_type_where_it_can_be_pickled() -> None:
    class Unpicklable(Exception):
        def __init__(self, one: int, two: int):
            super().__init__(f"{one} and {two}")

    def fail(error: Exception) -> None:
        raise error

    assert _opened(_call(max, [1, 2])) == 2
    with pytest.raises(OSError, match="No space") as caught:
        _opened(_call(fail, [OSError(28, "No space", "file")]))
    assert (caught.value.errno, caught.value.filename) == (28, "file")
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
        _opened(_call(fail, [Unpicklable(1, 2)]))


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers"), [(1, 0.0, 8), (4, 0.0, 2), (1, 1.0, 2), (3, 0.5, 2), (16, 0.0, 0), (1, 4.0, 0)]
)
def test_workers_that_fit_on_a_node(cpus: float, gpus: float, workers: int) -> None:
    assert _fitting({"CPU": 8.0, "GPU": 2.0}, {"num_cpus": cpus, "num_gpus": gpus}) == workers


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "model", "--ray"], ["generate", "model", "--ray="]),
        (["--ray", "--file", "rows.jsonl"], ["--ray=", "--file", "rows.jsonl"]),
        (["--ray", "local", "--ray-workers", "2"], ["--ray", "local", "--ray-workers", "2"]),
        (["model", "--", "--ray"], ["model", "--", "--ray"]),
    ],
)
def test_ray_without_a_value_takes_the_default_cluster(words: list[str], expected: list[str]) -> None:
    assert _with_bare_ray(words) == expected
