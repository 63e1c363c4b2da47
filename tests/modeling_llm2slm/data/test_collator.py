"""The collator pads features of the processor to a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modeling_llm2slm import DataCollatorForLLM2SLM, LLM2SLMProcessor, LLM2SLMTokenizer
from tests.support.common import END, build_model, llm_tokenizer, shared_parts, slm_tokenizer


PROMPTS = ["src4 src9 src9 src2 src70", "src5", "src1 src2"]
TARGETS = ["out3 out8", "out1 out5 out5 out30", ""]


@pytest.fixture
def processor() -> LLM2SLMProcessor:
    return LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())


def features(processor: LLM2SLMProcessor) -> list[dict]:
    return [dict(processor(text=p, text_target=a)) for p, a in zip(PROMPTS, TARGETS, strict=True)]


def test_a_batch_equals_the_processors(processor: LLM2SLMProcessor) -> None:
    batch = DataCollatorForLLM2SLM(processor)(features(processor))
    expected = processor(text=PROMPTS, text_target=TARGETS, padding=True, return_tensors="pt")
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
        assert torch.equal(value, expected[name])


def test_padding_is_masked_even_if_it_equals_the_end_token(processor: LLM2SLMProcessor) -> None:
    labels = DataCollatorForLLM2SLM(processor)(features(processor))["labels"]
    assert processor.pad_token_id == processor.eos_token_id
    assert (labels == processor.eos_token_id).sum(-1).tolist() == [1, 1, 1]
    assert (labels != -100).sum(-1).tolist() == [3, 5, 1]


def test_features_are_not_changed(processor: LLM2SLMProcessor) -> None:
    rows = features(processor)
    DataCollatorForLLM2SLM(processor, model=shared_parts("add").model)(rows)
    assert rows == features(processor)


def test_a_model_gets_decoder_input_ids(processor: LLM2SLMProcessor) -> None:
    """`Trainer` does not pass the labels to the model when it smooths them."""
    model = build_model("add")
    batch = DataCollatorForLLM2SLM(processor, model=model)(features(processor))
    assert batch["decoder_input_ids"].shape == batch["labels"].shape
    assert batch["decoder_input_ids"][:, 0].tolist() == [END] * 3
    kept = batch["labels"][:, :-1] != -100
    assert torch.equal(batch["decoder_input_ids"][:, 1:][kept], batch["labels"][:, :-1][kept])
    assert (batch["decoder_input_ids"][:, 1:][~kept] == END).all()
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert torch.equal(logits, model(**batch).logits)


def test_padding_beyond_the_positions_is_masked(processor: LLM2SLMProcessor) -> None:
    """Each example fits the positions, but the padded batch does not."""
    model = build_model("add")
    prompts, targets = ["src1 " * 50, "src2"], ["out3", "out3 out8 " * 25]
    rows = [dict(processor(text=prompt, text_target=target)) for prompt, target in zip(prompts, targets, strict=True)]
    batch = DataCollatorForLLM2SLM(processor, model=model)(rows)
    assert torch.equal(batch["decoder_attention_mask"], (batch["labels"] != -100).long())
    together = model(**batch)
    counts, losses = [], []
    for row in rows:
        alone = DataCollatorForLLM2SLM(processor)([row])
        counts.append(alone["labels"].numel())
        losses.append(model(**alone).loss * counts[-1])
    torch.testing.assert_close(together.loss, sum(losses) / sum(counts))
    stock = DataCollatorForLLM2SLM(processor)(rows)
    torch.testing.assert_close(model(**stock).loss, together.loss)
    stock["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(stock["labels"])
    torch.testing.assert_close(model(**stock).loss, together.loss)
    prompt = model.encode_prompt(stock["input_ids"], stock["attention_mask"])
    torch.testing.assert_close(model(encoder_outputs=prompt, labels=stock["labels"]).loss, together.loss)
    rows[1]["input_ids"], rows[1]["attention_mask"] = rows[0]["input_ids"], rows[0]["attention_mask"]
    with pytest.raises(ValueError, match="51 tokens and the output up to 51, together 102"):
        model(**DataCollatorForLLM2SLM(processor)(rows))


def test_features_without_targets(processor: LLM2SLMProcessor) -> None:
    rows = [dict(processor(text=prompt)) for prompt in PROMPTS]
    batch = DataCollatorForLLM2SLM(processor, model=shared_parts("add").model)(rows)
    assert sorted(batch) == ["attention_mask", "input_ids"]


def test_other_columns_are_ignored(processor: LLM2SLMProcessor) -> None:
    rows = [{**row, "text": "something", "id": 7} for row in features(processor)]
    assert sorted(DataCollatorForLLM2SLM(processor)(rows)) == ["attention_mask", "input_ids", "labels"]


@pytest.mark.parametrize("as_values", [np.array, torch.tensor, list])
def test_features_of_every_type_and_maker(as_values: Any, processor: LLM2SLMProcessor) -> None:
    rows = [{name: as_values(values) for name, values in row.items()} for row in features(processor)]
    expected = DataCollatorForLLM2SLM(processor)(features(processor))
    for maker in (processor, LLM2SLMTokenizer(processor)):
        batch = DataCollatorForLLM2SLM(maker)(rows)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    labels = DataCollatorForLLM2SLM(processor)([{"labels": row["labels"]} for row in rows])
    assert torch.equal(labels["labels"], expected["labels"])


def test_padding_to_a_multiple(processor: LLM2SLMProcessor) -> None:
    batch = DataCollatorForLLM2SLM(processor, pad_to_multiple_of=8)(features(processor))
    assert {value.shape[1] for value in batch.values()} == {8}
    assert (batch["labels"] != -100).sum().item() == 9
