"""What LLM-to-SLM would bring and cost, measured on this machine before anything is trained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from ..configuration_llm2slm import LLM2SLMConfig, llm_sizes
from ..conversion.build import preset_config
from ..data.loading import load_prompts
from ..inference.loading import load
from ..inference.parts import count_parameters, decoding_modules
from ..inference.text_to_text import TextToText
from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from ..parts_llm2slm import slm_class
from ..training.memory import generation_memory, training_memory


# The presets with different SLMs, each with the checkpoint its SLM is trained from, whose tokenizer counts tokens.
SLMS = {"t5-large_gpt2": "openai-community/gpt2", "t5-large_t5-small": "google-t5/t5-small"}
ENOUGH = 2.0  # a speed-up that is worth training for, whatever the size of the SLM
LITTLE = 1.2


@dataclass
class Candidate:
    """
    What is expected of the LLM with one SLM.

    Args:
        name: The preset.
        slm_parameters: Parameters that every answer token goes through.
        ms_per_output: Time per answer with random SLM weights and as many tokens as the LLM's answer has for the SLM.
        llm_ms_per_output: Time per answer of the LLM, in turns with the above.
        speed_up: The second by the first.
        output_tokens: Tokens of an answer for the SLM.
        tokens_assumed: The SLM's tokenizer could not be loaded, so that the LLM's count stands for it.
        inference_bytes: Weights and cache at batch 1.
        training_bytes: Memory of training on stored states.
        encode_hours: For all prompts, once.
        distill_hours: For all prompts, once, with the LLM's answers searched for as asked.
        train_hours: For all epochs, on stored states.
        too_long: The number of prompts that the SLM has no positions for, the longest answer included.
    """

    name: str
    slm_parameters: int
    ms_per_output: float
    llm_ms_per_output: float
    speed_up: float
    output_tokens: float
    tokens_assumed: bool
    inference_bytes: int
    training_bytes: int
    encode_hours: float
    distill_hours: float
    train_hours: float
    too_long: int


def plan(
    llm: str | Path,
    data: str | Path,
    prompt_column: str = "prompt",
    *,
    presets: Sequence[str] = tuple(SLMS),
    slm_tokenizers: Mapping[str, str] | None = None,
    timed_prompts: int = 4,
    epochs: float = 5,
    batch_size: int = 32,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    prompt_max_length: int | None = None,
    skip_bad_rows: bool = False,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """
    Measures what LLM-to-SLM would bring for an LLM and some prompts: nothing is trained, the SLMs have random weights.

    Args:
        llm: The LLM with its decoder, a folder or a name on the Hub.
        data: Prompts, see [`load_prompts`].
        prompt_column: The column that holds what the model reads.
        presets: Names of presets (or config files) whose SLMs are tried.
        slm_tokenizers: A tokenizer for a preset, in place of the one on the Hub.
        timed_prompts: The number of prompts that are answered for an SLM, spread over those that it has positions for.
        epochs: How long training is to be, for the estimate.
        batch_size: Pairs in a batch of training, for the estimate.
        num_beams: Of the distillation, for the estimate.
        max_new_tokens: The longest answer.
        prompt_max_length: Prompts are cut to this many tokens (default: never).
        skip_bad_rows: See [`load_examples`].
        device: Where to compute.
        progress: Called with a few words at every step.

    Returns:
        `prompts`, `prompt_tokens` (mean), `output_tokens` (the LLM's, mean), `store_bytes`, `candidates` (a list of
        [`Candidate`] as mappings), `recommended` (a name or None) and `recommendation`, a sentence.

    Raises:
        ValueError: If the LLM is no encoder-decoder, an SLM has no positions for any prompt, or a tokenizer is for a
            preset that is not tried.
        OSError: If the LLM or a tokenizer that is named cannot be loaded.
    """
    set_seed(0)
    given = dict(slm_tokenizers or {})
    for preset in given:
        if preset not in presets:
            raise ValueError(f"There is a tokenizer for {preset}, which is none of the presets {', '.join(presets)}.")
    tokenizers = {preset: _tokenizer(given.get(preset), SLMS.get(preset)) for preset in presets}
    configs = {preset: preset_config(preset) for preset in presets}
    _check_llm(llm)
    prompts = load_prompts(data, prompt_column, skip_bad_rows=skip_bad_rows)["prompt"][:]
    progress("loading the LLM")
    large = TextToText.from_pretrained(llm, device=device, prompt_max_length=prompt_max_length)
    lengths = [len(ids) for ids in large.features(prompts)["input_ids"]]
    usable = {
        preset: [
            row
            for row, length in enumerate(lengths)
            if config.fits(length, max_new_tokens) and not large.position_problem(length, max_new_tokens)
        ]
        for preset, config in configs.items()
    }
    for preset, rows in usable.items():
        if not rows:
            raise ValueError(
                f"{data}: {preset} has positions for none of the prompts with answers of {max_new_tokens} tokens. Cut "
                "the prompts with prompt_max_length, allow shorter answers with max_new_tokens, or try other presets."
            )
    samples: dict[tuple[int, ...], _Sample] = {}
    candidates = []
    for preset in presets:
        rows, tokenizer = usable[preset], tokenizers[preset]
        chosen = tuple(rows[:: max(len(rows) // timed_prompts, 1)][:timed_prompts])
        if chosen not in samples:
            progress("answering with the LLM")
            samples[chosen] = _Sample(large, [prompts[row] for row in chosen], max_new_tokens, num_beams)
        sample = samples[chosen]
        progress(f"measuring {preset}")
        counts = [
            min(len(ids) if tokenizer is None else _count(tokenizer, answer), max_new_tokens)
            for ids, answer in zip(sample.tokens, sample.answers, strict=True)
        ]
        usual_length, hours = statistics.mean(lengths[row] for row in rows), len(set(prompts)) / len(chosen) / 3600
        costs = _measure(llm, configs[preset], sample, counts, usual_length, batch_size, device)
        seconds = costs.pop("step_seconds")
        encode_seconds = costs.pop("encode_seconds")
        candidates.append(
            Candidate(
                name=preset,
                output_tokens=statistics.mean(counts),
                tokens_assumed=tokenizer is None,
                encode_hours=hours * encode_seconds,
                distill_hours=hours * sample.beam_seconds,
                train_hours=epochs * len(prompts) / batch_size * seconds / 3600,
                too_long=len(prompts) - len(rows),
                **costs,
            )
        )
    recommended, recommendation = recommend(candidates, len(prompts))
    widest = max(samples, key=lambda chosen: max(lengths[row] for row in chosen))
    stored = sum(dict(zip(prompts, lengths, strict=True)).values())  # equal prompts once
    return {
        "prompts": len(prompts),
        "prompt_tokens": statistics.mean(lengths),
        "output_tokens": statistics.mean(map(len, samples[widest].tokens)),
        "store_bytes": stored * llm_sizes(large.model.config).hidden_size * 2,
        "candidates": [asdict(candidate) for candidate in candidates],
        "recommended": recommended,
        "recommendation": recommendation,
        "epochs": epochs,
        "batch_size": batch_size,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def recommend(candidates: Sequence[Candidate], prompts: int) -> tuple[str | None, str]:
    """
    The name of an SLM or `None`, and a sentence that says why. SLMs without positions for more than a twentieth of
    the prompts are left out, unless there are no others.
    """
    roomy = [candidate for candidate in candidates if candidate.too_long <= prompts / 20]
    name, sentence = _fast_enough(roomy or candidates)
    if not roomy:
        share = min(candidate.too_long for candidate in candidates) / prompts
        sentence += f" But {share:.0%} of the prompts or more are too long: cut them with prompt_max_length."
    return name, sentence


def _fast_enough(candidates: Sequence[Candidate]) -> tuple[str | None, str]:
    """The largest SLM that is fast enough, as a larger one writes better; else the fastest; else none."""
    fast = [candidate for candidate in candidates if candidate.speed_up >= ENOUGH]
    if fast:
        best = max(fast, key=lambda candidate: candidate.slm_parameters)
        return best.name, (
            f"Take {best.name}: {best.speed_up:.1f} times as fast as the LLM, with the largest SLM that is at least "
            f"{ENOUGH:g} times as fast."
        )
    best = max(candidates, key=lambda candidate: candidate.speed_up)
    if best.speed_up >= LITTLE:
        return best.name, (
            f"{best.name} is the fastest, {best.speed_up:.1f} times as fast as the LLM; a smaller SLM brings more."
        )
    return None, (
        f"Do not train: {best.name}, the fastest, is {best.speed_up:.1f} times as fast as the LLM. A smaller SLM, or "
        "one with the LLM's tokenizer, may bring more."
    )


class _Sample:
    """Some prompts, the LLM's greedy answers, and the seconds that it searches for all of them with beams."""

    def __init__(self, large: TextToText, prompts: list[str], max_new_tokens: int, num_beams: int):
        self.large = large
        self.prompts = prompts
        # A checkpoint may say how it is decoded, as BART's with beams. The SLM is timed greedily, and so is the LLM.
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self.tokens = [self.answer(index) for index in range(len(prompts))]
        self.answers = large.tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
        self.beam_seconds = _seconds(
            lambda: large.generate(prompts, len(prompts), num_beams=num_beams, **self.options)
        )

    def answer(self, index: int) -> list[int]:
        return self.large.generate_tokens([self.prompts[index]], num_beams=1, **self.options)[0]

    def inputs(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.large._pad(self.large.features([self.prompts[index]]))
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _measure(
    llm: str | Path,
    config: LLM2SLMConfig,
    sample: _Sample,
    tokens: Sequence[int],
    prompt_length: float,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Times and memory of one composite."""
    slm = slm_class(config.decoder).from_config(config.decoder)
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        str(llm), decoder_model=slm, encoder_dtype=torch.float32,
        shared_tokenizer=False,
    ).to(device).eval()  # fmt: skip
    model.generation_config.eos_token_id = None  # random weights end nowhere, and an answer has as many tokens as said
    times = []
    for index, count in enumerate(tokens):
        inputs, options = sample.inputs(index), {"max_new_tokens": count, "do_sample": False}
        model.generate(**inputs, **options | {"max_new_tokens": 1})
        times.append(
            (
                _seconds(lambda: sample.answer(index)),  # noqa: B023 - called at once
                _seconds(lambda: model.generate(**inputs, **options)),  # noqa: B023
            )
        )
    large, small = (1000 * statistics.mean(row) for row in zip(*times, strict=True))
    sizes: dict[str, Any] = {"prompt_length": round(prompt_length), "output_length": round(statistics.mean(tokens))}
    encode = _seconds(lambda: [model.encode_llm(**sample.inputs(index)) for index in range(len(tokens))])
    return {
        "slm_parameters": count_parameters(*decoding_modules(model.decoder)),
        "ms_per_output": small,
        "llm_ms_per_output": large,
        "speed_up": large / small,
        "inference_bytes": generation_memory(model.config, batch_size=1, **sizes)["total"],
        "training_bytes": _training_bytes(model, batch_size, sizes),
        "encode_seconds": encode,
        "step_seconds": _step_seconds(model, batch_size, **sizes),
    }


def _training_bytes(model: Any, batch_size: int, sizes: Mapping[str, Any]) -> int:
    return training_memory(model.config, batch_size=batch_size, llm_states=True, **sizes)["total"]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _step_seconds(model: Any, batch_size: int, prompt_length: int, output_length: int) -> float:
    """
    Seconds of one step of training on stored states, the second of two. Where there is no memory for the batch, they
    are estimated from a smaller one.
    """
    asked, sizes = batch_size, {"prompt_length": prompt_length, "output_length": output_length}
    while batch_size > 1 and _training_bytes(model, batch_size, sizes) > _free_bytes(model.device):
        batch_size //= 2
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    shape = (batch_size, prompt_length)
    ids = torch.ones(shape, dtype=torch.long, device=model.device)
    states = torch.randn(*shape, llm_sizes(model.config.encoder).hidden_size, device=model.device)
    labels = torch.ones(batch_size, output_length, dtype=torch.long, device=model.device)

    def step() -> None:
        model(
            input_ids=ids, attention_mask=torch.ones_like(ids), llm_hidden_states=states, labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return _seconds(step) * asked / batch_size


def _seconds(work: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Waits for what an accelerator was told to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _check_llm(llm: str | Path) -> None:
    config = load(AutoConfig, llm)
    if config.model_type == "llm2slm":
        raise ValueError(f"{llm} is an LLM-to-SLM model. Name the LLM that it was built from.")
    if not config.is_encoder_decoder:
        raise ValueError(f"{llm} is decoder-only, and has no encoder whose answers a small model could learn.")


def _tokenizer(given: str | None, default: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is named; else, where it can be reached, the default one."""
    if given is not None:
        return load(AutoTokenizer, given)
    try:
        return load(AutoTokenizer, default) if default is not None else None
    except OSError:  # offline
        return None


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of an answer, its end token included."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1
