"""OpenVINO: threads and damaged graphs."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from modeling_llm2slm import ExportedLLM2SLM
from modeling_llm2slm.engines.openvino import activation_group
from tests.support.exports import KINDS, exported_folder, needs, pair_of


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return pair_of(tmp_path_factory, *KINDS[0])


def test_graphs_use_the_threads_of_torch(gpt2, tmp_path_factory) -> None:
    for graph in gpt2.exported.graphs.values():
        assert graph.compiled_model.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    folder, threads = exported_folder(tmp_path_factory, *KINDS[0]), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = ExportedLLM2SLM.from_pretrained(folder)
    finally:
        torch.set_num_threads(threads)
    assert {graph.compiled_model.get_property("INFERENCE_NUM_THREADS") for graph in again.graphs.values()} == {2}


def test_a_damaged_graph_is_named(tmp_path_factory, tmp_path) -> None:
    needs("openvino")
    folder = shutil.copytree(exported_folder(tmp_path_factory, *KINDS[0]), tmp_path / "cut")
    os.truncate(folder / "openvino_step.bin", 100)
    with pytest.raises(OSError, match="openvino_step is damaged"):
        ExportedLLM2SLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_missing_or_damaged_is_named(tmp_path_factory, tmp_path, name) -> None:
    needs("openvino")
    folder = shutil.copytree(exported_folder(tmp_path_factory, *KINDS[0]), tmp_path / "cut")
    os.truncate(folder / name, 50)
    with pytest.raises(OSError, match=rf"{name} is truncated or corrupted"):
        ExportedLLM2SLM.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(OSError, match=rf"is incomplete: it has no {name}\. Export the checkpoint again"):
        ExportedLLM2SLM.from_pretrained(folder)


def test_activations_are_grouped_by_a_power_of_two_that_divides_all_widths() -> None:
    widths = torch.nn.Sequential(torch.nn.Linear(96, 4), torch.nn.Linear(64, 4))
    assert activation_group(widths) == 32
    assert activation_group(torch.nn.Sequential(torch.nn.Linear(1024, 4))) == 256
