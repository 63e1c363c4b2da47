"""The processor turns prompts into ids of the LLM, targets into labels of the SLM, and outputs into text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor, LLM2SLMTokenizer, processing_llm2slm
from modeling_llm2slm.inference.factory import have_same_tokenizer
from tests.support.common import build_model, llm_tokenizer, slm_tokenizer, tiny_tokenizer


TEXTS = {
    "tiny": (["src4 src9 src9 src2 src70", "src5"], ["out3 out8", "out1 out5 out5 out30"]),
    "real": (
        ["translate English to German: A dog runs.", "Two men."],
        ["Ein Hund rennt.", "Zwei Männer, die schlafen."],
    ),
}


@pytest.fixture(scope="module", params=["tiny", "real"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of the two tokenizers: tiny ones, or those of every T5 and GPT-2."""
    if kind == "real":
        data = request.getfixturevalue("data_folder")
        return str(data / "tokenizer_t5"), str(data / "tokenizer_gpt2")
    folder = tmp_path_factory.mktemp("tokenizers")
    llm_tokenizer().save_pretrained(folder / "llm")
    slm_tokenizer().save_pretrained(folder / "slm")
    return str(folder / "llm"), str(folder / "slm")


@pytest.fixture
def processor(folders: tuple[str, str]) -> LLM2SLMProcessor:
    return LLM2SLMProcessor.from_encoder_decoder_pretrained(*folders)


@pytest.fixture
def prompts(kind: str) -> list[str]:
    return TEXTS[kind][0]


@pytest.fixture
def targets(kind: str) -> list[str]:
    return TEXTS[kind][1]


def is_kept(labels: torch.Tensor) -> torch.Tensor:
    return labels != -100


@pytest.fixture
def warnings_logged() -> Iterator[list[str]]:
    """What the package warns of: transformers' loggers do not reach pytest's by themselves."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Keep(level=logging.WARNING), logging.getLogger("modeling_llm2slm")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_a_batch(
    processor: LLM2SLMProcessor, folders: tuple[str, str], prompts: list[str], targets: list[str]
) -> None:
    batch = processor(text=prompts, text_target=targets, padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    expected = AutoTokenizer.from_pretrained(folders[0])(prompts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    plain = AutoTokenizer.from_pretrained(folders[1])
    for row, target in zip(batch["labels"], targets, strict=True):
        assert row[is_kept(row)].tolist() == [*plain(target).input_ids, plain.eos_token_id]
    widths = [len(plain(target).input_ids) + 1 for target in targets]
    assert batch["labels"].shape == (len(targets), max(widths))
    assert is_kept(batch["labels"]).sum(-1).tolist() == widths
    assert batch["labels"].dtype == torch.long


def test_labels_end_with_exactly_one_end_token(processor: LLM2SLMProcessor, targets: list[str]) -> None:
    """The pad token is the end token: -100 comes from the mask, so the one real end token stays."""
    tokenizer, end = processor.decoder_tokenizer, processor.eos_token_id
    assert processor.pad_token_id == end
    with_end = [targets[0] + tokenizer.eos_token, targets[1], targets[0] + tokenizer.eos_token * 2]
    labels = processor(text_target=with_end, padding=True, return_tensors="pt")["labels"]
    for row in labels:
        kept = row[is_kept(row)].tolist()
        assert kept[-1] == end
        assert kept.count(end) == 1
    assert not is_kept(labels[0, int(is_kept(labels[0]).sum()) :]).any()
    assert labels[0].tolist() == labels[2].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_padded_right_whatever_the_tokenizers_side(
    side: str, processor: LLM2SLMProcessor, prompts: list[str], targets: list[str]
) -> None:
    processor.decoder_tokenizer.padding_side = processor.tokenizer.padding_side = side
    batch = processor(text=prompts, text_target=targets, padding=True, return_tensors="pt")
    for row in is_kept(batch["labels"]).long():
        assert row.tolist() == sorted(row.tolist(), reverse=True)
    first = batch["attention_mask"][:, 0].tolist()
    assert (0 in first) == (side == "left")
    assert processor.decoder_tokenizer.padding_side == side


def test_a_tokenizer_that_adds_start_and_end_tokens() -> None:
    """Labels have no start token and one end token, also of a tokenizer that puts both around a text."""
    from tokenizers import processors

    slm = tiny_tokenizer(
        ["a", "b"], {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    )
    slm.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", slm.bos_token_id), ("</s>", slm.eos_token_id)]
    )
    assert slm("a b").input_ids[0] == slm.bos_token_id
    processor = LLM2SLMProcessor(llm_tokenizer(), slm)
    ids = slm.convert_tokens_to_ids(["a", "b", "</s>"])
    assert processor(text_target="a b")["labels"] == ids
    assert processor(text_target=["a b", "a"], padding=True)["labels"] == [ids, [ids[0], ids[2], -100]]


def test_one_string_or_a_list(processor: LLM2SLMProcessor, prompts: list[str], targets: list[str]) -> None:
    """Without tensors a string gives flat lists, which are features; a tensor always has a batch dimension."""
    one = processor(text=prompts[0], text_target=targets[0])
    assert all(isinstance(ids[0], int) for ids in one.values())
    many = processor(text=prompts[:1], text_target=targets[:1])
    assert {name: [ids] for name, ids in one.items()} == dict(many)
    tensors = processor(text=prompts[0], text_target=targets[0], return_tensors="pt")
    assert {name: value.tolist() for name, value in tensors.items()} == dict(many)


def test_prompts_or_targets_alone(processor: LLM2SLMProcessor, prompts: list[str], targets: list[str]) -> None:
    assert sorted(processor(text=prompts)) == ["attention_mask", "input_ids"]
    assert sorted(processor(text_target=targets)) == ["labels"]
    with pytest.raises(ValueError, match="text_target"):
        processor()


def test_an_empty_target_is_its_end_token(processor: LLM2SLMProcessor, targets: list[str]) -> None:
    labels = processor(text_target=["", targets[0]], padding=True, return_tensors="pt")["labels"]
    assert labels[0].tolist() == [processor.eos_token_id] + [-100] * (labels.shape[1] - 1)


def test_padding_to_a_multiple(processor: LLM2SLMProcessor, prompts: list[str], targets: list[str]) -> None:
    batch = processor(text=prompts, text_target=targets, padding=True, pad_to_multiple_of=16, return_tensors="pt")
    assert all(value.shape[1] % 16 == 0 for value in batch.values())


def test_padding_to_the_maximum(processor: LLM2SLMProcessor, prompts: list[str], targets: list[str]) -> None:
    kwargs: dict[str, Any] = {"text": prompts, "text_target": targets, "padding": "max_length", "return_tensors": "pt"}
    batch = processor(**kwargs, prompt_max_length=30, target_max_length=25)
    assert {name: value.shape[1] for name, value in batch.items()} == {
        "input_ids": 30,
        "attention_mask": 30,
        "labels": 25,
    }
    short = processor(text=prompts, text_target=targets, padding=True, return_tensors="pt")
    assert is_kept(batch["labels"]).sum() == is_kept(short["labels"]).sum()
    assert batch["attention_mask"].sum() == short["attention_mask"].sum()
    with pytest.raises(ValueError, match="max_length"):
        processor(**kwargs)


def test_truncation_is_never_silent(
    processor: LLM2SLMProcessor, prompts: list[str], targets: list[str], warnings_logged: list[str]
) -> None:
    whole = processor(text=prompts, text_target=targets)
    processor.prompt_max_length, processor.target_max_length = 4, 3
    batch = processor(text=prompts, text_target=targets)
    lengths = [len(row) > 4 for row in whole["input_ids"]], [len(row) > 3 for row in whole["labels"]]
    assert max(map(len, batch["input_ids"])) <= 4
    assert max(map(len, batch["labels"])) <= 3
    assert all(row[-1] == processor.eos_token_id for row in batch["labels"])
    assert all(row[-1] == processor.tokenizer.eos_token_id for row in batch["input_ids"])
    assert [len(row) for row in batch["attention_mask"]] == [len(row) for row in batch["input_ids"]]
    assert len(warnings_logged) == 2
    for message, what, cut in zip(warnings_logged, ("prompt", "target"), lengths, strict=True):
        assert f"{what}_max_length" in message
        assert f"{sum(cut)} of 2" in message


def test_texts_that_fit_are_not_truncated(
    processor: LLM2SLMProcessor, prompts: list[str], targets: list[str], warnings_logged: list[str]
) -> None:
    whole = processor(text=prompts, text_target=targets)
    exact = {
        "prompt_max_length": max(map(len, whole["input_ids"])),
        "target_max_length": max(map(len, whole["labels"])),
    }
    assert dict(processor(text=prompts, text_target=targets, **exact)) == dict(whole)
    long = processor(text=" ".join(prompts * 200), text_target=" ".join(targets * 200))
    assert min(len(long["input_ids"]), len(long["labels"])) > 512
    assert not warnings_logged


@pytest.mark.parametrize("values", [{"prompt_max_length": 0}, {"target_max_length": 1}, {"prompt_max_length": "long"}])
def test_impossible_lengths_are_errors(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer(), **values)


def test_tokenizers_without_needed_tokens_are_errors() -> None:
    bare = tiny_tokenizer(["a"], {"unk_token": "<unk>"})
    with pytest.raises(ValueError, match="tokenizer.*pad"):
        LLM2SLMProcessor(bare, slm_tokenizer())
    padded = tiny_tokenizer(["a"], {"unk_token": "<unk>", "pad_token": "<pad>"})
    with pytest.raises(ValueError, match="decoder_tokenizer.*end token"):
        LLM2SLMProcessor(llm_tokenizer(), padded)


def test_decoding_uses_the_slms_tokenizer(processor: LLM2SLMProcessor, targets: list[str]) -> None:
    ids = processor(text_target=targets)["labels"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == targets
    assert processor.decode(ids[0], skip_special_tokens=True) == targets[0]
    assert processor.decode(ids[0]) == processor.decoder_tokenizer.decode(ids[0])
    assert processor.eos_token_id == processor.decoder_tokenizer.eos_token_id
    assert processor.pad_token_id == processor.decoder_tokenizer.pad_token_id
    assert set(processor.model_input_names) == {"input_ids", "attention_mask", "labels"}


def test_save_and_load(processor: LLM2SLMProcessor, prompts: list[str], targets: list[str], tmp_path: Path) -> None:
    processor.prompt_max_length, processor.target_max_length = 50, 40
    processor.save_pretrained(tmp_path)
    loaded = LLM2SLMProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LLM2SLMProcessor
    assert (loaded.prompt_max_length, loaded.target_max_length) == (50, 40)
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.decoder_tokenizer.get_vocab() == processor.decoder_tokenizer.get_vocab()
    assert loaded.pad_token_id == processor.pad_token_id
    kwargs = {"text": prompts, "text_target": targets, "padding": True}
    assert dict(loaded(**kwargs)) == dict(processor(**kwargs))
    both = AutoTokenizer.from_pretrained(tmp_path)
    assert type(both) is LLM2SLMTokenizer
    llms = type(processor.tokenizer).from_pretrained(tmp_path)
    for tokenizer in (llms, both.processor.tokenizer):
        assert type(tokenizer) is type(processor.tokenizer)
        assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    for tokenizer in (llms, both):
        assert tokenizer(prompts).input_ids == processor(text=prompts)["input_ids"]


def test_auto_processor_loads_from_the_folder_of_a_model(
    processor: LLM2SLMProcessor, prompts: list[str], targets: list[str], tmp_path: Path
) -> None:
    build_model("replace").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LLM2SLMProcessor
    assert dict(loaded(text=prompts, text_target=targets)) == dict(processor(text=prompts, text_target=targets))


def test_arguments_of_the_tokenizers(folders: tuple[str, str]) -> None:
    processor = LLM2SLMProcessor.from_encoder_decoder_pretrained(
        *folders, encoder_padding_side="left", decoder_model_max_length=77, target_max_length=9
    )
    assert processor.tokenizer.padding_side == "left"
    assert processor.decoder_tokenizer.model_max_length == 77
    assert (processor.prompt_max_length, processor.target_max_length) == (None, 9)


# Whether two tokenizers are the same one, by their content.


def save(tokenizer: PreTrainedTokenizerFast, path: Path) -> str:
    tokenizer.save_pretrained(path)
    return str(path)


def test_tokenizers_are_compared_by_content(tmp_path: Path) -> None:
    first = save(slm_tokenizer(), tmp_path / "a")
    same = save(slm_tokenizer(), tmp_path / "b")
    used = slm_tokenizer()
    used.pad_token = used.eos_token
    used(["out1", "out2 out3"], padding=True, truncation=True, max_length=5)
    after_use = save(used, tmp_path / "used")
    swapped = tiny_tokenizer(["out1", "out0"], {"unk_token": "<unk>", "eos_token": "<end>"})
    plain = tiny_tokenizer(["out0", "out1"], {"unk_token": "<unk>", "eos_token": "<end>"})
    with_end = tiny_tokenizer(["out0", "out1"], {"unk_token": "<unk>", "eos_token": "<end>"}, end="<end>")
    paths = {
        name: save(tokenizer, tmp_path / name)
        for name, tokenizer in locals().items()
        if name in ("swapped", "plain", "with_end")
    }
    assert have_same_tokenizer(first, same, {}, {})
    assert have_same_tokenizer(first, after_use, {}, {})
    assert not have_same_tokenizer(first, paths["plain"], {}, {})
    assert not have_same_tokenizer(paths["plain"], paths["swapped"], {}, {})
    assert not have_same_tokenizer(paths["plain"], paths["with_end"], {}, {})
    assert not have_same_tokenizer(first, str(tmp_path / "nothing"), {}, {})
    assert not have_same_tokenizer(first, None, {}, {})


def test_real_tokenizers_are_compared_by_content(data_folder: Path, tmp_path: Path) -> None:
    t5, gpt2 = str(data_folder / "tokenizer_t5"), str(data_folder / "tokenizer_gpt2")
    assert not have_same_tokenizer(t5, gpt2, {}, {})
    assert have_same_tokenizer(t5, t5, {}, {})
    assert have_same_tokenizer(gpt2, save(AutoTokenizer.from_pretrained(gpt2), tmp_path / "copy"), {}, {})


@pytest.mark.parametrize("same", [True, False])
def test_the_factory_compares_tokenizers(same: bool, tmp_path: Path) -> None:
    parts = build_model("add_shared")
    parts.encoder.llm.save_pretrained(tmp_path / "llm")
    parts.decoder.save_pretrained(tmp_path / "slm")
    slm_tokenizer().save_pretrained(tmp_path / "slm")
    (slm_tokenizer() if same else llm_tokenizer()).save_pretrained(tmp_path / "llm")
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        str(tmp_path / "llm"), str(tmp_path / "slm")
    )
    assert model.config.shared_tokenizer == same
    assert any("prompt_embedding" in name for name in model.state_dict()) != same


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def chat_processor() -> LLM2SLMProcessor:
    words = ["user", "system", "assistant", ":", "src1", "src2", "src3"]
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = tiny_tokenizer(words, special, end="</s>")
    tokenizer.chat_template = TEMPLATE
    return LLM2SLMProcessor(tokenizer, slm_tokenizer())


def test_a_chat_template_of_the_llm_is_honoured(tmp_path: Path) -> None:
    """By the processor and by its copy on disk; the template's special tokens are all there are."""
    conversations = [
        [{"role": "user", "content": "src1 src2"}],
        [{"role": "system", "content": "src3"}, {"role": "user", "content": "src1"}],
    ]
    chat_processor().save_pretrained(tmp_path)
    for processor in (chat_processor(), LLM2SLMProcessor.from_pretrained(tmp_path)):
        text = processor.apply_chat_template(conversations[0])
        assert text == "user : src1 src2 </s> assistant :"
        one = processor(text=conversations[0], text_target="out1")
        assert processor.tokenizer.convert_ids_to_tokens(one["input_ids"]) == text.split()
        batch = processor(text=conversations, padding=True, return_tensors="pt")
        assert batch["attention_mask"].sum(-1).tolist() == [len(text.split()), 10]
        assert batch["input_ids"][0][:7].tolist() == one["input_ids"]
        same = processor.apply_chat_template(conversations, tokenize=True, padding=True, return_tensors="pt")
        assert torch.equal(same["input_ids"], batch["input_ids"])
        shown = {"add_generation_prompt": False}
        assert processor.apply_chat_template(conversations[0], **shown).endswith("</s> ")
        tokens = processor.apply_chat_template(conversations[0], tokenize=True, **shown)["input_ids"]
        assert tokens == one["input_ids"][:-2]


def test_a_conversation_without_a_template_is_an_error() -> None:
    processor = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
    with pytest.raises(ValueError, match="chat template"):
        processor(text=[{"role": "user", "content": "src1"}])


def test_empty_lists_are_errors() -> None:
    processor = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
    with pytest.raises(ValueError, match="`text` is an empty list"):
        processor(text=[])
    with pytest.raises(ValueError, match="`text_target` is an empty list"):
        processor(text=["src1"], text_target=[])


def test_numbers_of_prompts_and_targets_must_agree() -> None:
    processor = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
    for prompts, targets in (("src1", ["out1", "out2"]), (["src1", "src2"], "out1"), (["src1"], ["out1", "out2"])):
        with pytest.raises(ValueError, match="prompts and `text_target` . targets. Pass one target for each prompt"):
            processor(text=prompts, text_target=targets)


def test_values_that_are_not_text_are_errors() -> None:
    processor = LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
    conversation = [{"role": "user", "content": "src1"}]
    for texts in ([["src1", "src2"]], ["src1", ["src2"]], ["src1", None], [None], ["src1", conversation], [3]):
        with pytest.raises(ValueError, match="`text` holds .* texts, or conversations"):
            processor(text=texts)
    with pytest.raises(ValueError, match="`text_target` holds .*'out1'.* takes texts"):
        processor(text_target=[["out1", "out2"]])


def test_the_uploaded_class_takes_the_limits_of_tokenizers() -> None:
    uploaded = processing_llm2slm.LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())
    prompt, target = "src1 src2 src3 src4", "out1 out2 out3 out4"
    for limits in ({"max_length": 3}, {"max_length": 3, "truncation": True}):
        features = uploaded(text=prompt, text_target=target, **limits)
        assert [len(features[name]) for name in ("input_ids", "labels")] == [3, 3]
        assert features["input_ids"][-1] == uploaded.tokenizer.eos_token_id
        assert features["labels"][-1] == uploaded.eos_token_id
    assert len(uploaded(text=prompt, truncation=True)["input_ids"]) == 5
    assert uploaded(text="src1", padding="max_length", max_length=4)["attention_mask"] == [1, 1, 0, 0]
