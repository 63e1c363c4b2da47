"""The stock `Trainer` uploads our model with the checks and the card of `model.push_to_hub`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import GPT2Config, GPT2LMHeadModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from modeling_llm2slm import lora_config
from modeling_llm2slm.inference.model_card import MARK, is_by_hand
from tests.support import fresh_process, hub_server
from tests.support.common import build_model
from tests.support.hub_server import Hub


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trainer_of(model: Any, folder: Path, **options: Any) -> Seq2SeqTrainer:
    arguments = Seq2SeqTrainingArguments(str(folder), report_to=[], use_cpu=True, **options)
    return Seq2SeqTrainer(model=model, args=arguments)


def test_the_card_of_a_trainer_says_how_to_load_the_model(tmp_path: Path) -> None:
    trainer = trainer_of(build_model("add"), tmp_path / "model", learning_rate=0.123)
    trainer.create_model_card(tags=["mine"], dataset="tester/data", language="de")  # nothing was saved yet
    for _ in range(2):  # the card that was extended is not one by hand
        trainer.save_model()
        trainer.create_model_card(tags=["mine"], dataset="tester/data", language="de", license="mit")
        card = ModelCard.load(tmp_path / "model" / "README.md")
        assert "trust_remote_code=True" in card.text
        assert card.text.count("## Training procedure") == 1
        assert "learning_rate: 0.123" in card.text
        assert {"llm2slm", "custom_code", "mine", "generated_from_trainer"} <= set(card.data.tags)
        assert (card.data.license, card.data.language, card.data.library_name) == ("mit", ["de"], "transformers")
        assert MARK in str(card)
        assert not is_by_hand(str(card))
        assert "More information needed" not in card.text


def test_a_card_by_hand_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer = trainer_of(build_model("add"), tmp_path)
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_the_card_of_an_adapter_says_how_to_load_it(way: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model: Any = build_model("add")
    config = lora_config(model, r=2)
    model = peft.get_peft_model(model, config) if way == "get_peft_model" else model.add_adapter(config) or model
    trainer = trainer_of(model, tmp_path)
    for _ in range(2):
        trainer.save_model()
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == "peft"
        assert "trust_remote_code=True" in card.text
        assert f'model.load_adapter("{tmp_path.name}")' in card.text
        assert "### Training hyperparameters" in card.text


def test_other_models_keep_the_card_of_the_trainer(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    trainer_of(model, tmp_path).create_model_card()
    assert "llm2slm" not in (tmp_path / "README.md").read_text()


# Every way of a stock Trainer to upload, with a full model, a lean one of a folder and an adapter.
AUTHOR = """
import json
from pathlib import Path
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from tests.support.common import build_parts, PROMPTS, pad_prompts, make_labels, llm_tokenizer, slm_tokenizer
from modeling_llm2slm import LLM2SLMForConditionalGeneration as Model, LLM2SLMProcessor, lora_config
parts = build_parts()
parts.llm.save_pretrained(HOME + "/llm")
rows = [{**{k: v[i] for k, v in pad_prompts(PROMPTS).items()}, "labels": make_labels()[i]} for i in range(2)]

def trainer(model, repository, **options):
    options = {"report_to": [], "use_cpu": True, "max_steps": 1, "hub_model_id": repository, **options}
    arguments = Seq2SeqTrainingArguments(HOME + "/" + repository.split("/")[1], **options)
    processor = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor)

def model_of_folder(include_llm=True):
    model = Model.from_encoder_decoder_pretrained(HOME + "/llm", decoder_model=build_parts().slm)
    model.include_llm = include_llm
    return model

def outcome(function):
    try:
        function()
        return "uploaded"
    except ValueError as error:
        return str(error)

push = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1}
found = {
    "lean": outcome(lambda: trainer(model_of_folder(False), "tester/lean").push_to_hub()),
    "lean in training": outcome(lambda: trainer(model_of_folder(False), "tester/lean2", **push)),
    "full": outcome(lambda: trainer(model_of_folder(), "tester/full").push_to_hub()),
    "in training": outcome(lambda: trainer(model_of_folder(), "tester/trained", **push).train()),
    "saved": outcome(lambda: trainer(model_of_folder(), "tester/saved", push_to_hub=True).save_model()),
}
model = model_of_folder()
trainer(model, "tester/again", push_to_hub=True)
model.save_pretrained(HOME + "/elsewhere", include_llm=False)  # which is not uploaded
changed = trainer(model_of_folder(), "tester/changed", push_to_hub=True)
changed.model.include_llm = False
found["changed"] = outcome(changed.push_to_hub)
from peft import get_peft_model
model = model_of_folder()
found["adapter"] = outcome(trainer(get_peft_model(model, lora_config(model, r=2)), "tester/adapter").push_to_hub)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server.serve() as hub:
        yield hub


def test_uploads_are_checked_and_have_our_card(hub: Hub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub_server.TOKEN}
    found = fresh_process.run(f"HOME = {str(tmp_path)!r}\n{AUTHOR}", **environment, **home)
    for refused in ("lean", "lean in training", "changed"):
        assert "lean checkpoint on the Hub has to name a repository" in found.pop(refused)
    assert set(found.values()) == {"uploaded"}
    assert not {"tester/lean", "tester/lean2"} & hub.repositories.keys()
    for name in ("full", "trained", "saved", "adapter"):
        files = hub.repositories[f"tester/{name}"].at("main")[1]
        card = files["README.md"][1].decode()
        assert "trust_remote_code=True" in card
        assert f'"tester/{name}"' in card
        assert ("generated_from_trainer" in card) == (name != "trained")
        assert str(tmp_path) not in card
        if name == "adapter":
            assert "adapter_model.safetensors" in files
            assert "config.json" not in files
        else:
            assert "modeling_llm2slm.py" in files
            assert "llm" not in files["config.json"][1].decode().partition('"name_or_path"')[2].partition(",")[0]
            assert str(tmp_path) not in files["config.json"][1].decode()
