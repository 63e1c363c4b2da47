"""Generation of exported models with fewer operations around a step than stock generation needs."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, GenerationConfig, MaxLengthCriteria

from .beams import search


logger = logging.getLogger(__name__)
KEPT_ROWS = 0.75  # outputs that have ended leave the batch when at most this part of its rows is left
STOCK_ONLY = ("return_dict_in_generate", "output_scores", "output_logits")
STOCK_BEAMS_ONLY = (*STOCK_ONLY, "do_sample", "low_memory")


class FastDecoding:
    """
    A mixin before transformers' `GenerationMixin`, whose loop around a step of a small graph may take longer than it.

    Greedy search, sampling, beam search and streaming, in batches and with every logits processor and stopping
    criterion, take loops of this package; what they do not do takes transformers'. The tokens are the same.
    """

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if _takes_stock(generation_config, STOCK_ONLY, synced_gpus):
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
                **model_kwargs,
            )  # fmt: skip
        inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)  # type: ignore[attr-defined]
        return decode(self, inputs, input_ids, logits_processor, stopping_criteria, generation_config, streamer)

    def _beam_search(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        if _takes_stock(generation_config, STOCK_BEAMS_ONLY, synced_gpus):
            return super()._beam_search(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **model_kwargs
            )
        inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)  # type: ignore[attr-defined]
        return search(self, inputs, input_ids, logits_processor, stopping_criteria, generation_config)


def _takes_stock(generation_config: GenerationConfig, names: tuple[str, ...], synced_gpus: bool) -> bool:
    """Return whether transformers' loop must generate, and log why."""
    stock = [name for name in names if getattr(generation_config, name, None)]
    stock += ["synced_gpus"] if synced_gpus else []
    if stock:
        logger.info(f"`{stock[0]}` takes the loop of transformers, which is slower.")
    return bool(stock)


@torch.no_grad()
def decode(
    model: Any,
    inputs: dict[str, Any],
    output: torch.Tensor,
    processors: Any,
    criteria: Any,
    generation_config: GenerationConfig,
    streamer: Any = None,
) -> torch.Tensor:
    """
    Continue outputs `(B, M)` greedily or by sampling, as stock `generate()` does. In greedy search, outputs that have
    ended are not computed any longer.

    Args:
        model: Its `forward()` takes `inputs`, and then new tokens with the cache.
        inputs: Of the first step.
        output: What the outputs begin with.
        processors: Of logits, a `LogitsProcessorList`.
        criteria: A `StoppingCriteriaList`.
        generation_config: `max_length`, `do_sample` and the padding are read.
        streamer: Gets every token.

    Returns:
        The outputs `(B, <= max_length)`.
    """
    name = next(name for name in ("decoder_input_ids", "input_ids") if name in inputs)
    ends = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
    others = [one for one in criteria if not isinstance(one, EosTokenCriteria | MaxLengthCriteria)]
    rows, length = output.shape
    pad = generation_config.pad_token_id
    pad = int(ends[0][0]) if ends and pad is None else pad
    tokens_so_far = output.new_zeros(rows, int(generation_config.max_length or length + 1))
    tokens_so_far[:, :length] = output
    done = torch.zeros(rows, dtype=torch.bool)
    cache, active = inputs["past_key_values"], torch.arange(rows)
    # Logits processors may count on all rows, and a sample depends on the rows before it.
    drops_rows = bool(ends) and not processors and not generation_config.do_sample and cache.is_private
    while True:
        scores = model(**inputs).logits[:, -1].float()
        if processors:
            scores = processors(tokens_so_far[:, :length], scores.clone())
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if len(active) < rows:
            tokens = tokens.new_full((rows,), pad).index_copy(0, active, tokens)
        if ends:
            tokens = tokens.masked_fill(done, pad)
        tokens_so_far[:, length] = tokens
        length += 1
        if streamer is not None:
            streamer.put(tokens)
        for end in ends:
            done |= (tokens[:, None] == end).any(1)
        for criterion in others:
            done = done | criterion(tokens_so_far[:, :length], None)
        if length == tokens_so_far.shape[1] or ((ends or others) and bool(done.all())):
            break
        if drops_rows:
            left = (~done[active]).nonzero().squeeze(1)
            if len(left) <= KEPT_ROWS * len(active):
                cache.keep(left)
                active = active[left]
        inputs = {name: tokens[active, None], "past_key_values": cache}
    if streamer is not None:
        streamer.end()
    return tokens_so_far[:, :length].clone()


__all__ = ["FastDecoding", "decode"]
