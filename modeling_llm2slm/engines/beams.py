"""Beam search of exported models: transformers' own, with fewer operations around a step."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import EosTokenCriteria, GenerationConfig, MaxLengthCriteria


NEVER = -1.0e9  # transformers' score of a beam that must not be chosen


class Hypotheses:
    """The best finished outputs of each prompt, best first."""

    def __init__(self, output: torch.Tensor, generation_config: GenerationConfig, fill: int):
        beams, length = int(generation_config.num_beams), int(generation_config.max_length)
        self.start = output.shape[1]
        self.max_length = length
        self.penalty = float(generation_config.length_penalty)
        self.early_stopping = generation_config.early_stopping
        rows = output.shape[0] // beams
        self.tokens = output.new_full((rows, beams, length), fill)
        self.scores = torch.full((rows, beams), NEVER)
        self.lengths = output.new_zeros(rows, beams)  # tokens of an output, the beginning left out
        self.finished = torch.zeros(rows, beams, dtype=torch.bool)
        self.can_improve = torch.ones(rows, 1, dtype=torch.bool)
        self.is_empty = True

    def add(self, tokens: torch.Tensor, scores: torch.Tensor, ended: torch.Tensor, length: int) -> None:
        """Take outputs `(prompts, candidates, max_length)` of `length` tokens that `ended`, if they are better."""
        self.is_empty, new = False, length - self.start
        scores = scores / new**self.penalty
        if self.early_stopping is True:
            scores = scores + self.finished.all(1, keepdim=True).float() * NEVER
        scores = scores + (~self.can_improve).float() * NEVER + (~ended).float() * NEVER
        self.scores, chosen = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        lengths = torch.cat([self.lengths, torch.where(ended, new, 0)], 1)
        self.tokens = pick(torch.cat([self.tokens, tokens], 1), chosen)
        self.lengths, self.finished = lengths.gather(1, chosen), torch.cat([self.finished, ended], 1).gather(1, chosen)

    def are_complete(self, running_scores: torch.Tensor, length: int) -> bool:
        """Return whether no beam, which has `length` tokens by now, can become better than what has finished."""
        longest = self.max_length if self.early_stopping == "never" and self.penalty > 0 else length
        best = running_scores[:, :1] / (longest - self.start) ** self.penalty
        worst = torch.where(self.finished, self.scores.min(1, keepdim=True)[0], NEVER)
        self.can_improve &= (best > worst).any(1, keepdim=True)
        return not bool(self.can_improve.any()) or (self.early_stopping is True and bool(self.finished.all()))

    def best(self, number: int) -> torch.Tensor:
        """Return the best outputs `(prompts * number, longest)`."""
        longest = self.start + int(self.lengths[:, :number].max())
        return self.tokens[:, :number, :longest].flatten(0, 1)


@torch.no_grad()
def search(
    model: Any,
    inputs: dict[str, Any],
    output: torch.Tensor,
    processors: Any,
    criteria: Any,
    generation_config: GenerationConfig,
) -> torch.Tensor:
    """
    Continue outputs `(prompts * num_beams, M)` by beam search, as stock `generate()` does.

    Most steps end no output. Then nothing but scores, tokens and the cache changes.

    Args:
        model: Its `forward()` takes `inputs`, and then new tokens with the cache.
        inputs: Of the first step.
        output: What the outputs begin with, once for each beam.
        processors: Of logits, a `LogitsProcessorList`.
        criteria: A `StoppingCriteriaList`.
        generation_config: The numbers of beams and of outputs, length, penalty and early stopping are read.

    Returns:
        The outputs `(prompts * num_return_sequences, <= max_length)`, best first.
    """
    name = next(name for name in ("decoder_input_ids", "input_ids") if name in inputs)
    ends = [one.eos_token_id for one in criteria if isinstance(one, EosTokenCriteria)]
    others = [one for one in criteria if not isinstance(one, EosTokenCriteria | MaxLengthCriteria)]
    pad, end = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    # Like transformers: a padding of id 0 counts as none.
    found = Hypotheses(output, generation_config, int(pad or end[0]) if end is not None else -1)
    (rows, beams), length = found.scores.shape, found.start
    candidates = max(2, 1 + (0 if end is None else len(end))) * beams
    first_rows = beams * torch.arange(rows)[:, None]
    tokens_so_far = found.tokens.clone()
    tokens_so_far[:, :, :length] = output.view(rows, beams, length)
    scores = torch.full((rows, beams), NEVER)  # the beams are the same at first, so only one counts
    scores[:, 0] = 0
    while True:
        log_probs = model(**inputs).logits[:, -1].float().log_softmax(-1)
        if processors:
            log_probs = processors(tokens_so_far[:, :, :length].flatten(0, 1), log_probs)
        vocabulary = log_probs.shape[-1]
        top, index = (log_probs.view(rows, beams, -1) + scores[:, :, None]).flatten(1).topk(candidates)
        source, tokens = index // vocabulary, index % vocabulary
        length += 1
        ended = torch.full_like(tokens, length == found.max_length, dtype=torch.bool)
        for one in ends:
            ended |= torch.isin(tokens, one)
        extended = None
        if others or bool(ended[:, :beams].any()):
            extended = pick(tokens_so_far, source)
            extended[:, :, length - 1] = tokens
            for criterion in others:
                ended |= criterion(extended[:, :, :length].flatten(0, 1), None).view(rows, -1)
        scores, chosen = (top + ended.float() * NEVER).topk(beams)
        if extended is not None:
            counted = ended.clone()
            counted[:, beams:] = False
            found.add(extended, top, counted, length)
        if not found.is_empty and (found.are_complete(scores, length) or bool(ended.all())):
            return found.best(int(generation_config.num_return_sequences))
        source, tokens = source.gather(1, chosen), tokens.gather(1, chosen)
        tokens_so_far = pick(tokens_so_far, source)
        tokens_so_far[:, :, length - 1] = tokens
        inputs["past_key_values"].reorder_cache((source + first_rows).flatten())
        inputs = {name: tokens.view(-1, 1), "past_key_values": inputs["past_key_values"]}


def pick(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows `(prompts, R)` of values `(prompts, beams, length)`, as `(prompts, R, length)`."""
    return values.take_along_dim(rows[:, :, None], 1)


__all__ = ["search"]
