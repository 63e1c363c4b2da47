"""Loading full and lean checkpoints: where the LLM of a lean one comes from, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    T5ForConditionalGeneration,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, checkpoint_llm2slm, files_llm2slm
from modeling_llm2slm.states.without_llm import load_without_llm
from tests.support import families
from tests.support.common import (
    PROMPTS,
    build_parts,
    make_labels,
    pad_prompts,
    same_tensors,
    t5_config,
)
from tests.support.conversions import edit, load, names_in


LLM = "encoder.llm."


class TestLean:
    def test_nothing_is_missing_or_unexpected(self, folder):
        for kind in ("full", "lean"):
            _, info = AutoModelForSeq2SeqLM.from_pretrained(folder / kind, output_loading_info=True)
            assert not any(info.values()), info

    def test_the_source_of_the_llm_is_logged(self, folder, caplog):
        load(folder / "lean")
        assert f"the LLM's weights are read from {folder / 'llm'}" in caplog.text

    def test_a_lean_checkpoint_and_its_llm_can_move_together(self, copy, tmp_path):
        before = load(copy / "full").state_dict()
        shutil.move(copy, tmp_path / "elsewhere")
        model = load(tmp_path / "elsewhere" / "lean")
        assert model.config.llm_source["name_or_path"] == str(tmp_path / "elsewhere" / "llm")
        same_tensors(model.state_dict(), before)

    def test_a_checkpoint_in_a_subfolder(self, copy):
        load(copy / "full").save_pretrained(copy / "many" / "lean", include_llm=False)
        loaded = LLM2SLMForConditionalGeneration.from_pretrained(copy / "many", subfolder="lean")
        assert loaded.config.llm_source["name_or_path"] == str(copy / "llm")
        edit(copy / "lean", llm_source={"subfolder": "../slm"})
        with pytest.raises(ValueError, match="encoder_pretrained_model_name_or_path"):
            load(copy / "lean")

    def test_an_llm_that_moved_alone_is_named_by_the_caller(self, copy):
        (copy / "llm").rename(copy / "other")
        with pytest.raises(OSError, match=r"llm has no model\.safetensors"):
            load(copy / "lean")
        model = load(copy / "lean", encoder_pretrained_model_name_or_path=copy / "other")
        model.save_pretrained(copy / "again", include_llm=False)
        same_tensors(load(copy / "again").state_dict(), model.state_dict())

    @pytest.mark.parametrize("kwargs", [{}, {"max_shard_size": "20KB"}])
    def test_an_llm_with_head_decoder_and_shards(self, kwargs, tmp_path):
        torch.manual_seed(3)
        T5ForConditionalGeneration(t5_config()).save_pretrained(tmp_path / "llm", **kwargs)
        build_parts().slm.save_pretrained(tmp_path / "slm")
        model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
            tmp_path / "llm", tmp_path / "slm", encoder_layer=2
        )
        model.save_pretrained(tmp_path / "lean", include_llm=False)
        same_tensors(load(tmp_path / "lean").state_dict(), model.state_dict())

    @pytest.mark.parametrize(
        ("family", "kind"), [*((family, "head") for family in families.LLMS), ("t5gemma", "base"), ("bart", "base")]
    )
    def test_every_family_of_llm(self, family, kind, tmp_path):
        llm = families.build_llm(family)
        if kind == "head":
            heads = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM}
            decoder_only = families.LLMS[family].layer is not None
            auto_class = heads.get(family, AutoModelForCausalLM if decoder_only else AutoModelForSeq2SeqLM)
            llm = auto_class.from_config(families.LLMS[family].config(vocab_size=families.LLM_VOCAB_SIZE))
        llm.save_pretrained(tmp_path / "llm")
        build_parts().slm.save_pretrained(tmp_path / "slm")
        model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
            tmp_path / "llm", tmp_path / "slm", encoder_layer=families.LLMS[family].layer
        )
        model.save_pretrained(tmp_path / "lean", include_llm=False)
        loaded, info = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "lean", output_loading_info=True)
        assert not any(info.values()), info
        same_tensors(loaded.state_dict(), model.state_dict())

    def test_a_checkpoint_behind_a_symbolic_link_finds_its_llm(self, folder, tmp_path):
        model = load(folder / "full")
        (tmp_path / "2026").mkdir()
        shutil.copytree(folder / "llm", tmp_path / "llm")
        model.config.llm_source = {"name_or_path": str(tmp_path / "llm")}
        (tmp_path / "latest").symlink_to(Path("2026", "lean"))
        model.save_pretrained(tmp_path / "latest", include_llm=False)
        loaded = load(tmp_path / "latest")
        same_tensors(loaded.state_dict(), model.state_dict())
        assert loaded.config.llm_source["name_or_path"] == str(tmp_path / "llm")

    def test_the_llm_can_come_from_a_full_composite(self, folder):
        model = load(folder / "lean", encoder_pretrained_model_name_or_path=folder / "full")
        same_tensors(model.state_dict(), load(folder / "full").state_dict())

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_full_and_lean_checkpoints_load_alike_in_half_precision(self, folder, dtype):
        full, lean = load(folder / "full", dtype=dtype), load(folder / "lean", dtype=dtype)
        assert lean.encoder.llm.dtype == lean.decoder.dtype == getattr(torch, dtype)
        same_tensors(lean.state_dict(), full.state_dict())
        lean = load(folder / "lean", encoder_dtype=dtype)
        assert (lean.encoder.llm.dtype, lean.decoder.dtype) == (getattr(torch, dtype), torch.float32)

    def test_a_lean_checkpoint_of_an_llm_in_half_precision(self, folder, tmp_path):
        for dtype in ("bfloat16", "float16"):
            model = load(folder / "lean", encoder_dtype=dtype)
            model.save_pretrained(tmp_path / dtype, include_llm=False)
            same_tensors(load(tmp_path / dtype).state_dict(), model.state_dict())

    def test_device_maps(self, folder, tmp_path):
        batch = pad_prompts(PROMPTS)
        expected = load(folder / "full")(**batch, labels=make_labels()).logits
        on_disk = {"encoder.llm": "disk", "encoder.projector": 0, "encoder.prompt_embedding": 0, "decoder": 0}
        for device_map in ({"": "cpu"}, {name: place or "cpu" for name, place in on_disk.items()}):
            model = load(folder / "lean", device_map=device_map, offload_folder=tmp_path / "offload")
            assert model.encoder.llm.shared.weight.is_meta == ("disk" in device_map.values())
            assert torch.allclose(model(**batch, labels=make_labels()).logits, expected, atol=1e-5)

    def test_quantization_applies_to_the_llm_of_a_lean_checkpoint(self, folder):
        model = load(folder / "lean", quantization_config=RoundingConfig())
        full = load(folder / "full", quantization_config=RoundingConfig())
        assert model.encoder.llm.encoder.block[0].layer[0].SelfAttention.q.weight.frac().abs().sum() == 0
        same_tensors(model.state_dict(), full.state_dict())

    def test_hub_arguments_reach_the_source_of_the_llm(self, copy, monkeypatch):
        asked = {}

        def download(repo_id: str, name: str, **kwargs: Any) -> str:
            asked.update(kwargs, repo_id=repo_id)
            return str(copy / "llm" / name)

        monkeypatch.setattr(files_llm2slm, "hf_hub_download", download)
        source = {"name_or_path": "google/t5", "revision": "abc"}
        edit(copy / "lean", llm_source=source)
        model = load(copy / "lean", cache_dir="/cache", token="secret", local_files_only=True, revision="not-this")
        expected = {"cache_dir": "/cache", "token": "secret", "local_files_only": True, "revision": "abc"}
        assert asked == {"repo_id": "google/t5", "subfolder": None, **expected}
        assert model.config.llm_source["name_or_path"] == "google/t5"
        load(copy / "lean", encoder_pretrained_model_name_or_path="other/t5", encoder_revision="main")
        assert (asked["repo_id"], asked["revision"]) == ("other/t5", "main")


def parts_of(family: str, width: int = 32) -> dict[str, Any]:
    """Return the arguments of a config: an LLM of this family, and a GPT-2 of some width."""
    encoder = families.LLMS[family].config(vocab_size=families.LLM_VOCAB_SIZE)
    decoder = families.SLMS["gpt2"].config(n_embd=width)
    return {"encoder": encoder, "decoder": decoder, "encoder_layer": families.LLMS[family].layer}


def fusion_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.encoder.named_parameters() if not name.startswith("llm.")}


def check_new(model: Any, new: str, saved: Any = None) -> None:
    """Weights whose name contains `new` have the scale of a fresh model's, and all others are as saved."""
    fresh = fusion_weights(LLM2SLMForConditionalGeneration(model.config))
    for name, weight in fusion_weights(model).items():
        if new in name and weight.dim() == 2:
            assert 0.6 < weight.float().std() / fresh[name].float().std() < 1.6, name
        elif new in name and name.endswith("linear_1.bias"):  # shifts hidden states by their mean
            assert weight.float().norm() < 3 * fresh[name].float().norm() + 0.1, name
        elif new in name:
            assert not weight.any(), name
    for name, weight in (saved.state_dict() if saved is not None else {}).items():
        if new not in name and not model.state_dict()[name].is_meta:
            assert torch.equal(model.state_dict()[name], weight), name


def without(folder: Path, *parts: str) -> Path:
    """Remove from a checkpoint the weights whose names contain one of `parts`."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=families.LLMS)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration(LLM2SLMConfig(**parts_of(request.param))).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "whole")
    for name, parts in {"no_fusion": ("projector", "prompt_embedding"), "no_embedding": ("prompt_emb",)}.items():
        shutil.copytree(folder / "whole", folder / name)
        without(folder / name, *parts)
    return request.param, model, folder


class TestNewWeights:
    def test_without_those_of_the_fusion(self, saved):
        _, model, folder = saved
        for kwargs in ({}, {"device_map": "cpu"}, {"device_map": "auto"}):
            loaded, info = LLM2SLMForConditionalGeneration.from_pretrained(
                folder / "no_fusion", output_loading_info=True, **kwargs
            )
            assert info["missing_keys"] == {f"encoder.{name}" for name in fusion_weights(model)}
            check_new(loaded, "encoder.p", model)
            check_new(loaded, "p")
        check_new(load(folder / "no_fusion", dtype=torch.bfloat16), "p")

    def test_an_older_checkpoint_has_no_mean_and_scale(self, saved, tmp_path):
        """Its projector was trained on hidden states as they are, so they stay so, and nothing is reported missing."""
        _, model, folder = saved
        shutil.copytree(folder / "whole", tmp_path / "old")
        without(tmp_path / "old", "projector.mean", "projector.scale")
        old, info = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / "old", output_loading_info=True)
        assert not any(info.values()), info
        projector, states = old.encoder.projector, torch.randn(2, 3, old.config.llm_hidden_size)
        first = torch.nn.functional.linear(states, model.encoder.projector.linear_1.weight, projector.linear_1.bias)
        assert torch.equal(projector(states), projector.linear_2(first.relu()))
        assert model.encoder.projector.scale.ne(1).any()
        without(tmp_path / "old", "linear_2")
        assert load(tmp_path / "old").encoder.projector.scale.eq(1).all()
        without(tmp_path / "old", "linear_1")
        assert load(tmp_path / "old").encoder.projector.scale.ne(1).any()  # new, as its weights

    def test_without_one_module_of_the_fusion(self, saved):
        _, model, folder = saved
        check_new(load(folder / "no_embedding"), "prompt_embedding", model)

    def test_with_more_layers_in_the_projector(self, saved):
        _, model, folder = saved
        check_new(load(folder / "whole", projector_layers=3), "linear_3", model)

    def test_with_an_slm_of_another_width(self, saved):
        family, _, folder = saved
        config = LLM2SLMConfig(**parts_of(family, width=48))
        loaded = load(folder / "whole", config=config, ignore_mismatched_sizes=True)
        check_new(loaded, "p")
        assert loaded.config.hidden_size == 48

    def test_from_an_empty_state_dict(self, saved):
        config = LLM2SLMConfig(**parts_of(saved[0]))
        loaded = LLM2SLMForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
        check_new(loaded, "p")
        assert torch.isfinite(loaded(**pad_prompts(PROMPTS), labels=make_labels()).loss)

    def test_of_another_fusion(self, saved, tmp_path):
        family, *_ = saved
        model = LLM2SLMForConditionalGeneration(LLM2SLMConfig(**parts_of(family), fusion="replace")).eval()
        model.save_pretrained(tmp_path)
        check_new(load(tmp_path, fusion="add"), "prompt_embedding", model)

    @pytest.mark.parametrize("part", ["encoder.llm", "decoder"])
    def test_with_a_model_on_the_disk(self, part, saved, tmp_path):
        _, model, folder = saved
        places = dict.fromkeys(("encoder.llm", "encoder.projector", "encoder.prompt_embedding", "decoder"), "cpu")
        loaded = load(folder / "no_fusion", device_map=places | {part: "disk"}, offload_folder=tmp_path)
        check_new(loaded, "encoder.p", model)
        check_new(loaded, "p")

    def test_that_are_offloaded_themselves_are_an_error(self, copy, tmp_path):
        places = dict.fromkeys(("encoder.llm", "encoder.prompt_embedding", "decoder"), "cpu")
        without(copy / "full", "projector")
        with pytest.raises(ValueError, match="projector.linear_1.bias`, which cannot be initialized"):
            load(copy / "full", device_map=places | {"encoder.projector": "disk"}, offload_folder=tmp_path)

    def test_of_a_lean_checkpoint(self, copy):
        saved = load(copy / "lean")
        check_new(load(without(copy / "lean", "linear_2")), "linear_2", saved)
        check_new(load(copy / "lean", quantization_config=RoundingConfig(), projector_layers=3), "linear_3")


class TestAnotherLLM:
    def test_loading_it_names_both_fingerprints(self, folder, tmp_path):
        build_parts(seed=5).llm.save_pretrained(tmp_path / "other")
        expected = load(folder / "lean").config.llm_source["fingerprint"]
        with pytest.raises(ValueError, match=f"has fingerprint [0-9a-f]{{32}}, but .* was trained with {expected}"):
            load(folder / "lean", encoder_pretrained_model_name_or_path=tmp_path / "other")

    def test_one_of_other_sizes_is_recognized_by_its_missing_weights(self, folder, tmp_path):
        T5ForConditionalGeneration(t5_config(num_layers=1)).save_pretrained(tmp_path / "other")
        with pytest.raises(OSError, match="other is another LLM: it lacks"):
            load(folder / "lean", encoder_pretrained_model_name_or_path=tmp_path / "other")


class TestUntrustedCheckpoints:
    @pytest.mark.parametrize("name", ["/etc", "~/llm", "C:\\llm", "a/b/c", "", 7, None])
    def test_the_llm_must_be_a_repository_or_a_relative_folder(self, name, copy):
        edit(copy / "lean", llm_source={"name_or_path": name})
        with pytest.raises(ValueError, match="encoder_pretrained_model_name_or_path|its values must be text"):
            load(copy / "lean")

    def test_a_checkpoint_of_the_hub_cannot_name_a_folder(self, copy, monkeypatch):
        # What is not a folder comes from the Hub, also where a folder of the LLM's name is at hand.
        monkeypatch.chdir(copy)
        model = load(copy / "full")
        request = checkpoint_llm2slm.LoadRequest("user/model", None, None, None, False, {})
        for name in ("../llm", "./llm", str(copy / "llm")):
            with pytest.raises(ValueError, match="neither a repository nor"):
                checkpoint_llm2slm._llm_weights(model, {"name_or_path": name}, request)
        with pytest.raises(OSError, match="nor in the cache"):
            checkpoint_llm2slm._llm_weights(model, {"name_or_path": "llm"}, request)

    def test_code_of_the_llms_source_is_never_run(self, copy, tmp_path):
        code = f"open({str(tmp_path / 'run')!r}, 'w')\n"
        for part in ("llm", "lean"):
            (copy / part / "evil.py").write_text(code)
            edit(copy / part, auto_map={"AutoConfig": "evil.A", "AutoModel": "evil.B"})
        load(copy / "lean", trust_remote_code=True)
        AutoModelForSeq2SeqLM.from_pretrained(copy / "lean", trust_remote_code=True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        "changes",
        [
            {"transformers_weights": "../llm/model.safetensors"},
            {"transformers_weights": "adapter_model.bin"},
            {"attn_implementation": "somebody/kernel"},
            {"encoder": {"_attn_implementation": "somebody/kernel"}},
        ],
    )
    def test_a_checkpoint_cannot_choose_other_files_or_kernels(self, changes, copy):
        edit(copy / "full", **changes)
        with pytest.raises(ValueError, match="the caller's to choose"):
            load(copy / "full")

    def test_shards_must_be_in_the_folder(self, copy):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names_in(copy / "full"), "../full/secret.safetensors")}
        (copy / "full" / "model.safetensors").rename(copy / "full" / "secret.safetensors")
        (copy / "full" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="only safetensors files in its folder are read"):
            load(copy / "full")

    @pytest.mark.parametrize(
        "changes",
        [
            {"decoder": {"vocab_size": 10**9}},
            {"decoder": {"n_positions": 10**9}},
            {"encoder": {"d_ff": 10**10}},
            {"decoder": {"n_layer": 10**9}},
            {"encoder": {"num_layers": 999, "d_model": 10**6}},
        ],
    )
    def test_sizes_are_checked_before_memory_is_taken(self, changes, copy):
        edit(copy / "full", **changes)
        with pytest.raises(ValueError, match=r"Correct the sizes in config\.json|a number up to 1000 is needed"):
            load(copy / "full")

    def test_a_checkpoint_that_lacks_its_llm_is_an_error(self, copy):
        edit(copy / "lean", lean=False)
        with pytest.raises(OSError, match="lacks the LLM"):
            load(copy / "lean")

    @pytest.mark.parametrize("kind", ["embedding alone", "one layer short"])
    def test_a_checkpoint_that_lacks_a_part_of_its_llm_is_an_error(self, kind, copy):
        if kind == "embedding alone":
            load_without_llm(copy / "full").save_pretrained(copy / "full")
            load_without_llm(copy / "full")
        else:
            tensors = load_file(copy / "full" / "model.safetensors")
            del tensors[f"{LLM}encoder.block.2.layer.0.SelfAttention.q.weight"]
            save_file(tensors, copy / "full" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(OSError, match="lacks the LLM"):
            load(copy / "full")
        load(copy / "full", encoder_pretrained_model_name_or_path=copy / "llm")


@register_quantization_config("rounding")
class RoundingConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = "rounding"


@register_quantizer("rounding")
class Rounding(HfQuantizer):
    """Rounds every linear layer of the LLM once it is loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.prepared = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.encoder.llm.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.mul_(10).round_()
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
