"""What all engines that run graphs have in common: the files they write, their defaults and their contestants."""

from __future__ import annotations

import shutil

import torch
from transformers import GenerationConfig

from modeling_llm2slm import ExportedLLM2SLM
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.inference.engine import engine, fingerprint_of
from tests.support.common import PROMPTS
from tests.support.exports import KINDS, checkpoint, exported_folder, needs, reuse_graphs


def test_every_file_that_an_engine_writes_identifies_the_model(tmp_path_factory, tmp_path) -> None:
    needs("openvino")
    copied = shutil.copytree(exported_folder(tmp_path_factory, *KINDS[0]), tmp_path / "copied")
    before = {fingerprint_of(copied)}
    names = {file.name for file in copied.iterdir()}
    written = {name for name in names if name.startswith(("export", "embeddings", "openvino"))}
    assert len(written) == 2 + 2 * 2  # a manifest, a table, and two graphs of two files
    for name in written:
        with (copied / name).open("ab") as file:
            file.write(b" ")
        after = fingerprint_of(copied)
        assert after not in before, name
        before.add(after)


def test_unsupported_defaults_of_the_checkpoint_are_left_out(tmp_path_factory, tmp_path, monkeypatch) -> None:
    needs("openvino")
    reuse_graphs(exported_folder(tmp_path_factory, *KINDS[0]), monkeypatch)
    source = checkpoint(*KINDS[0], tmp_path / "source")
    defaults = GenerationConfig.from_pretrained(source)
    defaults.update(cache_implementation="static", max_cache_len=64, prompt_lookup_num_tokens=2, num_beams=3)
    defaults.save_pretrained(source)
    export(source, tmp_path / "fast", engine="openvino")
    exported = ExportedLLM2SLM.from_pretrained(tmp_path / "fast")
    assert exported.generation_config.num_beams == 3
    assert exported.generate(input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=4).shape[0] == 1


def test_contestants_need_what_quantizes_their_weights() -> None:
    packages = {name: contestant.packages for name, contestant in engine("openvino").contestants().items()}
    plain, quantized = ("openvino",), ("openvino", "nncf")
    assert packages == {
        f"{model}-openvino-{weights}": needed
        for model in ("llm", "llm2slm")
        for weights, needed in (("fp32", plain), ("bf16", plain), ("int8", quantized), ("int4", quantized))
    }
