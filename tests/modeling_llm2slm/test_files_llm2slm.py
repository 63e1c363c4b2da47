"""Weights in safetensors files: never outside their folder, never pickled; and fingerprints of weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_llm2slm.files_llm2slm import fingerprint, open_weights, shard_names, weight_files
from tests.support.common import build_parts, same_tensors


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        file = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class TestWeightFiles:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}

    def test_a_whole_file_and_shards_hold_the_same_tensors(self, tmp_path):
        write_shards(tmp_path / "shards", self.tensors)
        (tmp_path / "whole").mkdir()
        save_file(self.tensors, tmp_path / "whole" / "model.safetensors")
        for folder in ("shards", "whole"):
            weights = open_weights(weight_files(tmp_path / folder, on_hub=False))
            same_tensors({name: weights[name][...] for name in sorted(weights)}, self.tensors)

    def test_a_missing_shard_is_named(self, tmp_path):
        write_shards(tmp_path, self.tensors)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(OSError, match=r"model-00002-of-00002\.safetensors is missing"):
            weight_files(tmp_path, on_hub=False)

    def test_pickled_weights_are_never_read(self, tmp_path):
        torch.save(self.tensors, tmp_path / "pytorch_model.bin")
        with pytest.raises(OSError, match="pickled weights are not read"):
            weight_files(tmp_path, on_hub=False)

    def test_a_folder_never_stands_in_for_a_repository(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("user").mkdir()
        write_shards(Path("user/llm"), self.tensors)
        assert weight_files("user/llm", on_hub=False)
        with pytest.raises(OSError, match="on the Hub, nor in the cache"):
            weight_files("user/llm", on_hub=True)

    @pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "..", 3])
    def test_an_index_cannot_name_files_elsewhere(self, name, tmp_path):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="only safetensors files in its folder are read"):
            shard_names(index)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
    def test_a_damaged_index_is_an_error(self, text, tmp_path):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(text)
        with pytest.raises(OSError, match="damaged: it is not an index of shards"):
            shard_names(index)

    def test_a_truncated_file_is_named(self, tmp_path):
        save_file(self.tensors, tmp_path / "model.safetensors")
        os.truncate(tmp_path / "model.safetensors", 100)
        with pytest.raises(OSError, match=r"model\.safetensors is damaged or incomplete"):
            open_weights(weight_files(tmp_path, on_hub=False))


class TestFingerprint:
    def test_it_does_not_depend_on_sharding_order_and_dtype(self, tmp_path):
        state = {name: tensor for name, tensor in build_parts().llm.state_dict().items() if "embed_tokens" not in name}
        write_shards(tmp_path, dict(reversed(state.items())))
        expected = fingerprint(state)
        assert fingerprint(open_weights(weight_files(tmp_path, on_hub=False))) == expected
        assert fingerprint({name: tensor.bfloat16() for name, tensor in state.items()}) == expected
        assert fingerprint({name: tensor.double() for name, tensor in state.items()}) == expected

    @pytest.mark.parametrize("change", ["value", "name", "shape"])
    def test_it_covers_every_tensor(self, change):
        state = {name: torch.randn(3, 200) for name in "abc"}
        changed = dict(state)
        if change == "value":
            changed["b"] = state["b"] * 1.01
        elif change == "name":
            changed["d"] = changed.pop("b")
        else:
            changed["b"] = state["b"].reshape(200, 3)
        assert fingerprint(changed) != fingerprint(state)

    def test_it_reads_tensors_of_every_shape(self, tmp_path):
        state = {
            "scalar": torch.tensor(2.0),
            "empty": torch.zeros(0, 4),
            "vector": torch.arange(1000.0),
            "deep": torch.randn(2, 3, 4, 5),
            "counts": torch.arange(9),
        }
        save_file(state, tmp_path / "model.safetensors")
        assert fingerprint(open_weights([tmp_path / "model.safetensors"])) == fingerprint(state)
