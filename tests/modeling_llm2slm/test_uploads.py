"""What a saved model brings along: its code, which works where nothing but transformers is, and its files exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor, AutoTokenizer

import modeling_llm2slm
from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from tests.support import families, fresh_process
from tests.support.common import (
    PROMPTS,
    build_parts,
    compose,
    gpt2_config,
    llm_tokenizer,
    pad_prompts,
    slm_tokenizer,
    t5_config,
)


MODEL_FILES = {
    "cache_llm2slm.py",
    "checkpoint_llm2slm.py",
    "configuration_llm2slm.py",
    "files_llm2slm.py",
    "fusion_llm2slm.py",
    "generation_llm2slm.py",
    "modeling_llm2slm.py",
    "parts_llm2slm.py",
    "processing_llm2slm.py",
}
DATA_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "decoder_tokenizer/tokenizer.json",
    "decoder_tokenizer/tokenizer_config.json",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_parts().model.save_pretrained(folder)
    LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer()).save_pretrained(folder)
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_upload_holds_exactly_these_files(saved, tmp_path):
    assert files_in(saved) == MODEL_FILES | DATA_FILES
    LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer()).save_pretrained(tmp_path)
    processor_files = {name for name in DATA_FILES if "tokenizer" in name or "processor" in name}
    assert files_in(tmp_path) == processor_files | {"processing_llm2slm.py"}


def test_saving_returns_the_paths_of_the_files_of_a_processor(tmp_path):
    written = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer()).save_pretrained(tmp_path / "model")
    assert all(Path(path).is_relative_to(tmp_path / "model") for path in written)
    assert all(Path(path).is_file() for path in written)


@pytest.mark.parametrize("argument", [{"include_llm": False}, {"card": {"name": "model"}}])
def test_the_uploaded_code_says_what_needs_the_package(argument, tmp_path):
    model = modeling_llm2slm.modeling_llm2slm.LLM2SLMForConditionalGeneration(
        LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config())
    )
    with pytest.raises(ValueError, match="pip install modeling-llm2slm"):
        model.save_pretrained(tmp_path / "model", **argument)
    assert not list(tmp_path.iterdir())


def test_the_code_is_short_enough_to_audit():
    lines = [len((Path(modeling_llm2slm.__file__).parent / name).read_text().splitlines()) for name in MODEL_FILES]
    assert len(lines) <= 9
    assert sum(lines) <= 2400


def test_one_tokenizer_for_both_sides_is_saved_twice(tmp_path):
    tokenizer = llm_tokenizer()
    LLM2SLMProcessor(tokenizer, tokenizer).save_pretrained(tmp_path / "shared")
    loaded = AutoProcessor.from_pretrained(tmp_path / "shared")
    assert loaded.decoder_tokenizer.get_vocab() == loaded.tokenizer.get_vocab() == tokenizer.get_vocab()


# What runs where only transformers is. `FOLDER` holds `model`, and `cache`, a model of that fusion.
TRAINING = """
import json, torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoProcessor
path = FOLDER + "/model"
config = AutoConfig.from_pretrained(path, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
batch = processor(text=["src1 src2", "src3"], text_target=["out1", "out2 out3"], padding=True, return_tensors="pt")
tokens = model.generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=5)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.1)
loss = model(**batch).loss
loss.backward()
optimizer.step()
after = model.state_dict()
changed = [name for name in before if not torch.equal(before[name], after[name])]
frozen = not any(name.startswith("encoder.llm.") for name in changed)
changed = {name.split(".")[0] for name in changed}
model.save_pretrained(FOLDER + "/trained", include_llm=True)
processor.save_pretrained(FOLDER + "/trained")
print(json.dumps([type(config).__module__, tokens.tolist(), float(loss), sorted(changed), frozen]))
"""
AUTO_MODEL = """
import json
from transformers import AutoModel
model = AutoModel.from_pretrained(FOLDER + "/model", trust_remote_code=True)
model.save_pretrained(FOLDER + "/again")
print(json.dumps([type(model).__name__, type(model).__module__]))
"""
FUSION_CACHE = """
import json, torch
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(FOLDER + "/cache", trust_remote_code=True)
batch = {name: torch.tensor(value) for name, value in PROMPTS.items()}
tokens = model.generate(**batch, max_new_tokens=5, num_beams=2)
loss = model.train()(**batch, labels=tokens[:, 1:]).loss
loss.backward()
print(json.dumps([type(model.encoder.fusion).__name__, tokens.tolist(), float(loss)]))
"""
SNIPPET = """
import json, os
os.chdir(FOLDER)
SNIPPET
print(json.dumps(tokens.tolist()))
"""


@pytest.fixture(scope="module")
def sharing() -> LLM2SLMForConditionalGeneration:
    """A model of fusion "cache"."""
    return compose(families.build_whole("gemma3"), families.build_slm("gemma3"), "cache").model


@pytest.fixture(scope="module")
def elsewhere(saved, sharing, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of the models, and what the codes above print without the package."""
    sharing.save_pretrained(saved.parent / "cache")
    snippet = ModelCard.load(saved / "README.md").text.partition("```python\n")[2].partition("```")[0]
    codes = {
        "training": TRAINING, "auto_model": AUTO_MODEL, "fusion_cache": FUSION_CACHE,
        "snippet": SNIPPET.replace("SNIPPET", snippet.replace('"A prompt."', '"src1 src2"')),
    }  # fmt: skip
    prompts = {name: value.tolist() for name, value in pad_prompts(PROMPTS).items()}
    names = f"FOLDER, PROMPTS = {str(saved.parent)!r}, {prompts!r}\n"
    home = str(tmp_path_factory.mktemp("home"))
    codes = {name: names + code for name, code in codes.items()}
    return saved.parent, fresh_process.run_each(codes, package=False, HF_HOME=home)


def test_an_upload_loads_generates_and_trains_without_the_package(saved, elsewhere):
    folder, found = elsewhere
    module, tokens, loss, changed, frozen = found["training"]
    assert module.startswith("transformers_modules.")
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    batch = processor(text=["src1 src2", "src3"], text_target=["out1", "out2 out3"], padding=True, return_tensors="pt")
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model.generate(**prompt, max_new_tokens=5).tolist() == tokens
    assert loss > 0
    assert (changed, frozen) == (["decoder", "encoder"], True)
    # The code is saved again, and is as complete as what was loaded; only the card needs the package.
    assert files_in(folder / "trained") == MODEL_FILES | DATA_FILES - {"README.md"}


def test_auto_model_loads_the_whole_model_with_and_without_the_package(saved, elsewhere):
    assert type(AutoModel.from_pretrained(saved)) is LLM2SLMForConditionalGeneration
    folder, found = elsewhere
    name, module = found["auto_model"]
    assert name == "LLM2SLMForConditionalGeneration"
    assert module.startswith("transformers_modules.")
    for auto_class in (AutoModel, AutoModelForSeq2SeqLM):
        assert type(auto_class.from_pretrained(folder / "again")) is LLM2SLMForConditionalGeneration


def test_an_upload_of_fusion_cache_works_without_the_package(sharing, elsewhere):
    name, tokens, loss = elsewhere[1]["fusion_cache"]
    model, batch = sharing, pad_prompts(PROMPTS)
    expected = model.generate(**batch, max_new_tokens=5, num_beams=2)
    assert (name, tokens) == ("Cache", expected.tolist())
    assert loss == pytest.approx(float(model(**batch, labels=expected[:, 1:]).loss.detach()), rel=1e-4)


def test_the_snippet_of_the_card_runs(elsewhere):
    assert isinstance(elsewhere[1]["snippet"], list), elsewhere[1]["snippet"]


def test_remote_code_runs_only_if_trusted_and_never_with_the_package(saved, tmp_path):
    spoilt = Path(shutil.copytree(saved, tmp_path / "spoilt"))
    for file in spoilt.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nraise ImportError\n" + file.read_text())
    for trust in (None, False, True):
        assert type(AutoConfig.from_pretrained(spoilt, trust_remote_code=trust)) is LLM2SLMConfig
        model = AutoModelForSeq2SeqLM.from_pretrained(spoilt, trust_remote_code=trust)
        assert type(model) is LLM2SLMForConditionalGeneration
        assert type(AutoProcessor.from_pretrained(spoilt, trust_remote_code=trust)) is LLM2SLMProcessor
        AutoTokenizer.from_pretrained(spoilt, trust_remote_code=trust)
    assert not (tmp_path / "run").exists()


def test_parts_with_remote_code_need_trust_remote_code(saved, tmp_path):
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        kwargs = {f"{other}_pretrained_model_name_or_path": tmp_path / other}
        folder = tmp_path / part
        folder.mkdir(exist_ok=True)
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
        auto_map = '{"AutoConfig": "evil.Config", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}'
        (folder / "config.json").write_text(f'{{"model_type": "evil", "auto_map": {auto_map}}}')
        parts = build_parts()
        (parts.llm if other == "encoder" else parts.slm).save_pretrained(tmp_path / other)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
                **kwargs, **{f"{part}_pretrained_model_name_or_path": folder}
            )
        shutil.rmtree(folder)
    assert not (tmp_path / "run").exists()
