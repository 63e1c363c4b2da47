"""Data for a training: which rows become features, and what worker processes get."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import dill
import pytest
from datasets import Dataset

from modeling_llm2slm.data import loading
from modeling_llm2slm.data import streaming as stream_module
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.training.features import streamed_features
from modeling_llm2slm.training.model import load_to_train
from modeling_llm2slm.training.recipe import parse_recipe
from modeling_llm2slm.training.run import make_trainer, train
from tests.support.checkpoints import KINDS, PAIRS, write_bart, write_pairs
from tests.support.common import apart


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "splits", [("train", "validation"), ("train[:4]", "test")], ids=["by default", "as the recipe says"]
)
def test_data_set_on_the_hub_is_read_by_its_splits(recipe, monkeypatch, streaming, splits):
    read = []

    def load(name: str, configuration: str | None, split: str, streaming: bool = False) -> Dataset:
        read.append((name, split, streaming))
        return Dataset.from_list(PAIRS)

    monkeypatch.setattr(loading, "load_dataset", load)
    monkeypatch.setattr(stream_module, "load_dataset", load)
    named = {} if splits[0] == "train" else dict(zip(("train_split", "validation_split"), splits, strict=True))
    hub = {"train_data": "user/pairs", "validation_data": "user/pairs", "streaming": streaming, "metric": "loss"}
    train({**recipe, **hub, **named, "max_steps": 1})
    assert set(read) == {("user/pairs", splits[0], streaming), ("user/pairs", splits[1], False)}


def test_prompt_beyond_the_max_positions_of_the_llm_is_a_bad_row(recipe, checkpoints, tmp_path):
    model = Path(shutil.copytree(checkpoints["llm2slm"], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["encoder"]["max_position_embeddings"] = 5
    (model / "config.json").write_text(json.dumps(config))
    recipe = {**recipe, "model": str(model), "max_steps": 1, "metric": "loss"}
    with pytest.raises(ValueError, match="row 0 has a prompt of 7 tokens, but the LLM has 5 positions"):
        train(recipe)
    with pytest.raises(ValueError, match=r"row \d has a prompt of 7 tokens, but the LLM has 5 positions"):
        encode(model, [recipe["train_data"]], tmp_path / "states")
    assert not (tmp_path / "states").exists()
    assert train({**recipe, "skip_bad_rows": True})["steps"] == 1


@pytest.mark.parametrize("settings", [{}, {"streaming": True}, {"streaming": True, "dataloader_num_workers": 1}])
def test_data_without_any_usable_row_is_an_error(recipe, tmp_path, settings):
    long = [{"prompt": " ".join(["src1"] * 70), "target": "src2"}] * 3
    recipe = {**recipe, "train_data": write_pairs(tmp_path / "long.jsonl", long), "skip_bad_rows": True}
    run = partial(apart, train) if "dataloader_num_workers" in settings else train
    with pytest.raises(ValueError, match=r"long\.jsonl: no row can be used.* Take other data\.$"):
        run({**recipe, **settings, "max_steps": 1, "metric": "loss"})
    assert not (Path(recipe["output_dir"]) / "training.json").exists()


def test_stream_uses_the_data_seed(recipe):
    recipe = {**recipe, "streaming": True, "max_steps": 2, "shuffle_buffer": 100}
    orders = []
    for settings in ({"seed": 1}, {"data_seed": 1}, {"seed": 1, "data_seed": 42}):
        ours, arguments = parse_recipe({**recipe, **settings})
        stream = streamed_features(ours, arguments, load_to_train(ours))
        orders.append([row["input_ids"] for row, _ in zip(stream, range(len(PAIRS)), strict=False)])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("kind", KINDS)
def test_reader_for_worker_processes_holds_no_weights(checkpoints, kind):
    text_to_text = TextToText.from_pretrained(checkpoints[kind])
    reader = text_to_text.without_model()
    prompts, targets = ["src1", "src2 " * 70], ["src1", "src1"]
    features = text_to_text.features(prompts, targets)
    assert reader.features(prompts, targets) == features
    assert reader.problems(features) == text_to_text.problems(features)
    assert len(pickle.dumps(text_to_text)) - len(pickle.dumps(reader)) > 4 * text_to_text.model.num_parameters()


def test_training_pickles_no_weights_for_worker_processes(checkpoints, recipe, monkeypatch):
    sent, original = [], Dataset.map

    def look(self, function, **kwargs):
        sent.append(len(dill.dumps(function)))
        return original(self, function, **kwargs)

    monkeypatch.setattr(Dataset, "map", look)
    recipe = {**recipe, "model": checkpoints["llm2slm"]}
    ours, arguments = parse_recipe(recipe)
    text_to_text = load_to_train(ours)
    make_trainer(ours, arguments, text_to_text)
    ours, arguments = parse_recipe({**recipe, "streaming": True, "max_steps": 1})
    sent.append(len(dill.dumps(streamed_features(ours, arguments, text_to_text))))
    assert len(sent) == 3
    assert max(sent) < 4 * text_to_text.model.num_parameters()


def test_validation_prompt_too_long_for_its_output_is_a_bad_row(recipe, tmp_path):
    long = {"prompt": "src1 " * 40, "target": "src2"}
    recipe["validation_data"] = write_pairs(tmp_path / "v.jsonl", [PAIRS[0], long])
    recipe["generation"] = {"max_new_tokens": 40}
    with pytest.raises(
        ValueError, match=r"v\.jsonl: row 1 is too long to generate an output: Prompt and output have 8\d tokens"
    ):
        train(recipe)
    assert not Path(recipe["output_dir"]).exists()
    assert train({**recipe, "max_steps": 1, "skip_bad_rows": True})["steps"] == 1
    assert train({**recipe, "max_steps": 2, "metric": "loss", "resume": False})["steps"] == 2


def test_prompt_beyond_the_max_positions_of_a_bart_is_a_bad_row(recipe, tmp_path):
    recipe |= {"model": write_bart(tmp_path / "bart"), "validation_data": None, "metric": "loss"}
    recipe["train_data"] = write_pairs(tmp_path / "long.jsonl", [PAIRS[0], {"prompt": "src1 " * 70, "target": "src2"}])
    with pytest.raises(ValueError, match=r"row 1 is too long: The prompt has 7\d tokens .* the LLM has 64 positions"):
        train(recipe)
    assert train({**recipe, "skip_bad_rows": True, "max_steps": 1})["steps"] == 1
