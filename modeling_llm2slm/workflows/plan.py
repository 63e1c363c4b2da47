"""Estimate the speed-up and the cost of LLM-to-SLM on this machine, measured before anything is trained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..configuration_llm2slm import LLM2SLMConfig, llm_sizes
from ..conversion.build import preset_config
from ..data.loading import load_prompts
from ..data.resources import free_memory
from ..evaluation.timing import seconds_of, time_in_turns
from ..inference.model import LLM2SLMForConditionalGeneration
from ..inference.parts import count_parameters, decoding_modules
from ..inference.text_to_text import TextToText
from ..parts_llm2slm import slm_class
from ..settings import DataSettings, PlanSettings
from ..states.loading import load
from ..training.memory import TrainingSetup, generation_memory, training_memory
from .limited import is_out_of_memory, run_limited
from .sizes import QUARTER, SLMS, cut_preset, default_slms


WORTHWHILE_SPEED_UP = 2.0  # enough to train for, whatever the size of the SLM
SMALLEST_SPEED_UP = 1.2
SHARE_OF_MEMORY = 0.75  # of what is free: the rest is for other programs


@dataclass
class Candidate:
    """
    The estimate for the LLM with one SLM.

    Args:
        name: The preset.
        slm_parameters: Number of parameters that decode each token.
        ms_per_output: Milliseconds per output, with random SLM weights and as many tokens as the LLM's output has in
            the SLM's tokenizer.
        llm_ms_per_output: Milliseconds per output of the LLM, timed in turns with the above.
        speed_up: `llm_ms_per_output / ms_per_output`.
        output_tokens: Mean tokens per output in the SLM's tokenizer.
        tokens_assumed: Whether the SLM's tokenizer could not be loaded, so that the LLM's count is used.
        inference_bytes: Memory of weights and KV cache at batch size 1.
        training_bytes: Memory of training on stored hidden states.
        encode_hours: Time to encode all prompts, once.
        distill_hours: Time for the LLM to generate targets for all prompts, once.
        train_hours: Time of all epochs, on stored hidden states.
        too_long: Number of prompts that, with the longest output, exceed the max positions of the LLM or the SLM.
        timed_batch_size: Batch size of the training step that was timed: smaller than the one asked for, where memory
            is.
        slm_config: The SLM's config where it follows from the LLM, for `llm2slm build --slm`; `None` for a preset.
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
    timed_batch_size: int | None = None
    slm_config: dict[str, Any] | None = None


def plan(
    llm: str | Path,
    data: str | Path,
    settings: PlanSettings = PlanSettings(),  # noqa: B008 - immutable
    *,
    presets: Sequence[str] | None = None,
    slm_tokenizers: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """
    Measure the speed-up and the cost of LLM-to-SLM for an LLM and some prompts. Nothing is trained: the SLMs have
    random weights.

    Args:
        llm: The LLM, with its decoder if it has one of its own: a folder or a name on the Hub.
        data: Prompts, see [`load_prompts`].
        settings: What is measured, and the training whose cost is estimated.
        presets: Names of presets, or config files, whose SLMs are tried; for a decoder-only LLM, its layers or their
            number, such as `cut:4`. Default: [`default_slms`] of the LLM.
        slm_tokenizers: Tokenizers by preset, which replace those on the Hub.
        progress: Called with a few words at every step.

    Returns:
        `prompts`, `prompt_tokens` (mean), `output_tokens` (the LLM's, mean), `store_bytes` (for the SLM that
        needs most), `candidates` (a list of
        [`Candidate`] as mappings), `recommended` (a name or `None`), `recommendation` (a sentence), `epochs`,
        `batch_size`, `device` and `threads`.

    Raises:
        ValueError: If the LLM writes nothing, an SLM is none for this LLM, no prompt fits an SLM, or a tokenizer is
            named for a preset that is not tried.
        OSError: If the LLM or a named tokenizer cannot be loaded.
    """
    set_seed(0)
    named = dict(slm_tokenizers or {})
    llm_config = _check_llm(llm)
    named_configs = {name: _config_of(llm_config, name) for name in presets or ()}
    configs = default_slms(llm_config) if presets is None else named_configs
    presets = list(configs)
    for preset in named:
        if preset not in presets:
            raise ValueError(f"{preset} has a tokenizer, but it is not one of the presets {', '.join(presets)}.")
    tokenizers = {preset: _tokenizer(named.get(preset), SLMS.get(preset)) for preset in presets}
    reading = DataSettings(prompt_column=settings.prompt_column, skip_bad_rows=settings.skip_bad_rows)
    prompts = load_prompts(data, reading)["prompt"][:]
    progress("loading the LLM")
    large = TextToText.from_pretrained(llm, device=settings.device, prompt_max_length=settings.prompt_max_length)
    for name, config in configs.items():
        if tokenizers[name] is None and (name == QUARTER or config.fusion == "cache"):
            tokenizers[name] = large.tokenizer
    planner = _Planner(str(llm), large, prompts, settings, progress)
    fitting = {preset: planner.fitting_prompts(preset, config, str(data)) for preset, config in configs.items()}
    candidates = [
        planner.candidate(preset, configs[preset], tokenizers[preset], fitting[preset]) for preset in presets
    ]
    slowest = max((row.ms_per_output for row in candidates if row.name == QUARTER), default=math.inf)
    fast_enough = [candidate for candidate in candidates if candidate.ms_per_output <= slowest]
    recommended, recommendation = recommend(fast_enough, len(prompts))
    return {
        **planner.summary(configs.values()),
        "candidates": [asdict(candidate) for candidate in candidates],
        "recommended": recommended,
        "recommendation": recommendation,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "device": settings.device,
        "threads": torch.get_num_threads(),
    }


def plan_within_limit(
    llm: str | Path,
    data: str | Path,
    settings: PlanSettings = PlanSettings(),  # noqa: B008 - immutable
    *,
    progress: Callable[[str], None] = lambda step: None,
    **options: Any,
) -> dict[str, Any]:
    """
    Call [`plan`] in a child process whose memory is limited to `settings.memory`, and which takes smaller batches
    where these do not fit.

    Returns:
        The result of [`plan`], with `memory_limit` and `memory_used` in bytes.

    Raises:
        MemoryLimitError: If even the smallest batch needs more memory. It is an `OSError`.
    """
    _check_llm(llm)  # at once, and not in a process that takes seconds to start
    limit = int(SHARE_OF_MEMORY * free_memory()) if settings.memory is None else int(settings.memory * 1e9)
    function = partial(_plan_here, str(llm), str(data), settings, options)
    result, used = run_limited(function, limit, progress)
    return {**result, "memory_limit": limit, "memory_used": used}


def _plan_here(
    llm: str, data: str, settings: PlanSettings, options: Mapping[str, Any], progress: Callable[[str], None]
) -> dict[str, Any]:
    return plan(llm, data, settings, progress=progress, **options)


class _Planner:
    """An LLM with its prompts: measures one SLM after the other on prompts that fit it."""

    def __init__(
        self,
        llm: str,
        large: TextToText,
        prompts: list[str],
        settings: PlanSettings,
        progress: Callable[[str], None],
    ):
        self.llm = llm
        self.large = large
        self.prompts = prompts
        self.settings = settings
        self.progress = progress
        self.lengths = [len(ids) for ids in large.features(prompts)["input_ids"]]
        self._samples: dict[tuple[int, ...], _Sample] = {}

    def fitting_prompts(self, preset: str, config: LLM2SLMConfig, data: str) -> list[int]:
        """Return the numbers of the prompts that fit an SLM and the LLM, the longest output included."""
        longest = self.settings.max_new_tokens
        fitting = [
            row
            for row, length in enumerate(self.lengths)
            if config.fits(length, longest) and not self.large.position_problem(length, longest)
        ]
        if not fitting:
            raise ValueError(
                f"{data}: no prompt fits the max positions of {preset} with outputs of {longest} tokens. Truncate the "
                "prompts with prompt_max_length, shorten the outputs with max_new_tokens, or try other presets."
            )
        return fitting

    def candidate(
        self, preset: str, config: LLM2SLMConfig, tokenizer: PreTrainedTokenizerBase | None, fitting: Sequence[int]
    ) -> Candidate:
        """Measure one SLM on some of its fitting prompts, and estimate its costs for all prompts."""
        settings, sample = self.settings, self._sample(fitting)
        self.progress(f"measuring {preset}")
        counts = [
            min(len(ids) if tokenizer is None else _count(tokenizer, output), settings.max_new_tokens)
            for ids, output in zip(sample.tokens, sample.outputs, strict=True)
        ]
        usual_length = statistics.mean(self.lengths[row] for row in fitting)
        costs = _measure(self.llm, config, sample, counts, usual_length, settings)
        step_seconds, encode_seconds = costs.pop("step_seconds"), costs.pop("encode_seconds")
        hours = len(set(self.prompts)) / len(sample.prompts) / 3600  # of all prompts, per second of the sample
        return Candidate(
            name=preset,
            output_tokens=statistics.mean(counts),
            tokens_assumed=tokenizer is None,
            encode_hours=hours * encode_seconds,
            distill_hours=hours * sample.beam_seconds,
            train_hours=settings.epochs * len(self.prompts) / settings.batch_size * step_seconds / 3600,
            too_long=len(self.prompts) - len(fitting),
            slm_config=config.decoder.to_diff_dict() if preset == QUARTER else None,
            **costs,
        )

    def _sample(self, fitting: Sequence[int]) -> _Sample:
        """Return a few of the fitting prompts, spread over all of them, with the LLM's outputs."""
        count = self.settings.timed_prompts
        chosen = tuple(fitting[:: max(len(fitting) // count, 1)][:count])
        if chosen not in self._samples:
            self.progress("timing the LLM")
            self._samples[chosen] = _Sample(self.large, [self.prompts[row] for row in chosen], self.settings)
        return self._samples[chosen]

    def summary(self, configs: Collection[LLM2SLMConfig]) -> dict[str, Any]:
        """Return what all SLMs have in common; the outputs are those of the sample with the longest prompt."""
        widest = max(self._samples, key=lambda chosen: max(self.lengths[row] for row in chosen))
        keys_and_values = [config.llm_hidden_size for config in configs if config.fusion == "cache"]
        stored = sum(dict(zip(self.prompts, self.lengths, strict=True)).values())  # equal prompts are stored once
        return {
            "prompts": len(self.prompts),
            "prompt_tokens": statistics.mean(self.lengths),
            "output_tokens": statistics.mean(map(len, self._samples[widest].tokens)),
            "store_bytes": stored * max(keys_and_values, default=llm_sizes(self.large.model.config).hidden_size) * 2,
        }


def recommend(candidates: Sequence[Candidate], prompts: int) -> tuple[str | None, str]:
    """
    Return the name of an SLM, or `None`, and a sentence with the reason. SLMs that over 5 % of the prompts do not fit
    are left out, unless this leaves out all of them.
    """
    fitting = [candidate for candidate in candidates if candidate.too_long <= prompts / 20]
    name, sentence = _fast_enough(fitting or candidates)
    if not fitting:
        share = min(candidate.too_long for candidate in candidates) / prompts
        sentence += f" But {share:.0%} of the prompts or more are too long: truncate them with prompt_max_length."
    return name, sentence


def _fast_enough(candidates: Sequence[Candidate]) -> tuple[str | None, str]:
    """Return the largest SLM that is fast enough, since a larger one writes better; else the fastest; else none."""
    fast = [candidate for candidate in candidates if candidate.speed_up >= WORTHWHILE_SPEED_UP]
    if fast:
        best = max(fast, key=lambda candidate: candidate.slm_parameters)
        return best.name, (
            f"Take {best.name}: {best.speed_up:.1f} times as fast as the LLM, with the largest SLM that is at least "
            f"{WORTHWHILE_SPEED_UP:g} times as fast."
        )
    best = max(candidates, key=lambda candidate: candidate.speed_up)
    if best.speed_up >= SMALLEST_SPEED_UP:
        return best.name, (
            f"{best.name} is the fastest, {best.speed_up:.1f} times as fast as the LLM; a smaller SLM may be faster."
        )
    return None, (
        f"Do not train: {best.name}, the fastest, is {best.speed_up:.1f} times as fast as the LLM. A smaller SLM, or "
        "one with the LLM's tokenizer, may be faster."
    )


class _Sample:
    """Some prompts with the LLM's greedy outputs, and the seconds that its beam search takes for all of them."""

    def __init__(self, large: TextToText, prompts: list[str], settings: PlanSettings):
        self.large = large
        self.prompts = prompts
        # A checkpoint may ask for beams, as BART's do. The SLM is timed with greedy decoding, and so is the LLM.
        self.options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "do_sample": False}
        self.tokens = [self.generate(index) for index in range(len(prompts))]
        self.outputs = large.tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
        self.beam_seconds, _ = _with_fitting_batch(
            lambda batch: seconds_of(
                lambda: large.generate(prompts, batch, num_beams=settings.num_beams, **self.options)
            ),
            len(prompts),
        )

    def generate(self, index: int) -> list[int]:
        return self.large.generate_tokens([self.prompts[index]], num_beams=1, **self.options)[0]

    def inputs(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.large.pad(self.large.features([self.prompts[index]]))
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _measure(
    llm: str,
    config: LLM2SLMConfig,
    sample: _Sample,
    tokens: Sequence[int],
    prompt_length: float,
    settings: PlanSettings,
) -> dict[str, Any]:
    """Return times and memory of the LLM with one SLM, whose outputs have as many `tokens` as given."""
    slm = slm_class(config.decoder).from_config(config.decoder)
    is_cut = config.fusion == "cache"
    options: dict[str, Any] = {"fusion": "cache"} if is_cut else {}
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        llm, decoder_model=slm, encoder_dtype=torch.float32, shared_tokenizer=is_cut, **options
    )
    model = model.to(settings.device).eval()
    model.generation_config.eos_token_id = None  # random weights end nowhere: each output has the tokens it is given
    large, small = _milliseconds_per_output(model, sample, tokens)
    sizes: dict[str, Any] = {"prompt_length": round(prompt_length), "output_length": round(statistics.mean(tokens))}
    batch_size = settings.batch_size
    step_seconds, timed_batch_size = _step_seconds(model, batch_size, **sizes)
    return {
        "slm_parameters": count_parameters(*decoding_modules(model.decoder)),
        "ms_per_output": small,
        "llm_ms_per_output": large,
        "speed_up": large / small,
        "inference_bytes": generation_memory(model.config, batch_size=1, **sizes)["total"],
        "training_bytes": _training_bytes(model, batch_size, sizes),
        "encode_seconds": seconds_of(lambda: [model.encode_llm(**sample.inputs(row)) for row in range(len(tokens))]),
        "step_seconds": step_seconds,
        "timed_batch_size": timed_batch_size,
    }


def _milliseconds_per_output(model: Any, sample: _Sample, tokens: Sequence[int]) -> list[float]:
    """Return the mean milliseconds per output of the LLM and of the LLM with the SLM, timed in turns."""

    def time_slm(index: int) -> float:
        inputs = sample.inputs(index)
        return seconds_of(lambda: model.generate(**inputs, max_new_tokens=tokens[index], do_sample=False))

    contestants: dict[str, Callable[[int], float]] = {
        "llm": lambda index: seconds_of(lambda: sample.generate(index)),
        "llm2slm": time_slm,
    }
    return [1000 * statistics.mean(times) for times in time_in_turns(contestants, range(len(tokens))).values()]


def _training_bytes(model: Any, batch_size: int, sizes: Mapping[str, Any]) -> int:
    return training_memory(model.config, TrainingSetup(batch_size=batch_size, llm_states=True, **sizes))["total"]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def _with_fitting_batch(work: Callable[[int], float], batch_size: int) -> tuple[float, int]:
    """Return the result of work on a batch, and its size: the first of `batch_size` and its halves that fits."""
    while True:
        try:
            return work(batch_size), batch_size
        except (MemoryError, RuntimeError) as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
        batch_size //= 2  # after the error, which holds the tensors of its batch


def _step_seconds(model: Any, batch_size: int, prompt_length: int, output_length: int) -> tuple[float, int]:
    """
    Return the seconds of a training step on stored hidden states, and the batch size at which it was timed: a smaller
    one where memory is too small, from which the seconds are estimated.
    """
    asked, sizes = batch_size, {"prompt_length": prompt_length, "output_length": output_length}
    while batch_size > 1 and _training_bytes(model, batch_size, sizes) > _free_bytes(model.device):
        batch_size //= 2
    model.train()
    seconds, timed = _with_fitting_batch(lambda batch: _time_step(model, batch, **sizes), batch_size)
    return seconds * asked / timed, timed


def _time_step(model: Any, batch_size: int, prompt_length: int, output_length: int) -> float:
    """Return the seconds of the second of two training steps."""
    model.zero_grad()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    shape = (batch_size, prompt_length)
    ids = torch.ones(shape, dtype=torch.long, device=model.device)
    states = torch.randn(*shape, model.config.llm_hidden_size, device=model.device)
    labels = torch.ones(batch_size, output_length, dtype=torch.long, device=model.device)

    def step() -> None:
        mask = torch.ones_like(ids)
        model(input_ids=ids, attention_mask=mask, llm_hidden_states=states, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return seconds_of(step)


def _check_llm(llm: str | Path) -> PreTrainedConfig:
    config = load(AutoConfig, llm)
    if config.model_type == "llm2slm":
        raise ValueError(f"{llm} is an LLM-to-SLM model. Name the LLM that it was built from.")
    if not config.is_encoder_decoder and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ValueError(f"{llm} is encoder-only: it writes no outputs to compare with. Name an LLM that does.")
    return config


def _config_of(llm: PreTrainedConfig, name: str) -> LLM2SLMConfig:
    """Return the config of an SLM that is named: a cut of a decoder-only LLM, or a preset for an encoder-decoder."""
    return preset_config(name) if llm.is_encoder_decoder and not name.startswith("cut:") else cut_preset(llm, name)


def _tokenizer(given: str | None, default: str | None) -> PreTrainedTokenizerBase | None:
    """Return the named tokenizer, or else the default one; `None` if that cannot be reached."""
    if given is not None:
        return load(AutoTokenizer, given)
    try:
        return load(AutoTokenizer, default) if default is not None else None
    except OSError:  # offline
        return None


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Return the number of tokens of an output, its end token included."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1
