"""Folders that hold an adapter: every way to load one, and what a saved one brings along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForSeq2SeqLM

from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor, lora_config
from modeling_llm2slm.inference.model_card import is_by_hand
from tests.support import fresh_process
from tests.support.common import PROMPTS, build_parts, llm_tokenizer, pad_prompts, slm_tokenizer, with_random_adapters


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a full checkpoint, and a lean one next to it."""
    folder, parts = tmp_path_factory.mktemp("models"), build_parts()
    parts.llm.save_pretrained(folder / "llm")
    LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer()).save_pretrained(folder / "full")
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        str(folder / "llm"), decoder_model=parts.slm, fusion="add", shared_tokenizer=False
    )
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "lean", include_llm=False)
    return folder


def add_adapter(model: Any) -> Any:
    """Add an adapter with random weights to a model."""
    model.add_adapter(lora_config(model, r=2))
    return with_random_adapters(model)


def outputs(model: Any) -> list[list[int]]:
    return model.eval().generate(**pad_prompts(PROMPTS), **OPTIONS).tolist()


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Any]:
    """For each base: its folder, one with an adapter for it, the outputs of both together, and of the base alone."""
    found = {}
    for name in ("full", "lean"):
        model = AutoModelForSeq2SeqLM.from_pretrained(base / name)
        alone = outputs(model)
        add_adapter(model).save_pretrained(base / f"adapter-{name}")
        assert outputs(model) != alone
        found[name] = base / name, base / f"adapter-{name}", outputs(model), alone
    return found


@pytest.fixture(params=["full", "lean"])
def adapter(adapters: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return adapters[request.param]


def test_every_way_to_load_an_adapter_gives_its_outputs(adapter: Any) -> None:
    place, folder, expected, alone = adapter
    for load in (AutoModelForSeq2SeqLM, LLM2SLMForConditionalGeneration, peft.AutoPeftModelForSeq2SeqLM):
        assert outputs(load.from_pretrained(folder)) == expected
    loaded = AutoModelForSeq2SeqLM.from_pretrained(place)
    assert outputs(loaded) == alone
    loaded.load_adapter(folder)
    assert outputs(loaded) == expected
    loaded.disable_adapters()
    assert outputs(loaded) == alone
    on_top = peft.PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(place), folder)
    assert outputs(on_top) == expected
    source = LLM2SLMForConditionalGeneration.from_pretrained(folder).config.llm_source
    assert source["name_or_path"] == str(place.parent.resolve() / "llm")


def test_a_folder_of_peft_itself_loads_too(base: Path, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model := AutoModelForSeq2SeqLM.from_pretrained(base / "full"), lora_config(model))
    adapted.save_pretrained(tmp_path)
    assert outputs(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) == outputs(adapted)


def test_a_checkpoint_may_hold_an_adapter_too(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base / "full", tmp_path / "model"))
    model = add_adapter(AutoModelForSeq2SeqLM.from_pretrained(folder))
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    for load in (AutoModelForSeq2SeqLM, LLM2SLMForConditionalGeneration):
        assert outputs(load.from_pretrained(folder)) == outputs(model)


def test_the_checks_of_a_checkpoint_cover_the_base(base: Path, adapter: Any, tmp_path: Path) -> None:
    place, folder, *_ = adapter
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in folder.glob("adapter_*"):
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base / "llm")
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((OSError, ValueError)):
        LLM2SLMForConditionalGeneration.from_pretrained(copy)


def test_the_card_says_how_to_load_an_adapter(adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, folder, *_ = adapter
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder that nobody else has
    assert str(place) not in str(card)
    assert f'load_adapter("{folder.name}")' in card.text
    assert "trust_remote_code=True" in card.text
    assert not is_by_hand(str(card))
    code = card.text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(place.parent)
    if place.name == "full":  # its folder holds the processor too
        exec(code.replace('"A prompt."', '"src1 src2"'), {})


@pytest.mark.filterwarnings("ignore:Could not find a config file in user/base:UserWarning")
def test_an_adapter_of_a_repository_names_it(base: Path, tmp_path: Path) -> None:
    model = add_adapter(AutoModelForSeq2SeqLM.from_pretrained(base / "full"))
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.include_llm = False  # an adapter holds no LLM in any case
    model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == ["user/base"]
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert 'name = "user/base"' in card.text


@pytest.fixture(scope="module")
def elsewhere(adapters: dict[str, Any]) -> dict[str, Any]:
    """The outputs with each adapter where the package is not, by the code of its base."""
    rows, codes = {name: values.tolist() for name, values in pad_prompts(PROMPTS).items()}, {}
    for name, (_, folder, *_) in adapters.items():
        codes[name] = f"""
import json, torch
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
batch = {{name: torch.tensor(rows) for name, rows in {rows!r}.items()}}
print(json.dumps(model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()))
"""
    return fresh_process.run_each(codes, package=False, more=("peft",))


def test_an_adapter_loads_without_the_package(adapter: Any, elsewhere: dict[str, Any]) -> None:
    place, _, expected, _ = adapter
    assert elsewhere[place.name] == expected
