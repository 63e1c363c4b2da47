"""Conversations from a file to outputs: every command gives what it gives for the same prompts as texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from modeling_llm2slm import TextToText
from modeling_llm2slm.evaluation.agreement import compare
from modeling_llm2slm.evaluation.evaluate import evaluate
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.settings import EncodeSettings, EvaluateSettings, GenerateFileSettings
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.states.store import StateStore
from modeling_llm2slm.training.distillation import distill
from modeling_llm2slm.training.run import train
from tests.support.checkpoints import KINDS, PAIRS, PROMPTS, write_pairs


# It writes the words of all messages and the end token, as the tokenizer does for a text.
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}</s>"
REFUSING = "{{ raise_exception('Roles must alternate') }}"


def conversation(prompt: str) -> list[dict[str, str]]:
    """The words of a prompt as messages."""
    first, *rest = prompt.split()
    messages = [{"role": "system", "content": first}]
    return [*messages, {"role": "user", "content": " ".join(rest)}] if rest else messages


ROWS = [
    {"messages": [*conversation(pair["prompt"]), {"role": "assistant", "content": pair["target"]}]} for pair in PAIRS
]


@pytest.fixture(scope="module")
def chatting(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checkpoints of every kind, whose tokenizers have a chat template."""
    folder = tmp_path_factory.mktemp("chatting")
    for kind, path in checkpoints.items():
        shutil.copytree(path, folder / kind)
        (folder / kind / "chat_template.jinja").write_text(TEMPLATE)
    return {kind: str(folder / kind) for kind in checkpoints}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    return {
        "texts": write_pairs(tmp_path / "texts.jsonl"),
        "jsonl": write_pairs(tmp_path / "rows.jsonl", ROWS),
        "parquet": str(tmp_path / "rows.parquet"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_turns_texts_and_conversations_into_texts(kind: str, chatting: dict[str, str]) -> None:
    model, options = TextToText.from_pretrained(chatting[kind]), {"max_new_tokens": 5, "suppress_tokens": [0, 1]}
    conversations = [conversation(prompt) for prompt in PROMPTS]
    outputs = model(conversations, batch_size=3, **options)
    assert isinstance(outputs, list)
    assert model(conversations[0], **options) == outputs[0]
    assert "".join(model.stream(conversations[0], **options)) == outputs[0]
    texts = model(PROMPTS, **options)
    assert model(PROMPTS[0], **options) == texts[0]
    mixed = model([PROMPTS[0], conversations[1], PROMPTS[2]], **options)
    assert mixed == [texts[0], outputs[1], texts[2]]
    if kind != "slm":  # whose prompts have no end token of their own
        assert outputs == texts
    with pytest.raises(ValueError, match=r"Pass a list of prompts, or call the model"):
        model.generate(PROMPTS[0])


def test_files_of_conversations_give_the_outputs_of_texts(
    chatting: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    settings, outputs = GenerateFileSettings(max_new_tokens=5), {}
    for name, file in data.items():
        output = tmp_path / f"{name}-outputs.jsonl"
        generate_file(chatting["llm2slm"], file, output, settings)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        outputs[name] = [row.pop("model_output") for row in rows]
        assert rows == (PAIRS if name == "texts" else ROWS)
    assert outputs["jsonl"] == outputs["parquet"] == outputs["texts"]


def test_scores_agreement_and_distillation_of_conversations_are_those_of_texts(
    chatting: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    scores, agreed, distilled = [], [], []
    for name, file in data.items():
        settings = EvaluateSettings(max_new_tokens=5, timed_outputs=0)
        scores.append(evaluate(chatting["llm2slm"], file, settings)["scores"])
        report = compare(chatting["llm2slm"], chatting["llm"], file, EvaluateSettings(max_new_tokens=5))
        agreed.append({key: report[key] for key in ("agreement", "scores") if key in report})
        output = tmp_path / f"{name}-distilled.jsonl"
        distill(chatting["llm"], file, output)
        distilled.append([json.loads(line)["llm_output"] for line in output.read_text().splitlines()])
    assert scores[0] == scores[1] == scores[2]
    assert agreed[0] == agreed[1] == agreed[2]
    assert agreed[0]
    assert distilled[0] == distilled[1] == distilled[2]


@pytest.mark.parametrize("way", ["indexed", "streamed", "stored"])
def test_training_on_conversations_has_the_losses_of_texts(
    way: str, chatting: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    losses = []
    for name, file in data.items():
        recipe: dict[str, Any] = {
            "model": chatting["llm2slm"],
            "train_data": file,
            "validation_data": file,
            "output_dir": str(tmp_path / name),
            "metric": "loss",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "disable_tqdm": True,
            "streaming": way == "streamed",
        }
        if way == "stored":
            store = tmp_path / f"{name}-states"
            encode(chatting["llm2slm"], [file], store, EncodeSettings())
            assert len(StateStore(store)) == len(set(PROMPTS))
            recipe["llm_states"] = str(store)
        report = train(recipe)
        losses.append([entry["loss"] for entry in report["log"] if "loss" in entry])
    assert losses[0]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_template_and_one_that_refuses_are_errors_of_one_sentence(
    kind: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints[kind], tmp_path / "model"))
    prompt = conversation(PROMPTS[0])
    with pytest.raises(ValueError, match=r"no chat template\. Put a `chat_template\.jinja` into the model's folder"):
        TextToText.from_pretrained(folder)(prompt)
    (folder / "chat_template.jinja").write_text(REFUSING)
    with pytest.raises(ValueError, match=r"refuses .*'src1.*: Roles must alternate\. Correct the roles"):
        TextToText.from_pretrained(folder)(prompt)
