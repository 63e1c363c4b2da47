"""A store finds hidden states by token ids, maps its files, and is an error unless it is whole."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_llm2slm import DataCollatorForLLM2SLM, LLM2SLMProcessor
from modeling_llm2slm.states import writer as writer_module
from modeling_llm2slm.states.description import StoreDescription, describe, index_prompts, prompt_key
from modeling_llm2slm.states.store import StateStore, remove_store
from modeling_llm2slm.states.writer import StateWriter
from tests.support.common import PROMPTS, build_model, is_mapped, llm_tokenizer, pad_prompts, slm_tokenizer


WIDTH = 24


def states_of(ids: list[int]) -> torch.Tensor:
    """Return hidden states that identify their prompt: integers that bfloat16 holds exactly."""
    return torch.arange(len(ids))[:, None] + torch.full((len(ids), WIDTH), float(ids[0]))


def description(prompts: list[list[int]] = PROMPTS, **overrides: Any) -> StoreDescription:
    index = index_prompts(prompts)
    values = {
        "llm": "a" * 64, "encoder_layer": None, "tokenizer": "b" * 64, "data": "c" * 64, "prompts": len(index),
        "tokens": int(index["length"].sum()), "hidden_size": WIDTH,
    }  # fmt: skip
    return StoreDescription(**(values | overrides))


def write_store(folder: Path, prompts: list[list[int]] = PROMPTS, shard_bytes: int = 1) -> StateStore:
    writer = StateWriter(folder, description(prompts), shard_bytes)
    for ids in prompts:
        writer.add(ids, states_of(ids))
    writer.flush()
    return StateStore(folder)


@pytest.mark.parametrize("shard_bytes", [1, 500, 10**9])
def test_each_prompt_has_its_hidden_states(tmp_path: Path, shard_bytes: int) -> None:
    store = write_store(tmp_path / "store", shard_bytes=shard_bytes)
    assert len(store) == len(PROMPTS)
    for ids in reversed(PROMPTS):
        assert ids in store
        assert store.hidden_states(ids).dtype == torch.bfloat16
        assert torch.equal(store.hidden_states(ids).float(), states_of(ids))
    assert [1, 2, 3] not in store
    with pytest.raises(ValueError, match="prompt of 3 tokens is not in"):
        store.hidden_states([1, 2, 3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_like_its_token_ids(tmp_path: Path, side: str) -> None:
    store = write_store(tmp_path)
    batch = pad_prompts(PROMPTS, side=side, extra=2)
    states = store.batch(**batch)
    assert states.shape == (*batch["input_ids"].shape, WIDTH)
    assert not states[batch["attention_mask"] == 0].any()
    for row, mask, ids in zip(states, batch["attention_mask"], PROMPTS, strict=True):
        assert torch.equal(row[mask.bool()].float(), states_of(ids))


def test_files_are_mapped_and_workers_get_their_path(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    assert is_mapped(store.hidden_states(PROMPTS[0]))
    sent = pickle.dumps(store)
    assert len(sent) < 500
    assert torch.equal(pickle.loads(sent).hidden_states(PROMPTS[1]), store.hidden_states(PROMPTS[1]))


def test_the_collator_adds_hidden_states(tmp_path: Path) -> None:
    processor = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
    features = [dict(processor(text=f"src{i} src1", text_target="out1")) for i in range(3)]
    prompts = [row["input_ids"] for row in features]
    store = write_store(tmp_path, prompts)
    batch = DataCollatorForLLM2SLM(processor, states=store)(features)
    assert torch.equal(batch["llm_hidden_states"], store.batch(batch["input_ids"], batch["attention_mask"]))


def test_a_writer_continues_a_store(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, description(), shard_bytes=1)
    writer.add(PROMPTS[0], states_of(PROMPTS[0]))
    with pytest.raises(ValueError, match=r"not complete: it has 1 of 3 prompts.*resumes where it stopped"):
        StateStore(tmp_path)
    writer = StateWriter(tmp_path, description(), shard_bytes=1)
    assert writer.done.tolist() == [prompt_key(PROMPTS[0])]
    for ids in PROMPTS[1:]:
        writer.add(ids, states_of(ids))
    store = StateStore(tmp_path)
    assert all(torch.equal(store.hidden_states(ids).float(), states_of(ids)) for ids in PROMPTS)


def test_two_writers_share_a_store(tmp_path: Path) -> None:
    for number, prompts in enumerate((PROMPTS[:1], PROMPTS[1:])):
        writer = StateWriter(tmp_path, description(), rank=number)
        for ids in prompts:
            writer.add(ids, states_of(ids))
        writer.flush()
    assert len(StateStore(tmp_path)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm": "d" * 64}, "another LLM"),
        ({"encoder_layer": 2}, r"another encoder_layer \(None, not 2\)"),
        ({"decoder_layers": [0, 2]}, r"another decoder_layers \(None, not \[0, 2\]\)"),
        ({"tokenizer": "d" * 64}, "another tokenizer"),
        ({"data": "d" * 64}, "another set of prompts"),
        ({"dtype": "float32"}, r"another dtype \(bfloat16, not float32\)"),
    ],
)
def test_a_store_of_something_else_is_an_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_store(tmp_path)
    with pytest.raises(ValueError, match=message):
        StateWriter(tmp_path, description(**change))


def test_hidden_states_without_a_description_are_an_error(tmp_path: Path) -> None:
    write_store(tmp_path)
    (tmp_path / "store.json").unlink()
    with pytest.raises(ValueError, match="holds hidden states, but no store.json.*--overwrite"):
        StateWriter(tmp_path, description(llm="d" * 64))


def test_a_removal_deletes_the_description_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path)
    removed: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: removed.append(self.name))
    remove_store(tmp_path)
    assert removed[-1] == "store.json"
    assert sorted(removed[:-1]) == sorted(path.name for path in tmp_path.glob("states-*"))


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def kill(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        os.link(path, path.with_name(f"{path.name}.kept"))
        raise KilledError

    with monkeypatch.context() as context:
        context.setattr(writer_module, "save_file", kill)
        with pytest.raises(KilledError):
            write_store(tmp_path)
    (left,) = tmp_path.glob(".*.kept")
    left.rename(left.with_name(left.name.removesuffix(".kept")))  # as if the process had died at this point
    assert len(write_store(tmp_path)) == len(PROMPTS)
    assert not list(tmp_path.glob(".*"))


def test_hidden_states_that_overflow_are_an_error(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, description(dtype="float16"))
    writer.add([1, 2], torch.full((2, WIDTH), 6e4))
    with pytest.raises(ValueError, match="overflow in float16.*--dtype bfloat16"):
        writer.add([1, 3], torch.full((2, WIDTH), 1e5))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "removed"])
def test_a_damaged_shard_is_named_and_written_again(tmp_path: Path, damage: str) -> None:
    write_store(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-20])
        case "garbage":
            shard.write_bytes(b"no safetensors")
        case "removed":
            shard.unlink()
    with pytest.raises(ValueError, match="not complete" if damage == "removed" else r"000001.*is damaged"):
        StateStore(tmp_path)
    shard.unlink(missing_ok=True)
    writer = StateWriter(tmp_path, description())
    for ids in PROMPTS:
        if prompt_key(ids) not in writer.done:
            writer.add(ids, states_of(ids))
    writer.flush()
    assert all(torch.equal(StateStore(tmp_path).hidden_states(ids).float(), states_of(ids)) for ids in PROMPTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("{}", "cannot be read"), (None, "is not a store"), ("format", "format 0")],
)
def test_a_folder_that_is_not_a_store_is_an_error_of_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        write_store(tmp_path)
        old = {**json.loads((tmp_path / "store.json").read_text()), "format": 0}
        (tmp_path / "store.json").write_text(json.dumps(old) if content == "format" else content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        StateStore(tmp_path)
    assert "\n" not in str(caught.value)


def test_equal_prompts_count_once() -> None:
    config = build_model("add").config
    index = index_prompts([*PROMPTS, PROMPTS[0]])
    assert index["length"].tolist() == [8, 3, 12, 8]
    assert len(np.unique(index["key"])) == 3
    assert config.encoder.hidden_size == WIDTH


def test_a_store_is_checked_against_a_model(tmp_path: Path) -> None:
    model, tokenizer = build_model("add"), llm_tokenizer()
    model.save_pretrained(tmp_path / "model")
    made = describe(tmp_path / "model", model.config, tokenizer, index_prompts(PROMPTS), "bfloat16")
    assert (made.prompts, made.tokens, made.nbytes) == (3, 23, 23 * WIDTH * 2)
    writer = StateWriter(tmp_path / "store", made)
    for ids in PROMPTS:
        writer.add(ids, states_of(ids))
    writer.flush()
    store = StateStore(tmp_path / "store")
    store.check(tmp_path / "model", model.config, tokenizer)
    build_model("add", seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another LLM \([0-9a-f]{12}…, not [0-9a-f]{12}…\)"):
        store.check(tmp_path / "other", model.config, tokenizer)
    with pytest.raises(ValueError, match="another tokenizer"):
        store.check(tmp_path / "model", model.config, slm_tokenizer())
    model.config.freeze_llm = False
    with pytest.raises(ValueError, match="An LLM that trains"):
        store.check(tmp_path / "model", model.config, tokenizer)
    model.config.freeze_llm = True
    model.config.encoder_layer = 1
    with pytest.raises(ValueError, match="another encoder_layer"):
        store.check(tmp_path / "model", model.config, tokenizer)


@pytest.mark.parametrize(
    ("field", "value"), [("tokens", "many"), ("hidden_size", 0), ("dtype", "int8"), ("prompts", -1), ("llm", None)]
)
def test_a_damaged_description_is_named_with_its_field(tmp_path: Path, field: str, value: Any) -> None:
    write_store(tmp_path)
    old = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**old, field: value}))
    with pytest.raises(ValueError, match=f"store.json cannot be read: {field} is .*Encode again"):
        StateStore(tmp_path)


def test_a_shard_whose_lengths_are_not_those_of_its_states_is_damaged(tmp_path: Path) -> None:
    write_store(tmp_path)
    file = min(tmp_path.glob("states-*.safetensors"))
    tensors = load_file(file)
    save_file({**tensors, "lengths": tensors["lengths"] + 1}, file)
    with pytest.raises(ValueError, match=r"safetensors is damaged \(\d+ hidden states do not belong to"):
        StateStore(tmp_path)


def test_hidden_states_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    write_store(tmp_path)
    writer = StateWriter(tmp_path, StoreDescription.read(tmp_path))
    with pytest.raises(ValueError, match="of a prompt of 2 tokens are not finite in torch.float32"):
        writer.add([1, 2], torch.full((2, WIDTH), torch.nan))
