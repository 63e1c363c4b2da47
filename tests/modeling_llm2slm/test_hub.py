"""Uploads and downloads through the official client, over HTTP, against a Hub on this machine."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests.support import fresh_process, hub_server
from tests.support.hub_server import Hub


# What every process below starts with.
SETUP = """
import json, os, sys
from transformers.utils import logging
logging.disable_progress_bar()
def outcome(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
        return "loaded"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""
MODEL = """
import torch
from tests.support.common import build_parts, llm_tokenizer, slm_tokenizer
from modeling_llm2slm import LLM2SLMForConditionalGeneration as Model, LLM2SLMProcessor
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, AutoConfig
parts = build_parts()
model, processor = parts.model, LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
"""
# A full model in two revisions with its processor, its LLM, a lean model, and a private one.
AUTHOR = (
    SETUP
    + MODEL
    + """
first = model.push_to_hub("tester/model", commit_message="first")
processor.push_to_hub("tester/model")
model.push_to_hub("tester/model", revision="other", tags=["mine"])
torch.nn.init.ones_(model.decoder.transformer.ln_f.bias)
model.push_to_hub("tester/model", max_shard_size="50KB")
model.push_to_hub("tester/private", private=True)
parts.llm.push_to_hub("tester/llm")
lean = Model.from_encoder_decoder_pretrained("tester/llm", decoder_model=parts.slm)
lean.push_to_hub("tester/lean", include_llm=False)
parts.llm.save_pretrained(LLM)
local = Model.from_encoder_decoder_pretrained(LLM, decoder_model=parts.slm)
local = outcome(local.push_to_hub, "tester/no", include_llm=False)
print(json.dumps({"first": first.rpartition("/")[2], "source": lean.config.llm_source, "local": local}))
"""
)


def client(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that knows this Hub only."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        **more,
    }


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server.serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> Any:
    """What the author says after the uploads."""
    home = tmp_path_factory.mktemp("author")
    code = f"LLM = {str(home / 'llm')!r}" + AUTHOR
    return fresh_process.run(code, **client(hub, home, HF_TOKEN=hub_server.TOKEN))


def test_an_upload_is_complete(hub, pushed):
    model = hub.repositories["tester/model"]
    _, files = model.at("main")
    assert {"README.md", "config.json", "modeling_llm2slm.py", "tokenizer.json", "processor_config.json"} <= set(files)
    assert "model.safetensors.index.json" in files
    assert "model.safetensors" not in files, "weights of an earlier upload are left"
    assert any(oid for oid, _ in files.values()), "nothing went the way of large files"
    _, lean = hub.repositories["tester/lean"].at("main")
    weights = safetensors.torch.load(hub.large.get(*lean["model.safetensors"]))
    assert any(name.startswith("decoder.") for name in weights)
    assert not any(name.startswith("encoder.llm.") for name in weights)
    card = files["README.md"][1].decode()
    assert 'name = "tester/model"' in card
    assert b"- mine" in model.at("other")[1]["README.md"][1]
    assert "/tmp" not in lean["config.json"][1].decode()


def test_a_lean_upload_names_a_repository_at_a_commit(hub, pushed):
    assert pushed["source"]["name_or_path"] == "tester/llm"
    assert pushed["source"]["revision"] == hub.repositories["tester/llm"].branches["main"]
    assert "lean checkpoint on the Hub has to name a repository" in pushed["local"]
    assert "tester/no" not in hub.repositories


def test_other_users_can_load_an_upload(hub, pushed, tmp_path):
    code = (
        SETUP
        + MODEL
        + f"""
load = AutoModelForSeq2SeqLM.from_pretrained
models = [load("tester/model", revision=revision) for revision in ("main", {pushed["first"]!r}, "other")]
lean, info = Model.from_pretrained("tester/lean", output_loading_info=True)
again = AutoProcessor.from_pretrained("tester/model")
texts = dict(text=["src1"], text_target=["out1"])
at_llm = dict(encoder_pretrained_model_name_or_path="tester/llm", encoder_revision="nowhere")
print(json.dumps({{
    "sums": [float(one.decoder.transformer.ln_f.bias.sum()) for one in models],
    "lean": torch.equal(lean.encoder.llm.shared.weight, parts.llm.shared.weight) and not any(info.values()),
    "text": dict(again(**texts)) == dict(processor(**texts)),
    "private": outcome(load, "tester/private"),
    "private processor": outcome(AutoProcessor.from_pretrained, "tester/private"),
    "revision": outcome(load, "tester/model", revision="nowhere"),
    "processor revision": outcome(AutoProcessor.from_pretrained, "tester/model", revision="nowhere"),
    "config revision": outcome(AutoConfig.from_pretrained, "tester/model", revision="nowhere"),
    "write": outcome(model.push_to_hub, "tester/model"),
    "write as guest": outcome(model.push_to_hub, "tester/model", token={hub_server.GUEST_TOKEN!r}),
    "llm": outcome(load, "tester/lean", **at_llm),
    "offline": outcome(load, "tester/lean", local_files_only=True),
    "elsewhere": outcome(load, "tester/lean", local_files_only=True, cache_dir={str(tmp_path / "empty")!r}),
}}))
"""
    )
    before = hub.repositories["tester/model"].at("main")
    said = fresh_process.run(code, **client(hub, tmp_path, HF_TOKEN=""))
    assert said["sums"] == [32.0, 0.0, 0.0]
    assert said["lean"] is True
    assert said["text"] is True
    assert said["offline"] == "loaded"
    for what, words in {
        "private": "tester/private is not a local folder",
        "private processor": "tester/private is not a local folder",
        "revision": "nowhere is not a valid git identifier",
        "processor revision": "nowhere",
        "config revision": "nowhere is not a valid git identifier",
        "write": "401 Unauthorized",
        "write as guest": "403 Forbidden",
        "llm": "tester/llm cannot be fetched from the Hub",
        "elsewhere": "couldn't find them in the cached files",
    }.items():
        assert words in said[what], said[what]
    assert hub.repositories["tester/model"].at("main") == before


def test_the_code_of_an_upload_runs_without_the_package(hub, pushed, tmp_path):
    code = (
        SETUP
        + """
from transformers import AutoModelForSeq2SeqLM, AutoProcessor
asked = outcome(AutoModelForSeq2SeqLM.from_pretrained, "tester/lean", trust_remote_code=False)
model = AutoModelForSeq2SeqLM.from_pretrained("tester/lean", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("tester/model", trust_remote_code=True)
batch = processor(text=["src1 src2"], return_tensors="pt")
print(json.dumps([asked, model.generate(**batch, max_new_tokens=4).shape[0]]))
"""
    )
    environment = client(hub, tmp_path, HF_TOKEN="")
    asked, rows = fresh_process.run(code, package=False, **environment)
    assert "trust_remote_code=True" in asked
    assert rows == 1


def test_an_interrupted_upload_is_repeated(hub, tmp_path):
    reached, go_on = threading.Event(), threading.Event()

    def stop_at_the_third(number: int) -> None:
        if number == 3:
            while not any(oid in hub.large for oid in hub.uploads):
                time.sleep(0.01)  # three may be on their way at once
            reached.set()
            go_on.wait(60)

    hub.uploads.clear()
    hub.on_upload = stop_at_the_third
    code = SETUP + MODEL + 'model.push_to_hub("tester/again", max_shard_size="20KB"); print(json.dumps("done"))'
    environment = client(hub, tmp_path, HF_TOKEN=hub_server.TOKEN)
    process = fresh_process.start(code, **environment)
    assert reached.wait(60)
    process.kill()
    process.communicate()
    go_on.set()
    hub.on_upload = lambda number: None
    assert set(hub.repositories["tester/again"].at("main")[1]) == set(), "half an upload can be seen"
    sent = [oid for oid in hub.uploads if oid in hub.large]
    hub.uploads.clear()
    assert fresh_process.run(code, **environment) == "done"
    _, files = hub.repositories["tester/again"].at("main")
    assert all(oid is None or oid in hub.large for oid, _ in files.values())
    assert "config.json" in files
    assert sent
    assert not set(sent) & set(hub.uploads), "what had arrived was sent again"
    shutil.rmtree(tmp_path, ignore_errors=True)
