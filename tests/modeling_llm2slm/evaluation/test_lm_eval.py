"""lm-eval scores an LLM-to-SLM model as `llm2slm evaluate` and the model itself do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_llm2slm.evaluation.evaluate import evaluate
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import EvaluateSettings
from tests.support.checkpoints import PROMPTS, write_checkpoint, write_pairs
from tests.support.common import build_parts, llm_tokenizer, tiny_tokenizer
from tests.support.families import SLM_VOCAB_SIZE


lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'modeling-llm2slm[lm-eval]'")

from lm_eval.tasks import TaskManager  # noqa: E402 - after the check

from modeling_llm2slm import LLM2SLMProcessor  # noqa: E402 - after the check
from modeling_llm2slm.evaluation.lm_eval import LLM2SLMEvalModel  # noqa: E402 - after the check
from modeling_llm2slm.inference.families import LLM2SLMTextToText  # noqa: E402 - after the check


TASKS = Path(__file__).parents[2] / "support" / "lm_eval_tasks"
NEW_TOKENS = 6
CONTINUATIONS = ("out3 out8", "out1", "out90 out2 out2 out41 out7", "out11 out5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def data(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts with targets that the model generates, some of them in part only."""
    outputs = TextToText.from_pretrained(checkpoint).generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    targets = [output if row % 3 else " ".join(output.split()[:-2]) for row, output in enumerate(outputs)]
    pairs = [{"prompt": prompt, "target": target} for prompt, target in zip(PROMPTS, targets, strict=True)]
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs)


@pytest.fixture(scope="module")
def model() -> LLM2SLMEvalModel:
    """A model whose two tokenizers share no word."""
    words = ["abcdef", *(f"out{number}" for number in range(1, SLM_VOCAB_SIZE - 2))]  # stop strings need the first one
    special = {"unk_token": "<unk>", "bos_token": "<end>", "eos_token": "<end>"}
    processor = LLM2SLMProcessor(llm_tokenizer(), tiny_tokenizer(words, special, special_last=True))
    return LLM2SLMEvalModel(LLM2SLMTextToText(build_parts().model.eval(), processor), batch_size=3)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def scores(results: dict[str, Any], task: str) -> dict[str, float]:
    return {name.removesuffix(",none"): value for name, value in results["results"][task].items() if ",none" in name}


def test_a_task_gives_the_scores_of_evaluate(checkpoint: str, data: str) -> None:
    expected = evaluate(checkpoint, data, EvaluateSettings(timed_outputs=0, max_new_tokens=NEW_TOKENS))["scores"]
    assert 0 < expected["exact_match"] < 100
    results = lm_eval.simple_evaluate(
        model="llm2slm", model_args=f"pretrained={checkpoint}", tasks=["llm2slm_outputs", "llm2slm_choices"],
        batch_size="auto", max_batch_size=3, device="cpu", bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": data}),
    )  # fmt: skip
    found = scores(results, "llm2slm_outputs")
    assert found["bleu"] == pytest.approx(expected["bleu"])
    assert found["chrf"] == pytest.approx(expected["chrf"])
    assert found["exact_match"] == pytest.approx(expected["exact_match"] / 100)
    model = LLM2SLMEvalModel(checkpoint)
    right = []
    for row in map(json.loads, Path(data).read_text(encoding="utf-8").splitlines()):
        choices = (row["target"], "src5", "src6 src7 src8")
        likelihoods = [reference_score(model, row["prompt"], choice)[0] for choice in choices]
        right.append(likelihoods[0] == max(likelihoods))
    assert scores(results, "llm2slm_choices")["acc"] == pytest.approx(sum(right) / len(right))


def reference_score(model: LLM2SLMEvalModel, context: str, continuation: str) -> tuple[float, bool]:
    """The score of one continuation, alone and token by token."""
    processor = model.text_to_text.processor
    prompt = torch.tensor([processor.tokenizer(context).input_ids])
    tokens = processor.decoder_tokenizer(continuation, add_special_tokens=False).input_ids
    written, total, greedy = [], 0.0, True
    start = model.text_to_text.model.config.decoder_start_token_id
    for token in tokens:
        with torch.no_grad():
            outputs = model.text_to_text.model(prompt, decoder_input_ids=torch.tensor([[start, *written]]))
        total += float(outputs.logits[0, -1].log_softmax(-1)[token])
        greedy &= int(outputs.logits[0, -1].argmax()) == token
        written.append(token)
    return total, greedy


def test_log_likelihoods_are_those_of_each_pair_alone(model: LLM2SLMEvalModel) -> None:
    contexts = ("src1 src2 src3", "src9", "src4 src20 src7 src1 src30 src2")
    generated = model.text_to_text.generate(list(contexts), max_new_tokens=3)
    pairs = [(context, text) for context in contexts for text in CONTINUATIONS]
    pairs += list(zip(contexts, generated, strict=True))
    found = model.loglikelihood(requests(*((context, f" {text}") for context, text in pairs)))
    expected = [reference_score(model, *pair) for pair in pairs]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found[-3:]] == [True] * 3
    assert model.loglikelihood(requests(("src1", ""), ("", "out3"))) == [
        (0.0, True),
        pytest.approx(reference_score(model, "", "out3")),
    ]


def test_a_prompt_is_read_once_for_all_its_choices(model: LLM2SLMEvalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = model.text_to_text.read, []
    monkeypatch.setattr(model.text_to_text, "read", lambda features: seen.append(features) or read(features))
    model.loglikelihood(requests(*(("src1 src2", text) for text in CONTINUATIONS[:3])))
    assert [len(features["input_ids"]) for features in seen] == [1]


def test_outputs_end_before_stop_strings_and_keep_their_settings(model: LLM2SLMEvalModel) -> None:
    contexts = ["src1 src2 src3", "src9", "src4 src20 src7", "src9"]
    (whole, *_), plain = model.text_to_text.generate(contexts[:1], max_new_tokens=8), {"max_gen_toks": 8}
    words = whole.split()
    stop = next(word for word in words[1:] if words.count(word) == 1)
    settings = [{"until": [stop, "", "nowhere"], **plain}, {"until": [], "max_gen_toks": 3}, plain, plain]
    outputs = model.generate_until(requests(*zip(contexts, settings, strict=True)))
    assert outputs[0] == whole.partition(stop)[0]
    assert outputs[1] == model.text_to_text.generate(["src9"], max_new_tokens=3)[0]
    assert outputs[2:] == model.text_to_text.generate(contexts[2:], max_new_tokens=8)
    greedy = {"do_sample": False, "temperature": 0.7, **plain}
    sampled = {"do_sample": True, "temperature": 5.0, **plain}
    found = model.generate_until(requests((contexts[0], greedy), *[(contexts[0], sampled)] * 5))
    assert found[0] == whole
    assert len(set(found)) > 2


def test_a_batch_that_does_not_fit_is_halved(model: LLM2SLMEvalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = LLM2SLMEvalModel(model.text_to_text, batch_size="auto", max_batch_size=4)
    pairs = [(prompt, {"max_gen_toks": 4}) for prompt in PROMPTS]
    expected, write, sizes = automatic.generate_until(requests(*pairs)), model.text_to_text.write, []

    def short_of_memory(inputs: dict[str, Any], **kwargs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return write(inputs, **kwargs)

    monkeypatch.setattr(model.text_to_text, "write", short_of_memory)
    assert automatic.generate_until(requests(*pairs)) == expected
    assert sizes == [4, 2] + [1] * len(PROMPTS)
    with pytest.raises(torch.OutOfMemoryError):
        model.generate_until(requests(*pairs))


def test_messages_are_written_with_the_template_of_the_llm(model: LLM2SLMEvalModel) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}src5 {% endif %}</s>"
    )
    model.tokenizer.chat_template = template
    try:
        chat = [{"role": "user", "content": "src1 src2"}]
        text = model.apply_chat_template(chat)
        assert text == "src1 src2 src5 </s>"
        found = model.generate_until(requests((text, {"max_gen_toks": 5})))
        assert found == model.text_to_text.generate([chat], max_new_tokens=5)
        assert model.chat_template(True) == template
        chat.append({"role": "assistant", "content": "src6"})
        assert model.apply_chat_template(chat, add_generation_prompt=False) == "src1 src2 src6"
    finally:
        model.tokenizer.chat_template = None
    assert model.chat_template(False) == ""


def test_a_long_context_is_an_error_or_keeps_its_end(checkpoint: str) -> None:
    long = " ".join(f"src{number}" for number in range(70))
    with pytest.raises(ValueError, match=r"The prompt has 71 tokens .*prompt_max_length"):
        LLM2SLMEvalModel(checkpoint).loglikelihood(requests((long, "src1")))
    short = LLM2SLMEvalModel(checkpoint, prompt_max_length=4)
    end = requests((long, "src1"), ("src67 src68 src69", "src1"))
    cut, whole = short.loglikelihood(end)
    assert cut == pytest.approx(whole)


def test_what_is_not_supported_says_so(model: LLM2SLMEvalModel, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="a text without a prompt has none"):
        model.loglikelihood_rolling(requests(("src1",)))
    with pytest.raises(ValueError, match=r"is not an LLM-to-SLM model.*--model hf"):
        LLM2SLMEvalModel(write_checkpoint("slm", tmp_path))
    with pytest.raises(TypeError, match="no_such_option"):
        LLM2SLMEvalModel(tmp_path / "slm", no_such_option=1)
    exported = LLM2SLMEvalModel(model.text_to_text)
    exported.text_to_text = SimpleNamespace(model=object())
    with pytest.raises(ValueError, match="was exported: take the checkpoint"):
        exported.loglikelihood(requests(("src1", "out1")))


@pytest.mark.slow
def test_the_command(checkpoint: str, data: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modeling_llm2slm.evaluation.lm_eval", "--model", "llm2slm"]
    command += ["--model_args", f"pretrained={checkpoint}", "--tasks", "llm2slm_outputs", "--include_path", str(TASKS)]
    command += ["--metadata", f"data={data}", "--output_path", str(tmp_path / "results"), "--batch_size", "4"]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[3])
    (file,) = (tmp_path / "results").rglob("results_*.json")
    expected = evaluate(checkpoint, data, EvaluateSettings(timed_outputs=0, max_new_tokens=NEW_TOKENS))["scores"]
    assert scores(json.loads(file.read_text()), "llm2slm_outputs")["chrf"] == pytest.approx(expected["chrf"])
