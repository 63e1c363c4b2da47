"""Plans: what is measured and counted before training, and which SLM is recommended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertConfig

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import PlanSettings
from modeling_llm2slm.workflows import limited
from modeling_llm2slm.workflows import plan as planning
from modeling_llm2slm.workflows.plan import Candidate, plan, plan_within_limit, recommend
from tests.support.checkpoints import PAIRS, PROMPTS, write_bart, write_checkpoint, write_pairs
from tests.support.common import gpt2_config, slm_tokenizer, t5_config
from tests.support.quick_start import start_quickly


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm", tmp_path_factory.mktemp("llm"))


def test_plan_reports_speed_memory_and_hours_of_each_slm(
    llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]) + "\n")
    slm_tokenizer().save_pretrained(tmp_path / "tokenizer")
    large = TextToText.from_pretrained(llm)
    output = large.features([PROMPTS[0]], ["src1 src2 src3 src4"])["labels"][0]
    monkeypatch.setattr(TextToText, "generate_tokens", lambda self, prompts, *_, **__: [output] * len(prompts))
    steps: list[str] = []
    result = plan(
        llm, tmp_path / "prompts.txt", PlanSettings(timed_prompts=2, batch_size=2, max_new_tokens=8),
        presets=["tiny"], slm_tokenizers={"tiny": str(tmp_path / "tokenizer")}, progress=steps.append,
    )  # fmt: skip
    large = TextToText.from_pretrained(llm)
    lengths = [len(ids) for ids in large.features(PROMPTS)["input_ids"]]
    assert result["prompts"] == len(PROMPTS) + 1
    assert result["prompt_tokens"] == pytest.approx((sum(lengths) + lengths[0]) / 9)
    assert result["store_bytes"] == sum(lengths) * 24 * 2  # equal prompts are stored once
    candidate = Candidate(**result["candidates"][0])
    assert (candidate.name, candidate.output_tokens, candidate.tokens_assumed) == ("tiny", 5, False)
    assert candidate.speed_up == pytest.approx(candidate.llm_ms_per_output / candidate.ms_per_output)
    assert candidate.training_bytes > candidate.inference_bytes > 4 * candidate.slm_parameters
    assert min(candidate.encode_hours, candidate.distill_hours, candidate.train_hours) > 0
    assert result["recommendation"]
    assert steps[-1] == "measuring tiny"
    assert json.loads(json.dumps(result)) == result


def test_tokens_of_the_llm_are_assumed_without_the_tokenizer_of_the_slm(llm: str, tmp_path: Path) -> None:
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    (tmp_path / "prompts.txt").write_text(PROMPTS[0] + "\n")
    result = plan(llm, tmp_path / "prompts.txt", PlanSettings(batch_size=1, max_new_tokens=4), presets=["tiny"])
    assert result["candidates"][0]["tokens_assumed"]
    assert result["candidates"][0]["output_tokens"] == result["output_tokens"]
    assert result["output_tokens"] <= 4
    with pytest.raises(ValueError, match="no preset 'huge'"):
        plan(llm, tmp_path / "prompts.txt", PlanSettings(max_new_tokens=4), presets=["huge"])


def test_timed_outputs_are_at_most_max_new_tokens_long(
    llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SLM's tokenizer may need more tokens than the LLM's."""
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    (tmp_path / "prompts.txt").write_text("src5 src6\n")
    slm_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("modeling_llm2slm.workflows.plan._count", lambda *_: 1000)
    settings, tokenizers = PlanSettings(max_new_tokens=4, batch_size=1), {"tiny": str(tmp_path / "tokenizer")}
    result = plan(llm, tmp_path / "prompts.txt", settings, presets=["tiny"], slm_tokenizers=tokenizers)
    assert result["candidates"][0]["output_tokens"] == 4


def test_prompts_beyond_the_max_positions_are_counted_but_not_timed(llm: str, tmp_path: Path) -> None:
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    long = " ".join(PROMPTS * 40)
    data, settings = tmp_path / "p.jsonl", PlanSettings(batch_size=1, max_new_tokens=4)
    write_pairs(data, [{"prompt": long}, {"prompt": PROMPTS[0]}, {"prompt": 7}])
    with pytest.raises(ValueError, match="prompt of row 2 is 7.*skip_bad_rows"):
        plan(llm, data, settings, presets=["tiny"])
    settings = replace(settings, skip_bad_rows=True)
    result = plan(llm, data, replace(settings, timed_prompts=2), presets=["tiny"])
    assert (result["prompts"], result["candidates"][0]["too_long"]) == (2, 1)
    truncated = plan(llm, data, replace(settings, prompt_max_length=9), presets=["tiny"])
    assert truncated["candidates"][0]["too_long"] == 0
    (tmp_path / "long.txt").write_text(long + "\n")
    with pytest.raises(ValueError, match="no prompt fits the max positions of tiny.*prompt_max_length"):
        plan(llm, tmp_path / "long.txt", settings, presets=["tiny"])


def test_unsuitable_llms_and_tokenizers_are_refused(llm: str, tmp_path: Path) -> None:
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    data = write_pairs(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match="is an LLM-to-SLM model"):
        plan(write_checkpoint("llm2slm", tmp_path / "composite"), data, presets=["tiny"])
    with pytest.raises(ValueError, match="tiny is no SLM for a gpt2: a decoder-only LLM is cut"):
        plan(write_checkpoint("slm", tmp_path / "slm"), data, presets=["tiny"])
    with pytest.raises(ValueError, match="cut:1 is no SLM for a t5"):
        plan(llm, data, presets=["cut:1"])
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert is encoder-only"):
        plan(tmp_path / "bert", data)
    with pytest.raises(ValueError, match="tyni has a tokenizer, but it is not one of the presets tiny"):
        plan(llm, data, presets=["tiny"], slm_tokenizers={"tyni": "x"})
    with pytest.raises(OSError, match="no/such/folder cannot be loaded"):
        plan(llm, data, presets=["tiny"], slm_tokenizers={"tiny": "no/such/folder"})


def test_a_decoder_only_llm_is_cut(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "p.jsonl")
    llm, settings = write_checkpoint("slm", tmp_path / "llm"), PlanSettings(timed_prompts=2, max_new_tokens=4)
    by_default = plan(llm, data, settings)
    assert [candidate["name"] for candidate in by_default["candidates"]] == ["cut:1"]  # of its two layers
    first, both = plan(llm, data, settings, presets=["cut:1", "cut:0,1"])["candidates"]
    assert not first["tokens_assumed"]
    assert first["slm_parameters"] < both["slm_parameters"]
    tokens = sum({row["prompt"]: len(row["prompt"].split()) for row in PAIRS}.values())
    config = AutoConfig.from_pretrained(llm)
    assert by_default["store_bytes"] >= tokens * 2 * config.n_embd * 2  # keys and values of one layer in bfloat16


def test_every_slm_is_timed_on_prompts_that_fit_it(llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    long = [" ".join([*PROMPTS * 20, f"src{row}"]) for row in range(3)]
    data = write_pairs(tmp_path / "p.jsonl", [{"prompt": text} for text in (*long, PROMPTS[0])])
    config = LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config(n_positions=2048))
    config.to_json_file(tmp_path / "wide.json")
    wide, timed = str(tmp_path / "wide.json"), []
    measure = planning._measure

    def measuring(*args: Any) -> dict[str, Any]:
        timed.append(args[2].prompts)
        return measure(*args)

    monkeypatch.setattr(planning, "_measure", measuring)
    result = plan(llm, data, PlanSettings(timed_prompts=4, batch_size=1, max_new_tokens=4), presets=["tiny", wide])
    tiny, other = (Candidate(**candidate) for candidate in result["candidates"])
    assert (tiny.too_long, other.too_long) == (3, 0)
    assert timed == [[PROMPTS[0]], [*long, PROMPTS[0]]]
    assert result["recommended"] != "tiny"


def test_llm_is_timed_greedily_and_within_its_max_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("modeling_llm2slm.configuration", reason="presets are found in an installed package only")
    bart = write_bart(tmp_path / "bart", num_beams=3)
    data = write_pairs(tmp_path / "p.jsonl", [{"prompt": " ".join(PROMPTS * 4)}, *PAIRS[:2]])
    asked: list[dict[str, Any]] = []
    generate_tokens = TextToText.generate_tokens

    def asking(self: TextToText, prompts: list[str], *args: Any, **kwargs: Any) -> list[list[int]]:
        asked.append(kwargs)
        return generate_tokens(self, prompts, *args, **kwargs)

    monkeypatch.setattr(TextToText, "generate_tokens", asking)
    settings = PlanSettings(timed_prompts=2, batch_size=1, max_new_tokens=4, num_beams=5)
    result = plan(bart, data, settings, presets=["tiny"])
    assert result["candidates"][0]["too_long"] == 1
    assert len(asked) >= 4
    assert {options["num_beams"] for options in asked} <= {1, 5}
    assert sum(options["num_beams"] == 1 for options in asked) >= 4


def test_training_step_is_estimated_from_a_smaller_batch_where_memory_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=t5_config(), decoder=gpt2_config()))
    monkeypatch.setattr(planning, "seconds_of", lambda work: work() or 1.0)
    batches: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(len(kwargs["labels"])), with_kwargs=True)
    sizes = {"prompt_length": 5, "output_length": 4}
    assert planning._step_seconds(model, 8, **sizes) == (1, 8)
    assert batches == [8, 8]
    four = planning._training_bytes(model, 4, sizes)
    monkeypatch.setattr(planning, "_free_bytes", lambda device: four)
    assert planning._step_seconds(model, 8, **sizes) == (2, 4)
    assert batches[2:] == [4, 4]
    monkeypatch.setattr(planning, "_free_bytes", lambda device: 0)
    assert planning._step_seconds(model, 8, **sizes) == (8, 1)


def test_slm_with_too_few_positions_is_not_recommended() -> None:
    row = Candidate("narrow", 100, 1.0, 1.0, 4.0, 1, False, 1, 1, 1.0, 1.0, 1.0, 6)
    other = replace(row, name="wide", speed_up=2.5, slm_parameters=10, too_long=5)
    assert recommend([row, other], 100)[0] == "wide"
    name, sentence = recommend([row, replace(other, too_long=50)], 100)
    assert name == "narrow"
    assert "But 6% of the prompts or more are too long: truncate them with prompt_max_length" in sentence


@pytest.mark.parametrize(
    ("speed_ups", "recommended", "words"),
    [
        ((2.5, 4.0), "large", "largest SLM that is at least 2 times as fast"),
        ((1.5, 3.0), "small", "largest SLM that is at least 2 times as fast"),
        ((1.1, 1.4), "small", "is the fastest"),
        ((0.7, 1.1), None, "Do not train"),
    ],
)
def test_recommendation_is_the_largest_slm_that_is_fast_enough(
    speed_ups: tuple[float, float], recommended: str | None, words: str
) -> None:
    row = Candidate("large", 100, 1.0, 1.0, speed_ups[0], 1, False, 1, 1, 1.0, 1.0, 1.0, 0)
    name, sentence = recommend([row, replace(row, name="small", slm_parameters=10, speed_up=speed_ups[1])], 100)
    assert name == recommended
    assert words in sentence
    assert set(planning.SLMS) == {"t5-large_gpt2", "t5-large_t5-small"}


def test_plan_within_a_limit_scales_its_batch_and_says_what_it_used(
    llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_quickly(monkeypatch, limited)
    data, steps = write_pairs(tmp_path / "p.jsonl"), []
    settings = PlanSettings(batch_size=2**20, max_new_tokens=4, timed_prompts=1, memory=0.3)
    result = plan_within_limit(llm, data, settings, presets=["tiny"], progress=steps.append)
    assert steps[-1] == "measuring tiny"
    assert 1 <= result["candidates"][0]["timed_batch_size"] < 2**20
    assert (result["memory_limit"], result["memory_used"] < 4e8) == (300_000_000, True)
    with pytest.raises(OSError, match=r"needs more than 20\.0 MB of memory"):
        plan_within_limit(llm, data, replace(settings, memory=0.02), presets=["tiny"])
    with pytest.raises(OSError, match="no/such/folder cannot be loaded"):
        plan_within_limit("no/such/folder", data, settings, presets=["tiny"])


def test_batches_are_halved_until_they_fit() -> None:
    def work(batch: int) -> float:
        if batch > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return 1.0

    assert planning._with_fitting_batch(work, 16) == (1.0, 2)
    with pytest.raises(RuntimeError, match="other"):
        planning._with_fitting_batch(lambda batch: (_ for _ in ()).throw(RuntimeError("other")), 16)
