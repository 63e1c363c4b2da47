"""
Draft the LLM's own output with an LLM-to-SLM model: how many drafts the LLM accepts, and how much time that saves.

    python -m benchmarks.assisted --data /path/to/data --runs runs/multi30k/en-de --demo runs/demo

For Multi30k, the models are the rows `llm` and `t5-add-distilled` of `benchmarks/multi30k.py`; for the demo, its LLM
and the model of `make demo` in `runs/demo`. The length of a draft is chosen by time on validation prompts; reported
figures come from the test split. Then the sizes of T5-large with T5-small are measured with random weights: drafts are
accepted exactly as on Multi30k, round by round, and both models do all their work. One thread, in turns.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, T5Config, T5EncoderModel

from examples.demo import DATA as DEMO_DATA
from examples.demo import LLM as DEMO_LLM
from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.data.records import versions, write_json
from modeling_llm2slm.settings import DataSettings


ROOT = Path(__file__).parents[1]
DRAFTED = (2, 3, 4, 6)  # tokens in a draft
CONFIDENCE = (0.0, 0.4)  # a draft ends with a token less likely than this; 0 disables it
VALIDATION_PROMPTS, TEST_PROMPTS, SIZED_REPEATS = 50, 200, 5
TOKENS = 64


class Rounds:
    """Records, for each step of the LLM, how many tokens were drafted and how many it accepted."""

    def __init__(self, assistant: LLM2SLMForConditionalGeneration):
        self.found: list[tuple[int, int]] = []
        self.assistant = assistant

    @contextmanager
    def count(self) -> Iterator[None]:
        """Record each draft of the assistant, and how much of it was accepted."""
        own, drafts = self.assistant.generate, []

        def generate(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            drafts.append((kwargs["decoder_input_ids"].shape[1], output.sequences.shape[1]))
            return output

        object.__setattr__(self.assistant, "generate", generate)
        try:
            yield
        finally:
            object.__delattr__(self.assistant, "generate")
        starts = [start for start, _ in drafts]
        for (start, end), following in zip(drafts, starts[1:], strict=False):  # no step follows the last draft
            self.found.append((end - start, following - start - 1))


def generate(llm: PreTrainedModel, batch: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    return llm.generate(**batch, max_new_tokens=TOKENS, do_sample=False, **kwargs)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    llm: PreTrainedModel, assistant: Any, batches: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Run the LLM alone and assisted, in turns; return times, acceptance and tokens per step, and each draft."""
    rounds, steps, tokens, alone, assisted = Rounds(assistant), 0, 0, 0.0, 0.0
    for batch in batches:
        wanted = generate(llm, batch)
        calls: list[int] = []
        handle = llm.get_decoder().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with rounds.count():
            assert torch.equal(generate(llm, batch, assistant_model=assistant), wanted), "not the LLM's own output"
        handle.remove()
        steps, tokens = steps + len(calls), tokens + wanted.shape[1] - 1
        alone += seconds(lambda batch=batch: generate(llm, batch))  # type: ignore[misc]
        assisted += seconds(lambda batch=batch: generate(llm, batch, assistant_model=assistant))  # type: ignore[misc]
    summary = {
        "prompts": len(batches),
        "acceptance": sum(accepted for _, accepted in rounds.found) / sum(size for size, _ in rounds.found),
        "tokens_per_step_of_the_llm": tokens / steps,
        "ms_per_output_alone": 1000 * alone / len(batches),
        "ms_per_output_assisted": 1000 * assisted / len(batches),
        "speed_up": alone / assisted,
    }
    return summary, rounds.found


def measure(llm: PreTrainedModel, assistant: Any, batches: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Choose the drafts by the time of validation prompts, and report on test prompts."""
    tried = {}
    for drafted, confidence in itertools.product(DRAFTED, CONFIDENCE):
        draft_like(assistant, drafted, confidence)
        tried[drafted, confidence] = compare(llm, assistant, batches["validation"])[0]["speed_up"]
    best = max(tried, key=lambda key: tried[key])
    draft_like(assistant, *best)
    return {
        "validation_speed_up": {f"{drafted} tokens, confidence {c}": value for (drafted, c), value in tried.items()},
        "num_assistant_tokens": best[0],
        "assistant_confidence_threshold": best[1],
        "test": compare(llm, assistant, batches["test"])[0],
    }


def rounds_of(llm: PreTrainedModel, assistant: Any, batches: list[dict[str, Any]], drafted: int) -> list[int]:
    """Return how many tokens of each draft of a fixed length the LLM accepts."""
    draft_like(assistant, drafted, 0.0)
    return [accepted for size, accepted in compare(llm, assistant, batches)[1] if size == drafted]


def batches_of(tokenizer: Any, **prompts: list[str]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [dict(tokenizer(prompt, return_tensors="pt")) for prompt in texts] for name, texts in prompts.items()
    }


def draft_like(assistant: Any, drafted: int, confidence: float) -> None:
    assistant.generation_config.num_assistant_tokens = drafted
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = confidence


def sized_models() -> tuple[PreTrainedModel, Any, dict[str, torch.Tensor]]:
    """Return a T5-large and its assistant of T5-small size with random weights, and a prompt."""
    torch.manual_seed(0)
    config = LLM2SLMConfig.from_pretrained(ROOT / "configuration" / "t5-large_t5-small.json", shared_tokenizer=True)
    llm = AutoModelForSeq2SeqLM.from_config(T5Config(**config.encoder.to_dict() | {"is_encoder_decoder": True})).eval()
    reader = T5EncoderModel(copy.deepcopy(llm.config))
    reader.encoder, reader.shared = llm.encoder, llm.shared
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=reader.eval(),
        decoder_model=AutoModelForSeq2SeqLM.from_config(config.decoder).eval(),
        shared_tokenizer=True,
    )
    ids = torch.randint(3, 32000, (1, 64))
    return llm, model.as_assistant_of(llm), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def at_real_sizes(models: Any, accepted: list[int], drafted: int, repeats: int) -> dict[str, Any]:
    """Time the LLM alone and assisted, with as many accepted tokens per draft as `accepted` lists."""
    llm, assistant, batch = models
    draft_like(assistant, drafted, 0.0)
    fixed = {"min_new_tokens": TOKENS}
    wanted = generate(llm, batch, **fixed)
    times: dict[str, list[float]] = {"alone": [], "assisted": []}
    with accept_as(assistant, wanted, accepted):
        assert torch.equal(generate(llm, batch, assistant_model=assistant, **fixed), wanted)
        for _ in range(repeats):
            times["alone"].append(seconds(lambda: generate(llm, batch, **fixed)))
            times["assisted"].append(seconds(lambda: generate(llm, batch, assistant_model=assistant, **fixed)))
    ratios = [a / b for a, b in zip(times["alone"], times["assisted"], strict=True)]
    return {
        "drafted": drafted,
        "acceptance": sum(accepted) / (drafted * len(accepted)),
        "seconds_alone": statistics.median(times["alone"]),
        "seconds_assisted": statistics.median(times["assisted"]),
        "speed_up": statistics.median(ratios),
        "speed_ups": ratios,
    }


def profile(models: Any, repeats: int = 9) -> dict[str, Any]:
    """Time the parts of a round: an LLM step over 1 to 6 tokens, an SLM step, a draft by `generate()`."""
    llm, assistant, batch = models
    encoder_outputs = llm.get_encoder()(**batch)
    start = torch.zeros(1, 8, dtype=torch.long)

    def step(model: Any, states: Any, width: int) -> float:
        times = []
        for _ in range(repeats):
            cache = model(encoder_outputs=states, decoder_input_ids=start, use_cache=True).past_key_values
            ids = start[:, :1].expand(1, width)
            kwargs = {"encoder_outputs": states, "decoder_input_ids": ids, "past_key_values": cache}
            times.append(1000 * seconds(partial(model, **kwargs)))
        return statistics.median(times)

    prompt = assistant.encode_prompt(**batch)
    draft_like(assistant, 3, 0.0)
    draft = lambda: assistant.generate(encoder_outputs=prompt, max_new_tokens=3, min_new_tokens=3)  # noqa: E731
    with torch.no_grad():
        return {
            "ms of a step of the LLM, by tokens": {
                width: step(llm, encoder_outputs, width) for width in (1, 2, 3, 4, 6)
            },
            "ms of a step of the SLM": step(assistant, prompt, 1),
            "ms of a draft of 3 tokens": statistics.median([1000 * seconds(draft) for _ in range(repeats)]),
        }


@contextmanager
def accept_as(assistant: Any, wanted: torch.Tensor, accepted: list[int]) -> Iterator[None]:
    """Make the assistant choose the LLM's own next tokens, and a wrong one after as many as each round accepted."""
    own, state, counts = assistant.generate, {"start": 0, "accepted": 0}, itertools.cycle(accepted)

    def generate(*args: Any, **kwargs: Any) -> Any:
        state.update(start=kwargs["decoder_input_ids"].shape[1], accepted=next(counts))
        return own(*args, **kwargs)

    def favour(module: Any, args: Any, outputs: Any) -> Any:
        place = int(outputs.past_key_values.get_seq_length())  # position of the next token
        token = wanted[0, place] if place < wanted.shape[1] else wanted[0, -1]
        right = place - state["start"] < state["accepted"]
        outputs.logits[:, -1, token if right else (token + 1) % outputs.logits.shape[-1]] += 1e4
        return outputs

    object.__setattr__(assistant, "generate", generate)
    handle = assistant.decoder.register_forward_hook(favour)
    try:
        yield
    finally:
        handle.remove()
        object.__delattr__(assistant, "generate")


def multi30k(data: Path, runs: Path) -> tuple[PreTrainedModel, Any, dict[str, list[dict[str, Any]]]]:
    llm = AutoModelForSeq2SeqLM.from_pretrained(runs / "llm" / "model").eval()
    model = LLM2SLMForConditionalGeneration.from_pretrained(runs / "t5-add-distilled" / "model").eval()
    folder = data / "multi30k" / "en-de"
    first = {count: DataSettings(prompt_column="source", limit=count) for count in (VALIDATION_PROMPTS, TEST_PROMPTS)}
    validation = load_examples(folder / "val.jsonl.gz", first[VALIDATION_PROMPTS])["prompt"][:]
    test = load_examples(folder / "test_2016_flickr.jsonl.gz", first[TEST_PROMPTS])["prompt"][:]
    tokenizer = AutoTokenizer.from_pretrained(runs / "llm" / "model")
    return llm, model.as_assistant_of(llm), batches_of(tokenizer, validation=validation, test=test)


def demonstration(folder: Path) -> tuple[PreTrainedModel, Any, dict[str, list[dict[str, Any]]]]:
    llm = AutoModelForSeq2SeqLM.from_pretrained(DEMO_LLM, dtype=torch.float32).eval()
    model = LLM2SLMForConditionalGeneration.from_pretrained(folder / "llm2slm").eval()
    validation = load_examples(DEMO_DATA["validation"], DataSettings(limit=VALIDATION_PROMPTS))["prompt"][:]
    test = load_examples(DEMO_DATA["test"], DataSettings(limit=TEST_PROMPTS))["prompt"][:]
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LLM)
    batches = batches_of(tokenizer, validation=validation, test=test)
    return llm, model.as_assistant_of(llm), batches


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LLM2SLM_DATA", "data")))
    parser.add_argument("--runs", type=Path, default=Path("runs/multi30k/en-de"))
    parser.add_argument("--demo", type=Path, help="folder of the demo; default: do not measure it")
    parser.add_argument("--profile", action="store_true", help="time only the parts of a round")
    parser.add_argument("--bfloat16", action="store_true", help="measure only the large sizes, in bfloat16")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "assisted.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output, result = arguments.output, {"threads": 1, "versions": versions()}
    if arguments.profile:
        output = output.with_name("assisted-profile.json")
        result = profiles() | result
    elif arguments.bfloat16:
        output = output.with_name("assisted-bfloat16.json")
        result = in_bfloat16(*multi30k(arguments.data, arguments.runs)) | result
    else:
        result = everything(arguments.demo, *multi30k(arguments.data, arguments.runs)) | result
    write_json(output, result)
    print(json.dumps(result, indent=2))


def profiles() -> dict[str, Any]:
    """Return the profile in each dtype."""
    llm, assistant, batch = sized_models()
    return {
        str(dtype).removeprefix("torch."): profile((llm.to(dtype), assistant.to(dtype), batch))
        for dtype in (torch.float32, torch.bfloat16)
    }


def in_bfloat16(llm: PreTrainedModel, assistant: Any, batches: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the times of the real sizes in bfloat16, with drafts of three tokens, accepted as on test prompts."""
    accepted = rounds_of(llm, assistant, batches["test"][:VALIDATION_PROMPTS], 3)
    llm, assistant, batch = sized_models()
    return at_real_sizes((llm.to(torch.bfloat16), assistant.to(torch.bfloat16), batch), accepted, 3, repeats=3)


def everything(
    demo: Path | None, llm: PreTrainedModel, assistant: Any, batches: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return the results of the trained models, and of the real sizes in float32."""
    result: dict[str, Any] = {"Multi30k": measure(llm, assistant, batches)}
    # Real sizes have other costs, so the length of a draft is chosen again on the validation split.
    models = sized_models()
    chosen = {
        drafted: at_real_sizes(models, rounds_of(llm, assistant, batches["validation"], drafted), drafted, repeats=1)
        for drafted in DRAFTED
    }
    best = max(chosen, key=lambda drafted: chosen[drafted]["speed_up"])
    result["T5-large with T5-small"] = {
        "validation": list(chosen.values()),
        "test": at_real_sizes(models, rounds_of(llm, assistant, batches["test"], best), best, SIZED_REPEATS),
    }
    if demo:
        result["demonstration"] = measure(*demonstration(demo))
    return result


if __name__ == "__main__":
    main()
