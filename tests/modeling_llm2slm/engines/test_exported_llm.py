"""Exported decoder-only models, such as an LLM alone, generate the tokens of PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from modeling_llm2slm.engines.exported_llm import ExportedLLM, ExportedLLMTextToText
from modeling_llm2slm.inference.engine import engine
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support import families
from tests.support.commands import run
from tests.support.common import PROMPTS, pad_prompts, slm_tokenizer
from tests.support.exports import STRATEGIES, eager, needs


def build(family: str) -> Any:
    llm = families.build_whole(family)
    llm.generation_config.pad_token_id = families.PAD
    return llm


def both(llm: Any, exported: ExportedLLM, **options: Any) -> list[torch.Tensor]:
    outputs = []
    for model in (llm, exported):
        torch.manual_seed(0)
        outputs.append(model.generate(**{"max_new_tokens": 10, **options}))
    return outputs


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_all_strategies_give_the_tokens_of_pytorch(family: str) -> None:
    llm = build(family)
    exported = eager(copy.deepcopy(llm))
    batch = pad_prompts(PROMPTS, "left", extra=2)
    for name, strategy in STRATEGIES.items():
        expected, found = both(llm, exported, **batch, **strategy)
        assert torch.equal(expected, found), name
    exported.graphs["prompt"] = exported.graphs["step"]  # as where prompts are computed in another precision
    ids = torch.tensor(PROMPTS[:1])
    expected, found = both(llm, exported, input_ids=ids, num_beams=2)
    assert torch.equal(expected, found)
    assert found.shape[1] > ids.shape[1] + 2


def test_an_output_continues_from_its_cache() -> None:
    exported = eager(build("gpt2"))
    batch = pad_prompts(PROMPTS, "left")
    whole = exported.generate(**batch, max_new_tokens=8)
    first = exported.generate(**batch, max_new_tokens=4, return_dict_in_generate=True)
    width = first.sequences.shape[1] - batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(len(PROMPTS), width).long()], dim=1)
    more = {"past_key_values": first.past_key_values, "max_new_tokens": 4}
    wrong = mask.clone()
    wrong[:, -1] = 0
    with pytest.raises(ValueError, match="hides tokens after the first prompt"):
        exported.generate(first.sequences, attention_mask=wrong, **more)
    assert torch.equal(exported.generate(first.sequences, attention_mask=mask, **more), whole)
    with pytest.raises(ValueError, match="belongs to another model"):
        exported.generate(**batch, past_key_values=build("gpt2")(batch["input_ids"]).past_key_values)


def test_beams_read_their_prompt_once() -> None:
    exported, rows = eager(build("gpt2")), []
    state = exported.graphs["step"].new_state()
    read = state.run
    state.run = lambda inputs, order: rows.append(len(inputs["inputs_embeds"])) or read(inputs, order)
    exported.graphs["step"].new_state = lambda: state
    exported.generate(**pad_prompts(PROMPTS, "left"), num_beams=4, max_new_tokens=3)
    assert rows == [3, 12, 12]


@pytest.mark.slow
def test_quantized_weights_generate_the_first_tokens_of_pytorch(tmp_path) -> None:
    needs("openvino")
    llm = build("gemma3")
    exported = engine("openvino").export(copy.deepcopy(llm), tmp_path, "int8")
    assert set(exported.graphs) == {"prompt", "step"}
    expected, found = both(llm, exported, **pad_prompts(PROMPTS, "left"), max_new_tokens=2)
    assert torch.equal(expected, found)


@pytest.mark.slow
def test_the_command_exports_an_llm(tmp_path, capsys) -> None:
    needs("openvino")
    llm = build("gemma3")
    llm.save_pretrained(tmp_path / "llm")
    slm_tokenizer().save_pretrained(tmp_path / "llm")
    assert run("export", tmp_path / "llm", tmp_path / "fast") == 0
    assert "outputs, largest difference" in capsys.readouterr().out
    expected, exported = (TextToText.from_pretrained(tmp_path / name) for name in ("llm", "fast"))
    assert isinstance(exported, ExportedLLMTextToText)
    texts = ["out11 out52 out7 out93", "out85 out29"]
    assert exported.generate(texts, max_new_tokens=8) == expected.generate(texts, max_new_tokens=8)
    assert "".join(exported.stream(texts[0], max_new_tokens=8)) == expected.generate(texts[:1], max_new_tokens=8)[0]
    assert exported.parameters() == {**expected.parameters(), "trainable": 0}
    assert run("info", tmp_path / "fast") == 0
    assert "fp32" in capsys.readouterr().out
