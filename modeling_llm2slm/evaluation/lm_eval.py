"""
The model `llm2slm` of lm-eval. lm-eval finds no models of other packages by itself, so this module is its command too:

```bash
python -m modeling_llm2slm.evaluation.lm_eval --model llm2slm --model_args pretrained=runs/model --tasks gsm8k
```

In Python, `import modeling_llm2slm.evaluation.lm_eval` before `lm_eval.simple_evaluate(model="llm2slm", ...)`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils.logging import tqdm

from ..inference.batching import take_rows
from ..inference.text_to_text import TextToText


try:
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(f"{error.name} is not installed. Try: pip install 'modeling-llm2slm[lm-eval]'") from error


Result = TypeVar("Result")
NO_ROLLING = (
    "loglikelihood_rolling is not supported: an LLM-to-SLM model gives an output a likelihood for a prompt, and a "
    "text without a prompt has none. Choose tasks of another output_type."
)


@register_model("llm2slm")
class LLM2SLMEvalModel(LM):
    """
    An LLM-to-SLM model for lm-eval. The LLM's tokenizer reads the context, the SLM's reads the continuation and writes
    the output.

    Args:
        pretrained: A checkpoint, see [`TextToText.from_pretrained`], or a loaded model.
        batch_size: Prompts per batch. `"auto"` begins with `max_batch_size` and halves it when memory runs out.
        max_batch_size: Largest batch of `"auto"`.
        device: Where to compute. Default: the first CUDA device, or else the CPU.
        engine: The engine that computes, as for [`TextToText.from_pretrained`]. Log-likelihoods need PyTorch.
        prompt_max_length: Keep this many tokens of a longer context, the last ones. Default: the checkpoint's limit; a
            context that does not fit into the model's positions is an error.
        trust_remote_code: lm-eval passes it for data sets. The model's code is that of this package.
        options: More arguments of [`LoadOptions`]: `dtype`, `quantize`.

    Raises:
        ValueError: If the checkpoint is not an LLM-to-SLM model.
    """

    def __init__(
        self,
        pretrained: str | Path | TextToText,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        device: str | None = None,
        engine: str | None = None,
        prompt_max_length: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.name = str(pretrained)
        if isinstance(pretrained, TextToText):
            self.name = str(pretrained.model.config.name_or_path)
        else:
            options |= {"device": _device(device), "prompt_max_length": prompt_max_length}
            pretrained = TextToText.from_pretrained(pretrained, engine, **options)
        if not pretrained.is_llm2slm:
            raise ValueError(f"{self.name} is not an LLM-to-SLM model. Evaluate it with lm-eval's own: --model hf.")
        self.text_to_text, self.tokenizer = pretrained, pretrained.processor.tokenizer
        if prompt_max_length is not None:
            self.tokenizer.truncation_side = "left"  # examples come first, and the question last
        self.is_auto = str(batch_size).startswith("auto")
        self.batch_size = max_batch_size if self.is_auto else int(batch_size)
        self._device = torch.device(getattr(pretrained.model, "device", "cpu"))

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-eval caches contexts."""
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template of the LLM's tokenizer, or the one of this name."""
        name = chat_template if isinstance(chat_template, str) else None
        return self.tokenizer.get_chat_template(name) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write messages with the chat template of the LLM's tokenizer, open at the end if the last is unfinished."""
        return self.text_to_text.processor.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """
        Return the log-likelihood of each continuation, and whether it is the greedy output.

        White space between context and continuation is left out: training targets do not begin with it. The end token
        does not count, as for the other models of lm-eval.
        """
        if not isinstance(self.text_to_text.model, torch.nn.Module):
            raise ValueError(f"{self.name} was exported: take the checkpoint it was made from for log-likelihoods.")
        pairs = [request.args for request in requests]
        return self._in_batches("loglikelihood", pairs, self._score)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Raise `NotImplementedError`: there is no prompt."""
        raise NotImplementedError(NO_ROLLING)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """
        Generate greedily for each context, unless the task samples, and cut the outputs at the task's stop strings.

        Without a limit in the task, outputs have at most as many tokens as in [`TextToText.generate`].
        """
        outputs: dict[int, str] = {}
        settings = [json.dumps(request.args[1], sort_keys=True, default=str) for request in requests]
        order = sorted(range(len(requests)), key=lambda row: settings[row])
        for _, group in groupby(order, key=lambda row: settings[row]):  # those of each task
            rows = list(group)
            pairs = [requests[row].args for row in rows]
            outputs.update(zip(rows, self._in_batches("generate_until", pairs, self._generate), strict=True))
        return [outputs[row] for row in range(len(requests))]

    def _in_batches(
        self, method: str, pairs: Sequence[tuple[str, Any]], work: Callable[[Sequence[Any]], list[Result]]
    ) -> list[Result]:
        """Return what `work` makes of pairs of a context and something, in their order. Long contexts come first."""
        rest = sorted(range(len(pairs)), key=lambda row: (-len(pairs[row][0]), pairs[row][0]))
        results: dict[int, Result] = {}
        with tqdm(total=len(pairs), desc=f"{method} of llm2slm") as progress:
            while rest:
                batch = rest[: self.batch_size]
                try:
                    made = work([pairs[row] for row in batch])
                except RuntimeError as error:
                    if not (self.is_auto and len(batch) > 1 and should_reduce_batch_size(error)):
                        raise
                    self.batch_size = len(batch) // 2
                    clear_device_cache(garbage_collection=True)
                    continue
                for row, result in zip(batch, made, strict=True):
                    results[row] = result
                    self.cache_hook.add_partial(method, pairs[row], result)
                progress.update(len(batch))
                rest = rest[len(batch) :]
        return [results[row] for row in range(len(pairs))]

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Score continuations. Choices for one context share its prompt states."""
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        features = self.text_to_text.features([self._prompt(context) for context in contexts])
        targets = [self._target_ids(continuation) for _, continuation in pairs]
        rows = [contexts.index(context) for context, _ in pairs]
        for row, target in zip(rows, targets, strict=True):
            self.text_to_text.check_positions(len(features["input_ids"][row]), len(target))
        inputs = take_rows(self.text_to_text.read(features), rows)
        width = max(1, *map(len, targets))
        labels = torch.tensor([target + [-100] * (width - len(target)) for target in targets], device=self._device)
        logits = self.text_to_text.model(**inputs, labels=labels).logits.float()
        ids, kept = labels.clamp(min=0), labels != -100
        found = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].masked_fill(~kept, 0).sum(-1)
        greedy = ((logits.argmax(-1) == ids) | ~kept).all(-1)
        return list(zip(found.tolist(), greedy.tolist(), strict=True))

    def _generate(self, pairs: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Generate for contexts with the same settings."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(pairs[0][1], default_max_gen_toks=0))
        stops, limit = [stop for stop in kwargs.pop("until") if stop], kwargs.pop("max_gen_toks")
        if not kwargs["do_sample"]:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("temperature", "top_p", "top_k")}
        if limit:
            kwargs["max_new_tokens"] = limit
        if stops:
            kwargs["stop_strings"] = stops
        prompts = [self._prompt(context) for context, _ in pairs]
        outputs = self.text_to_text.generate(prompts, len(prompts), **{"num_beams": 1, **kwargs})
        return [min((output.partition(stop)[0] for stop in stops), key=len, default=output) for output in outputs]

    def _prompt(self, context: str) -> str:
        """Return a context that has a token: if it is empty, the LLM's start or end token stands for it."""
        if context or self.tokenizer("").input_ids:
            return context
        return self.tokenizer.bos_token or self.tokenizer.eos_token

    def _target_ids(self, continuation: str) -> list[int]:
        return self.text_to_text.tokenizer(continuation.lstrip() or continuation, add_special_tokens=False).input_ids


def _device(wanted: str | None) -> str:
    """Return the wanted device, or the CPU in place of lm-eval's default device if there is no CUDA device."""
    is_default = wanted in (None, "cuda", "cuda:0")
    return wanted or "cuda" if torch.cuda.is_available() or not is_default else "cpu"


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
