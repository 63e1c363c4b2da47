"""A saved model gives code that takes one tokenizer both: the LLM's for prompts, the SLM's for everything else."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5EncoderModel,
    TextIteratorStreamer,
)

from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor, LLM2SLMTokenizer
from tests.support import fresh_process
from tests.support.common import build_parts, gpt2_config, llm_tokenizer, slm_tokenizer, t5_config, tiny_tokenizer


PROMPTS, TARGETS = ["src4 src9 src30", "src5"], ["out3 out8 out1", "out40"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_parts().model.save_pretrained(folder)
    LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer(), target_max_length=30).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(saved: Path) -> Any:
    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture
def processor(saved: Path) -> LLM2SLMProcessor:
    return AutoProcessor.from_pretrained(saved)


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(saved).eval()


def test_prompts_are_the_llms_and_everything_else_is_the_slms(tokenizer: Any, processor: LLM2SLMProcessor) -> None:
    llms, slms = processor.tokenizer, processor.decoder_tokenizer
    assert type(tokenizer) is LLM2SLMTokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    expected = llms(PROMPTS, padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert tokenizer.encode(PROMPTS[0]) == llms.encode(PROMPTS[0])
    assert (
        tokenizer(PROMPTS[0], add_special_tokens=False).input_ids
        == llms(PROMPTS[0], add_special_tokens=False).input_ids
    )
    ids = slms(TARGETS[0]).input_ids
    assert tokenizer.decode(ids) == TARGETS[0]
    assert tokenizer.convert_ids_to_tokens(ids) == TARGETS[0].split()
    assert tokenizer.convert_tokens_to_ids("out3") == slms.convert_tokens_to_ids("out3")
    assert (len(tokenizer), tokenizer.vocab_size) == (len(slms), slms.vocab_size)
    assert tokenizer.get_vocab() == slms.get_vocab()
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(tokenizer, name) == getattr(slms, name)
        assert getattr(tokenizer, f"{name}_id") == getattr(slms, f"{name}_id")
    for name in ("model_max_length", "truncation_side", "name_or_path", "chat_template"):
        assert getattr(tokenizer, name) == getattr(llms, name)
    assert not hasattr(tokenizer, "tokenizer")  # a processor has one, and is taken apart by it
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = tokenizer.nothing_like_this


def test_a_text_without_special_tokens_is_a_piece_of_the_output(tokenizer: Any) -> None:
    """A score of lm-eval is of labels that it gets so; a rendered chat and a batch are prompts."""
    llms, slms = tokenizer.processor.tokenizer, tokenizer.decoder_tokenizer
    assert tokenizer.encode("out3 out8", add_special_tokens=False) == slms.encode("out3 out8")
    plain = {"add_special_tokens": False}
    assert tokenizer.encode("src4", return_tensors="pt", **plain).tolist() == [llms.encode("src4", **plain)]
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ eos_token }}"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "src4"}], tokenize=False)
    assert chat == f"src4{llms.eos_token}"
    assert tokenizer.encode(chat, **plain) == llms.encode(chat, **plain)


def test_targets_are_the_labels_of_the_processor(tokenizer: Any, processor: LLM2SLMProcessor) -> None:
    expected = processor(text_target=TARGETS, padding=True, return_tensors="pt")["labels"]
    kwargs: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    assert torch.equal(tokenizer(text_target=TARGETS, **kwargs).input_ids, expected)
    both = tokenizer(PROMPTS, text_target=TARGETS, **kwargs)
    assert torch.equal(both["labels"], expected)
    assert torch.equal(both["input_ids"], tokenizer(PROMPTS, **kwargs).input_ids)
    assert tokenizer.batch_decode(expected, skip_special_tokens=True) == TARGETS
    cut = tokenizer(text_target=TARGETS, max_length=2, truncation=True).input_ids
    assert cut == [[expected[0, 0], tokenizer.eos_token_id], [expected[1, 0], tokenizer.eos_token_id]]
    assert tokenizer(PROMPTS, text_target=TARGETS, max_target_length=2, truncation=True)["labels"] == cut
    piece = tokenizer(text_target=["out3"], add_special_tokens=False).input_ids
    assert piece == [[tokenizer.convert_tokens_to_ids("out3")]]


def test_setting_attributes(tokenizer: Any) -> None:
    llms, slms = tokenizer.processor.tokenizer, tokenizer.decoder_tokenizer
    tokenizer.pad_token = tokenizer.unk_token
    assert (slms.pad_token, llms.pad_token) == (slms.unk_token, "<pad>")
    tokenizer.truncation_side = "left"
    assert (llms.truncation_side, slms.truncation_side) == ("left", "right")
    old, tokenizer.padding_side = tokenizer.padding_side, "left"
    assert tokenizer(PROMPTS, padding=True).attention_mask[1][0] == 0
    tokenizer.padding_side = old
    assert tokenizer(PROMPTS, padding=True).attention_mask[1][-1] == 0
    size = len(tokenizer)
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]}) == 1
    assert (len(tokenizer), len(llms.get_vocab())) == (size + 1, len(llm_tokenizer()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["tokenizer", "processor"])
def test_stock_collators(kind: str, side: str, saved: Path, model: Any) -> None:
    """Labels are padded on the right, whatever the side of prompts: a start token stands before them."""
    processor = AutoProcessor.from_pretrained(saved)
    processor.tokenizer.padding_side = side
    one = LLM2SLMTokenizer(processor) if kind == "tokenizer" else processor
    expected = processor(text=PROMPTS, text_target=TARGETS, padding=True, return_tensors="pt")
    for with_labels in (True, False):
        targets = TARGETS if with_labels else [None, None]
        rows = [dict(processor(text=p, text_target=t)) for p, t in zip(PROMPTS, targets, strict=True)]
        batch = DataCollatorForSeq2Seq(one, model=model)(rows)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        if with_labels:
            assert torch.equal(batch["labels"], expected["labels"])
            assert torch.equal(DataCollatorWithPadding(one)(rows)["labels"], expected["labels"])
        wide = DataCollatorForSeq2Seq(one, pad_to_multiple_of=8)(rows)
        assert wide["input_ids"].shape[1] == 8


def test_ids_of_every_type_decode_without_minus_100(tokenizer: Any, processor: LLM2SLMProcessor) -> None:
    labels = processor(text_target=TARGETS, padding=True, return_tensors="pt")["labels"]
    kinds = [labels, labels.numpy(), labels.tolist(), list(labels), list(labels.numpy()), tuple(labels.tolist())]
    for one in (tokenizer, processor):
        for ids in kinds:
            assert one.batch_decode(ids, skip_special_tokens=True) == TARGETS
            assert one.decode(ids[1], skip_special_tokens=True) == TARGETS[1]
        assert one.decode(np.array([-100, -100])) == one.decode(-100) == ""
        assert one.decode(labels[0, 0]) == one.decode(int(labels[0, 0])) == "out3"


def test_stop_strings_are_found_in_the_output(data_folder: Path) -> None:
    t5, gpt2 = (AutoTokenizer.from_pretrained(data_folder / f"tokenizer_{name}") for name in ("t5", "gpt2"))
    end = gpt2.eos_token_id
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=T5EncoderModel(t5_config(vocab_size=32128)),
        decoder_model=GPT2LMHeadModel(gpt2_config(vocab_size=len(gpt2), bos_token_id=end, eos_token_id=end)),
    )
    processor = LLM2SLMProcessor(t5, gpt2)
    inputs = processor(text=["translate English to German: Hello"], return_tensors="pt")
    whole = model.generate(**inputs, max_new_tokens=8)
    stop = next(text for i in whole[0, 3:-1] if (text := gpt2.decode(i).strip()).isascii() and text)
    expected = model.generate(**inputs, max_new_tokens=8, stop_strings=[stop], tokenizer=gpt2)
    assert expected.shape[1] < whole.shape[1]
    for one in (LLM2SLMTokenizer(processor), processor, processor.decoder_tokenizer, processor.tokenizer):
        stopped = model.generate(**inputs, max_new_tokens=8, stop_strings=[stop], tokenizer=one)
        assert torch.equal(stopped, expected)
    another = AutoTokenizer.from_pretrained(data_folder / "tokenizer_t5")
    with pytest.raises(ValueError, match="The tokenizer is the LLM's.*Pass the processor"):
        model.generate(**inputs, stop_strings=[stop], tokenizer=another)


def test_a_subclass_adds_attributes_to_a_copy(tokenizer: Any) -> None:
    class Cached(LLM2SLMTokenizer):  # vLLM caches properties in this way
        @property
        def max_token_id(self) -> int:
            return 7

    cached = copy.copy(tokenizer)
    cached.__class__ = Cached
    assert cached.max_token_id == 7
    assert cached(PROMPTS) == tokenizer(PROMPTS)
    assert cached.vocab_size == tokenizer.decoder_tokenizer.vocab_size
    assert not hasattr(tokenizer, "max_token_id")


def test_streamers_decode_the_output(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=4)[0])
    for one in (tokenizer, tokenizer.processor, tokenizer.decoder_tokenizer):
        streamer = TextIteratorStreamer(one)
        model.generate(**inputs, max_new_tokens=4, streamer=streamer)
        assert "".join(streamer) == expected
    with pytest.raises(ValueError, match="streamers read the output"):
        model.generate(**inputs, streamer=TextIteratorStreamer(tokenizer.processor.tokenizer))


def test_training_with_it_keeps_the_special_ids_and_saves_a_processor(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

    def ids() -> list[Any]:
        holders = (model.config, model.config.decoder, model.generation_config)
        return [getattr(holder, name, None) for holder in holders for name in names]

    before = ids()
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, predict_with_generate=True, generation_max_length=4
    )
    encoded = tokenizer(PROMPTS, text_target=TARGETS)
    rows = [{name: encoded[name][i] for name in ("input_ids", "attention_mask", "labels")} for i in range(2)]
    texts: list[str] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        outputs, labels = (np.where(i != -100, i, tokenizer.pad_token_id) for i in prediction)
        assert len(tokenizer.batch_decode(outputs)) == 2
        texts.extend(tokenizer.batch_decode(labels, skip_special_tokens=True))
        return {}

    trainer = Seq2SeqTrainer(
        model,
        arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.evaluate()
    assert texts == TARGETS
    assert ids() == before
    trainer.save_model()
    assert AutoProcessor.from_pretrained(tmp_path).target_max_length == 30
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is LLM2SLMTokenizer


def test_without_the_package(saved: Path, tmp_path: Path) -> None:
    code = f"""
import json
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq
path = {str(saved)!r}
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)
labels = tokenizer(text_target={TARGETS!r}, padding=True, return_tensors="pt").input_ids
rows = [dict(tokenizer(p, text_target=t)) for p, t in zip({PROMPTS!r}, {TARGETS!r})]
batch = DataCollatorForSeq2Seq(tokenizer)(rows)
tokenizer.save_pretrained({str(tmp_path / "again")!r})
again = AutoTokenizer.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
print(json.dumps([type(tokenizer).__module__, tokenizer.batch_decode(labels, skip_special_tokens=True),
    batch["labels"].tolist() == labels.tolist(), again.encode("src4"), type(again).__name__]))
"""
    module, texts, same, ids, name = fresh_process.run(code, package=False, HF_HOME=str(tmp_path / "home"))
    assert module.startswith("transformers_modules.")
    assert (texts, same, name) == (TARGETS, True, "LLM2SLMTokenizer")
    assert ids == llm_tokenizer().encode("src4")


def test_copies_and_nested_uses(tokenizer: Any, saved: Path) -> None:
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is LLM2SLMTokenizer
        assert other(PROMPTS).input_ids == tokenizer(PROMPTS).input_ids
        assert other.decode([3, 8]) == tokenizer.decode([3, 8])
    processor = LLM2SLMProcessor(tokenizer, tokenizer)
    assert processor.tokenizer.get_vocab() == llm_tokenizer().get_vocab()
    assert processor.decoder_tokenizer.get_vocab() == slm_tokenizer().get_vocab()
    assert "LLM2SLMTokenizer" in repr(tokenizer)


def test_arguments_of_loading(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved, use_fast=True, revision="main", padding_side="left")
    assert tokenizer(PROMPTS, padding=True).attention_mask[1][0] == 0
    short = AutoTokenizer.from_pretrained(saved, model_max_length=3)
    assert (short.model_max_length, len(short(PROMPTS[0], truncation=True).input_ids)) == (3, 3)


def test_folders_without_the_class(tmp_path: Path) -> None:
    """One tokenizer for both sides loads as itself, and an older folder as it did."""
    tokenizer = llm_tokenizer()
    LLM2SLMProcessor(tokenizer, tokenizer).save_pretrained(tmp_path / "one")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "one")) is type(tokenizer)
    LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer()).save_pretrained(tmp_path / "two")
    file = tmp_path / "two" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = config.pop("llm_tokenizer_class")
    del config["auto_map"]["AutoTokenizer"]
    file.write_text(json.dumps(config))
    older = LLM2SLMProcessor.from_pretrained(tmp_path / "two")
    assert older.tokenizer.get_vocab() == tokenizer.get_vocab()
    older.save_pretrained(tmp_path / "two")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "two")) is LLM2SLMTokenizer


def test_a_tokenizer_saved_by_itself_says_nothing_of_the_folder(processor: LLM2SLMProcessor, tmp_path: Path) -> None:
    processor.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"auto_map", "llm_tokenizer_class"} & config.keys()
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is type(processor.tokenizer)


def test_tokenizers_of_other_rules_are_two() -> None:
    words = ["a", "b"]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    plain, with_end = tiny_tokenizer(words, special), tiny_tokenizer(words, special, end="</s>")
    assert LLM2SLMProcessor(with_end, plain).tokenizer.slm_tokenizer is plain
    assert LLM2SLMProcessor(plain, copy.deepcopy(plain)).tokenizer.slm_tokenizer is None
