"""Saving full and lean checkpoints: what is in them, what is refused, and what an interrupted save leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    TrainingArguments,
)

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.data import atomic
from modeling_llm2slm.inference import saving
from tests.support import families
from tests.support.common import (
    PROMPTS,
    build_model,
    build_parts,
    gpt2_config,
    pad_prompts,
    same_tensors,
    t5_config,
)
from tests.support.conversions import load, names_in


LLM = "encoder.llm."


class TestLean:
    def test_a_lean_checkpoint_leaves_out_the_llm_and_loads_it_again(self, folder):
        assert not any(name.startswith(LLM) for name in names_in(folder / "lean"))
        assert any(name.startswith(LLM) for name in names_in(folder / "full"))
        full, lean = load(folder / "full"), load(folder / "lean")
        same_tensors(lean.state_dict(), full.state_dict())
        batch = pad_prompts(PROMPTS)
        assert torch.equal(lean.generate(**batch, max_new_tokens=8), full.generate(**batch, max_new_tokens=8))
        assert not lean.encoder.llm.shared.weight.requires_grad

    def test_the_config_names_the_source_of_the_llm(self, folder):
        config = json.loads((folder / "lean" / "config.json").read_text())
        assert config["lean"] is True
        assert config["llm_source"]["name_or_path"] == "../llm"
        assert len(config["llm_source"]["fingerprint"]) == 32
        assert str(folder) not in json.dumps(config)

    def test_an_llm_with_old_tensor_names_is_never_left_out(self, tmp_path):
        """As of old BERTs: transformers renames what it loads, and a lean checkpoint would not find it again."""
        families.build_llm("bert").save_pretrained(tmp_path / "llm")
        build_parts().slm.save_pretrained(tmp_path / "slm")
        file = tmp_path / "llm" / "model.safetensors"
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = {
            name.replace(ending, old.get(ending, ending)): tensor
            for name, tensor in load_file(file).items()
            for ending in [".".join(name.split(".")[-2:])]
        }
        save_file(tensors, file, metadata={"format": "pt"})
        model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(tmp_path / "llm", tmp_path / "slm")
        assert model.config.llm_source is None
        model.config.llm_source = {"name_or_path": str(tmp_path / "llm")}
        with pytest.raises(ValueError, match=r"it has no embeddings\.LayerNorm\.weight by this name: .* again"):
            model.save_pretrained(tmp_path / "lean", include_llm=False)
        model.encoder.llm.save_pretrained(tmp_path / "again", save_original_format=False)
        model.config.llm_source = {"name_or_path": str(tmp_path / "again")}
        model.save_pretrained(tmp_path / "lean", include_llm=False)
        same_tensors(load(tmp_path / "lean").state_dict(), model.state_dict())

    def test_a_relative_folder_is_never_taken_for_a_repository(self, folder, tmp_path, monkeypatch):
        """`runs/llm` could be the id of a repository."""
        shutil.copytree(folder / "llm", tmp_path / "runs" / "llm")
        monkeypatch.chdir(tmp_path)
        model = load(folder / "full")
        model.config.llm_source = {"name_or_path": "runs/llm"}
        with pytest.raises(ValueError, match=r"folder runs/llm, which nobody else has"):
            model.push_to_hub("somebody/model", include_llm=False)
        model.save_pretrained("lean", include_llm=False)
        same_tensors(load(tmp_path / "lean").state_dict(), model.state_dict())
        for name in ("a/b/c", str(tmp_path / "gone")):
            model.config.llm_source = {"name_or_path": name}
            with pytest.raises(ValueError, match=f"could not read the LLM from {name}: there is no such folder"):
                model.save_pretrained("other", include_llm=False)

    def test_a_repository_is_never_taken_for_a_folder_of_its_name(self, folder, tmp_path, monkeypatch):
        (tmp_path / "google" / "t5").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        model = load(folder / "lean")
        model.config.llm_source = {**model.config.llm_source, "name_or_path": "google/t5"}
        model.save_pretrained("lean", include_llm=False)
        config = json.loads(Path("lean", "config.json").read_text())
        assert config["llm_source"]["name_or_path"] == "google/t5"

    def test_training_continues_while_its_llm_is_out_of_reach(self, folder, tmp_path):
        shutil.copytree(folder / "llm", tmp_path / "llm")
        model = load(folder / "lean", encoder_pretrained_model_name_or_path=tmp_path / "llm")
        model.config.llm_source["fingerprint"] = load(folder / "lean").config.llm_source["fingerprint"]
        shutil.rmtree(tmp_path / "llm")
        model.save_pretrained(tmp_path / "checkpoint", include_llm=False)
        with pytest.raises(ValueError, match="there is no such folder"):
            saving.lean_source(model)

    def test_a_lean_checkpoint_never_replaces_its_llm(self, folder, tmp_path):
        shutil.copytree(folder / "full", tmp_path / "full")
        model = load(tmp_path / "full")
        model.config.llm_source = {"name_or_path": str(tmp_path / "full")}
        with pytest.raises(ValueError, match=r"full, which a lean checkpoint in .*full would replace"):
            model.save_pretrained(tmp_path / "full", include_llm=False)
        model.save_pretrained(tmp_path / "full" / "lean", include_llm=False)
        same_tensors(load(tmp_path / "full" / "lean").state_dict(), load(tmp_path / "full").state_dict())

    def test_a_named_llm_in_half_precision_is_recognized(self, folder, tmp_path):
        """The values in memory are no longer those of the files, so the fingerprint comes from the files."""
        shutil.copytree(folder / "llm", tmp_path / "llm")
        model = load(folder / "full", dtype="float16")
        model.config.llm_source = {"name_or_path": str(tmp_path / "llm")}
        model.save_pretrained(tmp_path / "lean", include_llm=False)
        load(tmp_path / "lean")
        llm = load(folder / "full").encoder.llm
        llm.shared.weight.data += 1
        llm.save_pretrained(tmp_path / "llm")
        with pytest.raises(ValueError, match="was trained with"):
            load(tmp_path / "lean")

    def test_trainer_saves_lean_checkpoints_if_include_llm_is_false(self, folder, tmp_path):
        from transformers import Trainer

        model = load(folder / "full")
        model.include_llm = False
        rows = [{"input_ids": prompt, "labels": [3, 4, 98]} for prompt in PROMPTS[:1] * 2]
        arguments = TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True)
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        for step in (1, 2):
            assert not any(name.startswith(LLM) for name in names_in(tmp_path / f"checkpoint-{step}"))
        same_tensors(load(tmp_path / "checkpoint-2").state_dict(), model.state_dict())
        again = load(folder / "full")
        trainer = Trainer(model=again, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        same_tensors(again.state_dict(), model.state_dict())

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda model: model.encoder.llm.shared.weight.data.add_(1), "it was changed"),
            (lambda model: setattr(model.config, "freeze_llm", False), "The LLM trains"),
            (lambda model: setattr(model.config, "llm_source", None), "not known where the LLM comes from"),
        ],
    )
    def test_no_lean_checkpoint_of_it_is_written(self, spoil, message, folder, tmp_path):
        model = load(folder / "lean")
        spoil(model)
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "new", include_llm=False)
        assert list(tmp_path.iterdir()) == []
        model.save_pretrained(tmp_path / "new")
        same_tensors(load(tmp_path / "new").state_dict(), model.state_dict())


class TestSaving:
    @pytest.mark.parametrize("how", ["is_main_process", "rank"])
    def test_only_one_of_several_processes_uploads(self, how, folder, tmp_path, monkeypatch):
        """The others have no weights, and would delete those that are there."""
        uploads = []
        monkeypatch.setattr(saving, "upload", lambda *_, **__: uploads.append(1))
        model = load(folder / "full")
        if how == "rank":
            monkeypatch.setattr(saving, "_is_first", lambda: False)
            assert model.push_to_hub("somebody/model") == ""
        else:
            model.save_pretrained(tmp_path / "new", push_to_hub=True, is_main_process=False)
            assert not (tmp_path / "new" / "README.md").exists()
        with pytest.raises(ValueError, match="Leave out `push_to_hub`"):
            model.save_pretrained(tmp_path / "new", push_to_hub=True, distributed_checkpoint=True)
        assert not uploads

    def test_shards_ties_and_loading_again(self, folder, tmp_path):
        torch.manual_seed(0)
        model = LLM2SLMForConditionalGeneration(
            LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config(tie_word_embeddings=True))
        ).eval()
        model.save_pretrained(tmp_path / "new")
        model.save_pretrained(tmp_path / "new", max_shard_size="20KB")
        files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors*"))
        assert "model.safetensors" not in files
        assert len(files) > 3
        loaded, info = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "new", output_loading_info=True)
        assert not any(info.values()), info
        same_tensors(loaded.state_dict(), model.state_dict())
        assert loaded.decoder.lm_head.weight is loaded.decoder.transformer.wte.weight
        assert loaded.encoder.llm.shared.weight is loaded.encoder.llm.encoder.embed_tokens.weight
        model.save_pretrained(tmp_path / "new")
        names = names_in(tmp_path / "new")
        assert sorted(path.name for path in (tmp_path / "new").glob("*.safetensors*")) == ["model.safetensors"]
        assert len(names & {"decoder.lm_head.weight", "decoder.transformer.wte.weight"}) == 1

    def test_casts_made_after_loading_are_kept(self, folder, tmp_path):
        model = load(folder / "full")
        model.encoder.llm.to(torch.bfloat16)
        model.save_pretrained(tmp_path / "new")
        assert load(tmp_path / "new").encoder.llm.dtype == torch.bfloat16
        model.to(torch.float32)
        model.save_pretrained(tmp_path / "new")
        assert load(tmp_path / "new").encoder.llm.dtype == torch.float32

    def test_no_pickle_is_written_or_read(self, folder, copy):
        assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
        (copy / "full" / "model.safetensors").unlink()
        torch.save(load(folder / "full").state_dict(), copy / "full" / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load(copy / "full")
        with pytest.raises(ValueError, match="pickled"):
            load(folder / "full", use_safetensors=False)

    def test_a_killed_save_leaves_the_earlier_checkpoint_whole(self, copy, monkeypatch):
        before = load(copy / "full").state_dict()
        changed = build_model(seed=7)

        def die(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        for step in ("write_model_card", "_exchange"):  # all but the card is written; all is
            child = os.fork()
            if child == 0:
                module: Any = saving if step == "write_model_card" else atomic
                setattr(module, step, die)
                changed.save_pretrained(copy / "full")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            same_tensors(load(copy / "full").state_dict(), before)

    def test_a_failed_save_leaves_the_model_as_it_was(self, folder, monkeypatch, tmp_path):
        model = load(folder / "lean")
        config = model.config.to_dict()
        monkeypatch.setattr(saving, "write_model_card", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save_pretrained(tmp_path / "new", include_llm=False)
        assert model.config.to_dict() == {**config, "auto_map": model.config.auto_map, "encoder_dtype": None}
        assert list(tmp_path.iterdir()) == []
