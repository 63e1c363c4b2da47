"""Every kind of checkpoint behind one interface: features, outputs, streams, sizes, errors of one sentence."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import DataCollatorForSeq2Seq, GPT2LMHeadModel, StoppingCriteria, ViTConfig, ViTModel

from modeling_llm2slm.inference.families import DecoderOnlyTextToText, LLM2SLMTextToText
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.support.checkpoints import KINDS, PROMPTS, TARGETS
from tests.support.common import gpt2_config, slm_tokenizer


END = 1


@pytest.fixture(params=KINDS)
def text_to_text(request, checkpoints):
    return TextToText.from_pretrained(checkpoints[request.param])


def test_features_end_a_target_once_and_are_not_padded(text_to_text):
    features = text_to_text.features(PROMPTS, TARGETS)
    assert sorted(features) == ["attention_mask", "input_ids", "labels"]
    for ids, mask, labels, target in zip(
        *(features[name] for name in ("input_ids", "attention_mask", "labels")), TARGETS, strict=True
    ):
        assert mask == [1] * len(ids)
        kept = [label for label in labels if label != -100]
        assert kept[-1] == END
        assert text_to_text.tokenizer.decode(kept[:-1]) == target


def test_outputs_do_not_depend_on_the_batch(text_to_text):
    alone = text_to_text.generate_tokens(PROMPTS, batch_size=1, max_new_tokens=6)
    together = text_to_text.generate_tokens(PROMPTS, batch_size=5, max_new_tokens=6)
    assert alone == together
    assert len({tuple(output) for output in alone}) > 2  # a model with one output for all would prove nothing


def test_a_stream_is_the_generated_text_in_pieces(text_to_text):
    for prompt in PROMPTS[:3]:
        kwargs = {"max_new_tokens": 6, "suppress_tokens": [0, END]}  # so that no output is empty
        pieces = list(text_to_text.stream(prompt, **kwargs))
        assert "".join(pieces) == text_to_text.generate([prompt], **kwargs)[0]
        assert len(pieces) > 1


def test_a_stream_that_is_closed_early_stops_the_model(text_to_text):
    class SlowSteps(StoppingCriteria):
        count = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.count += 1
            time.sleep(0.05)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    steps, threads = SlowSteps(), set(threading.enumerate())
    stream = text_to_text.stream(PROMPTS[0], max_new_tokens=30, suppress_tokens=[0, END], stopping_criteria=[steps])
    next(stream)
    stream.close()
    assert set(threading.enumerate()) <= threads
    assert 0 < steps.count < 10


def test_an_error_while_streaming_reaches_the_caller(text_to_text):
    with pytest.raises(ValueError, match="num_beams"):
        list(text_to_text.stream("src1", num_beams=2))


@pytest.mark.parametrize("wrong", [None, 3, b"src1", {"role": "user", "content": "src1"}, ["src1", None]], ids=repr)
def test_what_is_no_prompt_is_one_sentence(checkpoints, wrong):
    with pytest.raises(ValueError, match="is not a prompt: "):
        TextToText.from_pretrained(checkpoints["llm2slm"])(wrong)


def test_stop_strings_need_no_tokenizer(text_to_text, monkeypatch):
    given = []

    def generate(streamer=None, tokenizer=None, **kwargs):
        given.append(tokenizer)
        if streamer is not None:
            streamer.end()
        return torch.ones((1, 30), dtype=torch.long)

    monkeypatch.setattr(text_to_text.model, "generate", generate)
    text_to_text(PROMPTS[0])
    text_to_text(PROMPTS[0], stop_strings=["src5"])
    list(text_to_text.stream(PROMPTS[0], stop_strings="src5"))
    text_to_text.model.generation_config.stop_strings = ["src5"]
    text_to_text(PROMPTS[:1])
    assert given == [None, *[text_to_text.tokenizer] * 3]


def test_whatever_else_is_asked_for_the_output_is_text(text_to_text):
    expected = text_to_text(PROMPTS, max_new_tokens=6)
    assert text_to_text(PROMPTS, max_new_tokens=6, return_dict_in_generate=True, output_scores=True) == expected
    text_to_text.model.generation_config.return_dict_in_generate = True
    assert text_to_text(PROMPTS, max_new_tokens=6) == expected


def test_a_seed_repeats_a_stream(text_to_text):
    kwargs = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0}
    outputs = ["".join(text_to_text.stream(PROMPTS[0], seed=seed, **kwargs)) for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] == text_to_text(PROMPTS[0], seed=1, **kwargs)
    assert outputs[0] != outputs[2]


def test_no_prompts_give_no_outputs(text_to_text):
    assert text_to_text.generate([]) == []


def test_an_empty_prompt_is_found_before_any_compute(checkpoints, monkeypatch):
    """A tokenizer without an end token makes an empty prompt of an empty text."""
    text_to_text = TextToText.from_pretrained(checkpoints["llm2slm"])
    assert text_to_text.position_problem(0, 4) == "The prompt is empty"
    monkeypatch.setattr(text_to_text, "features", lambda prompts: {"input_ids": [[3, 4], []]})
    monkeypatch.setattr(text_to_text, "read", None)
    with pytest.raises(ValueError, match="The prompt is empty"):
        text_to_text.generate(["src1", ""])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 10**6}, "num_beams is 1000000, but it must be at most 1024"),
        ({"do_sample": True, "temperature": 1e-300}, "temperature is 1e-300, but it must be at least 0.001"),
        ({"do_sample": True, "top_p": 7}, "top_p is 7, but it must be at most 1"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1, but it must be at least 0"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2, but it must be at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, but it must be at least 0.001"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but it must be at least 1"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many', but it must be a whole number"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id is .* a whole number or a list with a whole number in each place"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id is \[1, -2\], but it must be at least 0"),
        ({"suppress_tokens": [10**30]}, "suppress_tokens is .* a whole number of at most 64 bits"),
        ({"seed": "x"}, "seed is 'x', but it must be a whole number"),
        ({"generation_config": "x"}, "generation_config is 'x', but it must be a GenerationConfig"),
        ({"stopping_criteria": "x"}, "stopping_criteria is 'x', but it must be a list"),
        ({"streamer": "x"}, "streamer is 'x', but it must be a BaseStreamer"),
        ({"assistant_model": "x"}, "assistant_model is 'x', but it must be a Module"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
    ],
)
def test_a_value_that_no_model_can_use_is_found_before_any_compute(checkpoints, monkeypatch, options, message):
    text_to_text = TextToText.from_pretrained(checkpoints["llm2slm"])
    monkeypatch.setattr(text_to_text.model, "generate", None)
    with pytest.raises(ValueError, match=message):
        text_to_text.generate(PROMPTS[:1], **options)


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forced_bos_token_id", 10**6),
        ("forced_eos_token_id", [1, 10**6]),
        ("suppress_tokens", [10**6]),
        ("begin_suppress_tokens", torch.tensor([0, 10**6])),
        ("bad_words_ids", [[0], [1, 10**6]]),
    ],
)
def test_a_token_id_that_the_vocabulary_lacks_is_found_before_any_compute(
    text_to_text, monkeypatch, name, value, default
):
    monkeypatch.setattr(text_to_text.model, "generate", None)
    options = {} if default else {name: value}
    if default:
        monkeypatch.setattr(text_to_text.model.generation_config, name, value, raising=False)
    with pytest.raises(ValueError, match=rf"^{name} holds the id 1000000, but the vocabulary of outputs"):
        text_to_text.generate(PROMPTS[:1], **options)


def test_a_whole_number_stands_for_a_number(text_to_text):
    for options in ({"repetition_penalty": 2}, {"length_penalty": 1, "num_beams": 2}, {"max_time": 60}):
        as_numbers = {name: float(value) if name != "num_beams" else value for name, value in options.items()}
        outputs = [text_to_text.generate(PROMPTS[:2], max_new_tokens=4, **given) for given in (options, as_numbers)]
        assert outputs[0] == outputs[1]
    assert text_to_text.generate(PROMPTS[:1], max_new_tokens=2, do_sample=True, temperature=1, top_p=1, min_p=0)


def test_none_stands_for_the_default(text_to_text):
    defaults = dict.fromkeys(
        ("num_beams", "num_return_sequences", "do_sample", "max_new_tokens", "eos_token_id", "seed")
    )
    assert text_to_text.generate(PROMPTS[:2], **defaults) == text_to_text.generate(PROMPTS[:2])


def test_lengths_are_checked_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="prompt_max_length is 0, but it must be at least 1"):
        TextToText.from_pretrained("no/such/model", prompt_max_length=0)


def test_target_max_length_limits_outputs(text_to_text, monkeypatch):
    text_to_text.target_max_length = 3
    suppressed = text_to_text.generate_tokens(["src1"], suppress_tokens=[END])
    assert len(suppressed[0]) == 3
    assert len(text_to_text.generate_tokens(["src1"], suppress_tokens=[END], max_new_tokens=4)[0]) == 4


def test_the_limit_of_the_checkpoint_applies(text_to_text):
    text_to_text.model.generation_config.max_new_tokens = 3
    assert len(text_to_text.generate_tokens(["src1"], suppress_tokens=[END])[0]) == 3
    assert len(text_to_text.generate_tokens(["src1"], suppress_tokens=[END], max_new_tokens=4)[0]) == 4
    text_to_text.target_max_length = 2
    assert len(text_to_text.generate_tokens(["src1"], suppress_tokens=[END])[0]) == 2


def test_a_saved_model_generates_as_before(text_to_text, tmp_path):
    text_to_text.save_pretrained(tmp_path)
    reloaded = TextToText.from_pretrained(tmp_path)
    assert type(reloaded) is type(text_to_text)
    assert reloaded.generate(PROMPTS, max_new_tokens=6) == text_to_text.generate(PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_truncated_with_a_warning_and_still_end(checkpoints, kind, caplog):
    limited = TextToText.from_pretrained(checkpoints[kind], prompt_max_length=3, target_max_length=3)
    features = limited.features(PROMPTS[:1], TARGETS[:1])
    labels = [label for label in features["labels"][0] if label != -100]
    assert len(labels) == 3
    assert labels[-1] == END
    prompt = features["input_ids"][0]
    assert caplog.text.count("1 of 1") == 2  # nothing is truncated in silence
    assert len(prompt) == (
        3 if kind != "slm" else 3 + 1 + 3
    )  # a decoder-only model has one sequence, with a separator


def test_a_decoder_only_model_continues_a_prompt_that_its_tokenizer_starts(checkpoints):
    text_to_text = TextToText.from_pretrained(checkpoints["slm"])
    tokenizer = text_to_text.tokenizer
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 5)]
    )
    features = text_to_text.features(PROMPTS[:1], TARGETS[:1])
    prompt, target = (tokenizer(text, add_special_tokens=False).input_ids for text in (PROMPTS[0], TARGETS[0]))
    assert features["input_ids"] == [[5, *prompt, *target, END]]
    assert features["labels"] == [[-100] * (1 + len(prompt)) + [*target, END]]
    text_to_text.prompt_max_length = 3
    assert text_to_text.features(PROMPTS[:1])["input_ids"] == [[5, *prompt[:2]]]


def test_an_engine_is_chosen_by_name(checkpoints):
    chosen = TextToText.from_pretrained(checkpoints["llm2slm"], engine="pytorch")
    assert type(chosen) is LLM2SLMTextToText
    with pytest.raises(ValueError, match="Engine 'torch' does not exist. Choose one of: pytorch"):
        TextToText.from_pretrained(checkpoints["llm2slm"], engine="torch")
    with pytest.raises(ValueError, match="is not exported for openvino. Export it first: `llm2slm export"):
        TextToText.from_pretrained(checkpoints["llm2slm"], engine="openvino")


def test_each_kind_has_its_class(checkpoints):
    names = {kind: type(TextToText.from_pretrained(path)).__name__ for kind, path in checkpoints.items()}
    assert names == {
        "llm": "EncoderDecoderTextToText", "slm": "DecoderOnlyTextToText", "llm2slm": LLM2SLMTextToText.__name__
    }  # fmt: skip


def test_parameters_are_counted_once(checkpoints):
    counts = {kind: TextToText.from_pretrained(path).parameters() for kind, path in checkpoints.items()}
    assert counts["slm"]["total"] == counts["slm"]["trainable"] == counts["slm"]["decode"]
    assert counts["llm2slm"]["decode"] == counts["slm"]["total"]
    assert counts["llm2slm"]["decode"] < counts["llm2slm"]["trainable"] < counts["llm2slm"]["total"]
    assert counts["llm"]["decode"] < counts["llm"]["total"]


def test_parts_of_an_llm2slm_model_are_complete(checkpoints):
    composite = TextToText.from_pretrained(checkpoints["llm2slm"])
    parts = {part.name: part for part in composite.parts()}
    assert list(parts) == ["LLM", "projector", "SLM"]
    assert sum(part.parameters for part in parts.values()) == composite.parameters()["total"]
    assert parts["SLM"].config is composite.model.config.decoder
    assert {part.dtype for part in parts.values()} == {"float32"}


class TestDecoderOnly:
    @pytest.fixture
    def slm(self, checkpoints):
        return TextToText.from_pretrained(checkpoints["slm"])

    def test_only_the_target_counts_in_the_loss(self, slm):
        features = slm.features(["src1 src2"], ["src3"])
        one, two, three = slm.tokenizer.convert_tokens_to_ids(["src1", "src2", "src3"])
        assert features["input_ids"] == [[one, two, END, three, END]]
        assert features["labels"] == [[-100, -100, -100, three, END]]

    def test_logits_of_targets_give_the_loss_and_gradients_of_whole_sequences(self, slm):
        features = slm.features(PROMPTS, TARGETS)
        rows = [{name: features[name][row] for name in features} for row in range(len(PROMPTS))]
        short, whole = slm.collator(rows), DataCollatorForSeq2Seq(slm.tokenizer)(rows)
        assert short["logits_to_keep"] == 1 + 7
        losses, gradients = [], []
        for batch in (short, whole):
            output = slm.model(**batch)
            losses.append(output.loss)
            gradients.append(torch.autograd.grad(output.loss, slm.model.transformer.wte.weight)[0])
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)

    def test_one_token_may_start_end_and_pad(self):
        # GPT-2 has one token to start and end, and none to pad.
        slm = DecoderOnlyTextToText(GPT2LMHeadModel(gpt2_config()).eval(), slm_tokenizer())
        end = slm.tokenizer.eos_token_id
        assert slm.tokenizer.pad_token_id == end
        assert slm.features(["out1"], ["out2"])["input_ids"][0][1::2] == [end, end]
        prompts = ["out1 out2 out3", "out5"]
        assert slm.generate(prompts, 2, max_new_tokens=5) == slm.generate(prompts, 1, max_new_tokens=5)

    def test_too_few_positions_are_an_error_before_any_compute(self, slm, monkeypatch):
        monkeypatch.setattr(slm.model, "generate", None)
        with pytest.raises(ValueError, match=r"69 tokens together, but the model has 64 positions"):
            slm.generate([" ".join(["src1"] * 60)], max_new_tokens=8)
        with pytest.raises(ValueError, match=r"prompt_max_length"):
            slm.generate([" ".join(["src1"] * 60)], max_new_tokens=8)


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "no weights":
        weights.unlink()
    elif how == "weights missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if name.endswith(("c_fc.weight", "wi.weight"))))
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "deep config":
        (folder / "config.json").write_text("[" * 100_000)
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "how", ["truncated weights", "no weights", "weights missing", "broken config", "deep config", "no tokenizer"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_an_error_of_one_line(checkpoints, tmp_path, kind, how):
    TextToText.from_pretrained(checkpoints[kind]).save_pretrained(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(OSError, match=tmp_path.name) as caught:
        TextToText.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_type_is_an_error(tmp_path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vit model, which does not generate text"):
        TextToText.from_pretrained(tmp_path)


def test_an_adapter_alone_is_an_error_with_the_command_that_merges_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base", "peft_type": "LORA"}')
    with pytest.raises(OSError, match="is an adapter, not a checkpoint. Merge it with its base: `llm2slm convert"):
        TextToText.from_pretrained(tmp_path)


def test_an_unknown_model_type_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(OSError, match="cannot be loaded"):
        TextToText.from_pretrained(tmp_path)


def test_weights_are_loaded_in_the_dtype_asked_for(checkpoints, tmp_path):
    TextToText.from_pretrained(checkpoints["slm"], dtype="bfloat16").save_pretrained(tmp_path)
    assert TextToText.from_pretrained(tmp_path).model.dtype == torch.float32
    assert TextToText.from_pretrained(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16
