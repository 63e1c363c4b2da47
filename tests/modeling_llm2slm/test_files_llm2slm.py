"""Files of checkpoints: never half there, never outside their folder, never pickled; and fingerprints of weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from modeling_llm2slm import files_llm2slm
from modeling_llm2slm.data.files import atomic_write
from modeling_llm2slm.files_llm2slm import fingerprint, locate_tensors, open_weights, shard_names, weight_files
from tests.support.common import build_parts, same_tensors


class TestWriteAside:
    def test_a_file_appears_when_it_is_complete(self, tmp_path):
        target = tmp_path / "folder" / "result.json"
        with atomic_write(target) as temporary:
            temporary.write_text("whole")
            assert not target.exists()
        assert target.read_text() == "whole"
        assert list(target.parent.iterdir()) == [target]

    @pytest.mark.parametrize("kind", ["write", "open", "safetensors"])
    def test_what_the_system_says_is_about_the_target(self, kind, tmp_path):
        """Not about the place beside it, and about something that has a name."""
        target, number = tmp_path / "result", errno.ENOSPC
        raised: dict[str, Any] = {
            "write": lambda name: OSError(number, os.strerror(number)),
            "open": lambda name: OSError(number, os.strerror(number), name),
            "safetensors": lambda name: SafetensorError(
                f"Error while serializing: I/O error: full (os error {number})"
            ),
        }
        with pytest.raises(OSError, match="No space left") as caught, atomic_write(target) as temporary:
            raise raised[kind](str(temporary / "model"))
        assert (caught.value.errno, caught.value.filename) == (number, str(target))

    def test_a_file_in_the_way_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=str(tmp_path / "file")), atomic_write(tmp_path / "file" / "result"):
            raise AssertionError("there is no place to write to")

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_a_failure_leaves_what_was_there(self, kind, tmp_path):
        target = tmp_path / "result"
        inner = target if kind == "file" else target / "config.json"
        inner.parent.mkdir(exist_ok=True)
        inner.write_text("before")

        def fail() -> None:
            with atomic_write(target) as temporary:
                if kind == "folder":
                    temporary.mkdir()
                (temporary if kind == "file" else temporary / "config.json").write_text("half")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert inner.read_text() == "before"
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize("exchange", [True, False])
    def test_a_folder_keeps_what_is_not_written_anew(self, exchange, tmp_path, monkeypatch):
        if not exchange:  # a system without renameat2
            monkeypatch.setattr(files_llm2slm, "_exchange", lambda *_: False)
        target = tmp_path / "model"
        (target / "checkpoint-1").mkdir(parents=True)
        (target / "checkpoint-1" / "weights").write_text("kept")
        (target / "tokenizer").mkdir()
        (target / "tokenizer" / "old").touch()
        target.chmod(0o750)
        with atomic_write(target) as temporary:
            (temporary / "tokenizer").mkdir(parents=True)
            (temporary / "tokenizer" / "new").touch()
            (temporary / "config.json").write_text("{}")
        assert {path.name for path in target.iterdir()} == {"checkpoint-1", "tokenizer", "config.json"}
        assert (target / "checkpoint-1" / "weights").read_text() == "kept"
        assert [path.name for path in (target / "tokenizer").iterdir()] == ["new"]
        assert target.stat().st_mode & 0o777 == 0o750
        assert list(tmp_path.iterdir()) == [target]

    def test_weights_of_an_earlier_save_do_not_outlive_new_ones(self, tmp_path):
        target = tmp_path / "model"
        target.mkdir()
        for name in ("model.safetensors", "notes.safetensors"):
            (target / name).touch()
        with atomic_write(target) as temporary:
            temporary.mkdir()
            for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
                (temporary / name).touch()
        names = {"model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.safetensors"}
        assert {path.name for path in target.iterdir()} == names

    @pytest.mark.parametrize("graphs", [("openvino_step.xml", "openvino_step.bin"), ("step.onnx", "step.onnx.data")])
    def test_an_exported_model_does_not_outlive_new_weights(self, graphs, tmp_path):
        target = tmp_path / "model"
        target.mkdir()
        exported, kept = {"export.json", "embeddings.safetensors", *graphs}, {"notes.onnx", "tokenizer.json"}
        for name in exported | kept:
            (target / name).touch()
        for written, left in (
            ("tokenizer.json", exported | kept),
            ("model.safetensors", kept | {"model.safetensors"}),
        ):
            with atomic_write(target) as temporary:
                temporary.mkdir()
                (temporary / written).touch()
            assert set(os.listdir(target)) == left

    def test_a_folder_beside_which_nothing_can_be_written_is_told(self, tmp_path, monkeypatch):
        (tmp_path / "mounted").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
        told = pytest.raises(PermissionError, match=r"mounted is put in place from beside it, .*mounted/model")
        with told, atomic_write(tmp_path / "mounted"):
            pass
        with atomic_write(tmp_path / "mounted" / "model") as temporary:
            temporary.mkdir()

    @pytest.mark.parametrize("cut", [False, True])
    def test_a_mounted_disk_keeps_what_it_has_until_the_copy_is_whole(self, cut, tmp_path, monkeypatch):
        target, copied = tmp_path / "model", []
        target.mkdir()
        (target / "config.json").write_text("old")
        monkeypatch.setattr(files_llm2slm, "_swap", lambda *_: False)

        def copy(source: Path, place: Path) -> None:
            copied.append((target / "config.json").read_text())
            if cut:
                place.write_text("ha")
                raise OSError("No space left on device")
            shutil.copy(source, place)

        monkeypatch.setattr(shutil, "move", copy)
        with pytest.raises(OSError, match="No space") if cut else nullcontext(), atomic_write(target) as temporary:
            temporary.mkdir()
            (temporary / "config.json").write_text("new")
        assert copied == ["old"]
        assert os.listdir(target) == ["config.json"]
        assert (target / "config.json").read_text() == ("old" if cut else "new")

    @pytest.mark.parametrize("why", ["somebody is in it", "it is a mount point"])
    def test_a_folder_that_cannot_be_exchanged_stays_the_same_folder(self, why, tmp_path, monkeypatch):
        target = tmp_path / "model"
        (target / "tokenizer").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "mine"):
            (target / name).write_text("old")
        if why == "somebody is in it":
            monkeypatch.chdir(target)
        else:
            monkeypatch.setattr(files_llm2slm, "_exchange", lambda *_: False)
            replace = Path.replace

            def busy(self: Path, other: Path) -> Path:
                if self == target:
                    raise OSError("Device or resource busy")
                return replace(self, other)

            monkeypatch.setattr(Path, "replace", busy)
        inode = target.stat().st_ino
        with atomic_write(target) as temporary:
            (temporary / "tokenizer").mkdir(parents=True)
            (temporary / "tokenizer" / "new").touch()
            for name in ("config.json", "model.safetensors.index.json"):
                (temporary / name).write_text("new")
        kept = {"config.json", "mine", "model.safetensors.index.json", "tokenizer"}
        assert {path.name for path in target.iterdir()} == kept
        assert (target / "config.json").read_text() == "new"
        assert (target / "mine").read_text() == "old"
        assert target.stat().st_ino == inode
        assert list(tmp_path.iterdir()) == [target]

    def test_a_link_to_a_folder_stays_a_link(self, tmp_path):
        (tmp_path / "elsewhere" / "model").mkdir(parents=True)
        (tmp_path / "model").symlink_to(tmp_path / "elsewhere" / "model")
        with atomic_write(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / "config.json").touch()
        assert (tmp_path / "model").is_symlink()
        assert (tmp_path / "elsewhere" / "model" / "config.json").exists()

    @pytest.mark.parametrize("when", ["writing", "replacing"])
    def test_a_killed_process_leaves_the_earlier_folder_whole(self, when, tmp_path):
        target = tmp_path / "model"
        target.mkdir()
        before = {"config.json": "old", "model.safetensors": "old weights"}
        for name, text in before.items():
            (target / name).write_text(text)

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            if when == "replacing":
                files_llm2slm._exchange = die
            with atomic_write(target) as folder:
                folder.mkdir()
                (folder / "model.safetensors").write_text("new weights")
                if when == "writing":
                    die()
                (folder / "config.json").write_text("new")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert {path.name: path.read_text() for path in target.iterdir()} == before


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

    def test_whole_and_in_shards_are_the_same_tensors(self, tmp_path):
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

    def test_pickled_weights_are_no_weights(self, tmp_path):
        torch.save(self.tensors, tmp_path / "pytorch_model.bin")
        with pytest.raises(OSError, match="pickled weights are not read"):
            weight_files(tmp_path, on_hub=False)

    def test_a_folder_is_never_taken_for_a_repository(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("user").mkdir()
        write_shards(Path("user/llm"), self.tensors)
        assert weight_files("user/llm", on_hub=False)
        with pytest.raises(OSError, match="on the Hub, nor in the cache"):
            weight_files("user/llm", on_hub=True)

    @pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "..", 3])
    def test_an_index_leads_nowhere_else(self, name, tmp_path):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="only safetensors files beside it are read"):
            shard_names(index)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
    def test_an_index_that_is_none_is_an_error(self, text, tmp_path):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(text)
        with pytest.raises(OSError, match="damaged: it is no index of shards"):
            shard_names(index)

    def test_a_truncated_file_is_named(self, tmp_path):
        save_file(self.tensors, tmp_path / "model.safetensors")
        os.truncate(tmp_path / "model.safetensors", 100)
        with pytest.raises(OSError, match=r"model\.safetensors is damaged or incomplete"):
            open_weights(weight_files(tmp_path, on_hub=False))


class TestFingerprint:
    def test_sharding_order_and_dtype_do_not_matter(self, tmp_path):
        state = {name: tensor for name, tensor in build_parts().llm.state_dict().items() if "embed_tokens" not in name}
        write_shards(tmp_path, dict(reversed(state.items())))
        expected = fingerprint(state)
        assert fingerprint(locate_tensors(weight_files(tmp_path, on_hub=False))) == expected
        assert fingerprint({name: tensor.bfloat16() for name, tensor in state.items()}) == expected
        assert fingerprint({name: tensor.double() for name, tensor in state.items()}) == expected

    @pytest.mark.parametrize("change", ["value", "name", "shape"])
    def test_every_tensor_counts(self, change):
        state = {name: torch.randn(3, 200) for name in "abc"}
        changed = dict(state)
        if change == "value":
            changed["b"] = state["b"] * 1.01
        elif change == "name":
            changed["d"] = changed.pop("b")
        else:
            changed["b"] = state["b"].reshape(200, 3)
        assert fingerprint(changed) != fingerprint(state)

    def test_shapes_of_every_kind(self, tmp_path):
        state = {
            "scalar": torch.tensor(2.0),
            "empty": torch.zeros(0, 4),
            "vector": torch.arange(1000.0),
            "deep": torch.randn(2, 3, 4, 5),
            "counts": torch.arange(9),
        }
        save_file(state, tmp_path / "model.safetensors")
        assert fingerprint(locate_tensors([tmp_path / "model.safetensors"])) == fingerprint(state)
