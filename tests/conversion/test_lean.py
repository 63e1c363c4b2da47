"""From full to lean and back: the weights are the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.conversion.lean import full, lean
from tests.support.conversions import same_bytes, weights_of, write_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_full_to_lean_and_back_keeps_every_byte(sources, tmp_path):
    report = lean(sources / "full", tmp_path / "lean")
    assert ("outputs, largest difference", "none") in report.rows
    print_of_llm = json.loads((tmp_path / "lean" / "config.json").read_text())["llm_source"]["fingerprint"]
    assert dict(report.rows)["the LLM"].endswith(f", fingerprint {print_of_llm}")
    named = lean(sources / "full", tmp_path / "named", llm=sources / "llm")
    assert dict(named.rows)["the LLM"] == f"in {sources / 'llm'}, fingerprint {print_of_llm}"
    same_bytes(weights_of(tmp_path / "lean"), weights_of(sources / "lean"))
    full(tmp_path / "lean", tmp_path / "full")
    same_bytes(weights_of(tmp_path / "full"), weights_of(sources / "full"))
    lean(tmp_path / "full", tmp_path / "lean", overwrite=True)
    same_bytes(weights_of(tmp_path / "lean"), weights_of(sources / "lean"))
    assert (tmp_path / "lean" / "decoder_tokenizer").is_dir()


def test_full_to_lean_and_back_in_shards_and_half_precision(sources, tmp_path):
    model = LLM2SLMForConditionalGeneration.from_pretrained(sources / "full", encoder_dtype="bfloat16")
    model.save_pretrained(tmp_path / "half", max_shard_size="30KB")
    lean(tmp_path / "half", tmp_path / "lean", max_shard_size="30KB")
    full(tmp_path / "lean", tmp_path / "full", max_shard_size="50KB")
    same_bytes(weights_of(tmp_path / "full"), weights_of(tmp_path / "half"))


def test_the_llm_can_be_named(sources, tmp_path):
    shutil.copytree(sources / "llm", tmp_path / "copy")
    lean(sources / "full", tmp_path / "lean", llm=tmp_path / "copy")
    model = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "lean")
    assert model.config.llm_source["name_or_path"] == str(tmp_path / "copy")
    full(tmp_path / "lean", tmp_path / "full", llm=sources / "llm")
    same_bytes(weights_of(tmp_path / "full"), weights_of(sources / "full"))


def test_an_llm_inside_the_replaced_folder_is_kept(sources, tmp_path):
    shutil.copytree(sources / "full", tmp_path / "full")
    shutil.copytree(sources / "llm", tmp_path / "full" / "llm")
    with pytest.raises(ValueError, match="which a lean checkpoint in .*full would replace"):
        lean(tmp_path / "full", tmp_path / "full", llm=tmp_path / "full" / "llm", overwrite=True)
    assert (tmp_path / "full" / "llm" / "model.safetensors").is_file()


def test_another_llm_is_an_error(sources, tmp_path):
    shutil.copytree(sources / "two", tmp_path / "other")
    with pytest.raises(ValueError, match="could not read this LLM from .*slm, as it has no"):
        lean(sources / "full", tmp_path / "lean", llm=sources / "slm")
    with pytest.raises(OSError, match="is another LLM"):
        full(sources / "lean", tmp_path / "full", llm=sources / "slm")
    with pytest.raises(ValueError, match="neither a folder nor"):
        lean(sources / "full", tmp_path / "lean", llm="./nowhere")
    with pytest.raises(OSError, match="^no/where cannot be loaded: there is no such folder"):
        lean(sources / "full", tmp_path / "lean", llm="no/where")
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_a_checkpoint_that_has_the_form_already_is_an_error(sources, tmp_path):
    with pytest.raises(ValueError, match="is lean already"):
        lean(sources / "lean", tmp_path / "new")
    with pytest.raises(ValueError, match="is full already"):
        full(sources / "full", tmp_path / "new")
