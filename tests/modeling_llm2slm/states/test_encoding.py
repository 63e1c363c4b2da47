"""`encode` stores the LLM's hidden states, each prompt once, and resumes after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from modeling_llm2slm.data import resources
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.settings import EncodeSettings
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.states.store import StateStore
from tests.support.checkpoints import PAIRS, PROMPTS, write_checkpoint, write_pairs


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("composite"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_hidden_states_are_those_of_the_llm(composite: str, data: str, tmp_path: Path, dtype: str) -> None:
    description = encode(composite, [data], tmp_path / "states", EncodeSettings(batch_size=3, dtype=dtype))
    store, text_to_text = StateStore(tmp_path / "states"), TextToText.from_pretrained(composite)
    rows = text_to_text.features(PROMPTS)["input_ids"]
    assert (description.prompts, description.tokens) == (len(PROMPTS), sum(map(len, rows)))
    for ids in rows:
        expected = text_to_text.model.encode_llm(torch.tensor([ids]))[0]
        states = store.hidden_states(ids)
        assert states.dtype == getattr(torch, dtype)
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(states.float(), expected, **tolerance)


def test_several_files_a_limit_and_truncation(composite: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text(f"{PROMPTS[0]}\nsrc50 src51\n")
    sources = [data, tmp_path / "more.txt"]
    for suffix in ("csv", "parquet"):  # their strings have another type than those of JSON lines
        table = pandas.DataFrame({"prompt": ["src50 src51"], "count": [1]}).convert_dtypes()
        getattr(table, f"to_{suffix}")(tmp_path / f"more.{suffix}", index=False)
        sources.append(tmp_path / f"more.{suffix}")
    assert encode(composite, sources, tmp_path / "all").prompts == len(PROMPTS) + 1
    assert encode(composite, sources, tmp_path / "few", EncodeSettings(limit=2)).prompts == 3
    truncated = encode(composite, sources, tmp_path / "truncated", EncodeSettings(prompt_max_length=2))
    assert truncated.tokens == 2 * truncated.prompts


def test_a_lean_checkpoint_is_refused(composite: str, data: str, tmp_path: Path) -> None:
    shutil.copytree(composite, tmp_path / "lean")
    config = json.loads((tmp_path / "lean" / "config.json").read_text())
    (tmp_path / "lean" / "config.json").write_text(json.dumps({**config, "lean": True}))
    with pytest.raises(
        ValueError, match="encode needs a full checkpoint, and .*lean is lean: run llm2slm convert full"
    ):
        encode(tmp_path / "lean", [data], tmp_path / "states")


class KilledError(Exception):
    pass


@pytest.mark.parametrize("survived", [0, 1, 3])
def test_a_killed_run_resumes(
    composite: str, data: str, tmp_path: Path, survived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(composite, [data], tmp_path / "whole", EncodeSettings(batch_size=2))
    encoded: list[int] = []
    original = LLM2SLMForConditionalGeneration.encode_llm

    def count(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if len(encoded) == survived and not (tmp_path / "again").exists():
            raise KilledError
        encoded.append(len(input_ids))
        return original(self, input_ids, attention_mask)

    monkeypatch.setattr(LLM2SLMForConditionalGeneration, "encode_llm", count)
    with pytest.raises(KilledError):
        encode(composite, [data], tmp_path / "states", EncodeSettings(batch_size=2, shard_bytes=1))
    (tmp_path / "again").touch()
    reported: list[int] = []
    encode(
        composite, [data], tmp_path / "states", EncodeSettings(batch_size=2),
        announce=lambda _, to_write: reported.append(to_write), progress=lambda done, total: reported.append(done),
    )  # fmt: skip
    assert sum(encoded) == len(PROMPTS)  # none twice
    assert reported[1:] == list(range(2 * survived, len(PROMPTS) + 1, 2))
    whole, continued = StateStore(tmp_path / "whole"), StateStore(tmp_path / "states")
    for ids in TextToText.from_pretrained(composite).features(PROMPTS)["input_ids"]:
        assert torch.equal(whole.hidden_states(ids), continued.hidden_states(ids))
    encode(composite, [data], tmp_path / "states")
    assert sum(encoded) == len(PROMPTS)


def test_processes_share_the_work(composite: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        encode(composite, [data], tmp_path / "states", EncodeSettings(batch_size=2))
    assert len(StateStore(tmp_path / "states")) == len(PROMPTS)
    assert len(list((tmp_path / "states").glob("*.safetensors"))) == 2
    with pytest.raises(ValueError, match="cannot overwrite"):
        encode(composite, [data], tmp_path / "states", EncodeSettings(overwrite=True))


def test_a_disk_that_is_too_small_is_an_error_before_any_work(
    composite: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(LLM2SLMForConditionalGeneration, "encode_llm", None)
    with pytest.raises(OSError, match=r"needs 1\.6 kB for 34 tokens, but 100 bytes are free"):
        encode(composite, [data], tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_other_data_and_models_without_an_llm_are_errors(composite: str, data: str, tmp_path: Path) -> None:
    encode(composite, [data], tmp_path / "states")
    other = write_pairs(tmp_path / "other.jsonl", PAIRS[1:])
    with pytest.raises(ValueError, match="another set of prompts"):
        encode(composite, [other], tmp_path / "states")
    (tmp_path / "states" / "mine.txt").touch()
    assert encode(composite, [other], tmp_path / "states", EncodeSettings(overwrite=True)).prompts == len(PAIRS) - 1
    assert (tmp_path / "states" / "mine.txt").exists()
    with pytest.raises(ValueError, match="not an LLM-to-SLM model"):
        encode(write_checkpoint("slm", tmp_path), [data], tmp_path / "no")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        encode(composite, [data], tmp_path / "no", EncodeSettings(dtype="int8"))


def test_a_folder_of_something_else_stays(composite: str, data: str, tmp_path: Path) -> None:
    for name, message in (("states", "states is not empty"), (composite, "would replace")):
        folder, overwrite = tmp_path / name, name == composite
        folder.mkdir(exist_ok=True)
        (folder / "mine.txt").touch()
        with pytest.raises((FileExistsError, ValueError), match=message):
            encode(composite, [data], folder, EncodeSettings(overwrite=overwrite))
        assert not list(folder.glob("st*"))
    (Path(composite) / "mine.txt").unlink()
    encode(composite, [data], tmp_path / "states", EncodeSettings(overwrite=True))
    assert (tmp_path / "states" / "mine.txt").exists()


def test_an_interrupted_store_is_resumed_even_to_overwrite(
    composite: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EncodeSettings(batch_size=2, shard_bytes=1, overwrite=True)
    encode(composite, [data], tmp_path / "states", settings)
    first = sorted((tmp_path / "states").glob("*.safetensors"))[0]
    to_write: list[int] = []
    first.unlink()
    encode(composite, [data], tmp_path / "states", settings, announce=lambda _, size: to_write.append(size))
    encode(composite, [data], tmp_path / "states", settings, announce=lambda _, size: to_write.append(size))
    assert 0 < to_write[0] < to_write[1]
