"""Reports of conversions: what they did, and the checks that they passed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass
class Report:
    """
    The outcome of a conversion.

    Args:
        title: The source and the result.
        rows: Each action or check with its result.
    """

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, result: object) -> None:
        """Add a row; a whole number gets thousands separators."""
        self.rows.append((what, f"{result:,}" if isinstance(result, int) else str(result)))

    def compare(self, what: str, outputs: Sequence[torch.Tensor], tolerance: float = 0.0) -> None:
        """
        Compare outputs of the result with those of its source, and add the difference to the report.

        Args:
            what: Name of the outputs, in the plural.
            outputs: Outputs of the result and of the source, of the same shape.
            tolerance: Largest difference allowed, as a fraction of the source's largest value.

        Raises:
            ValueError: If the difference is larger, or if a value is not finite.
        """
        written, expected = outputs
        for name, values in (("source", expected), ("result", written)):
            if not values.isfinite().all():
                raise ValueError(f"The {what} of the {name} are not finite: its weights are damaged.")
        difference = float((written.double() - expected.double()).abs().max())
        scale = float(expected.double().abs().max())
        if difference > tolerance * scale:
            raise ValueError(f"The {what} differ by {difference:.3g} of {scale:.3g} afterwards; nothing was written.")
        self.add(f"{what}, largest difference", "none" if difference == 0 else f"{difference:.2g} of {scale:.2g}")


def groups(names: Iterable[str], group: Callable[[str], str]) -> str:
    """Return how many names each group has: `12 x crossattention, 2 x enc_to_dec_proj`."""
    counts: dict[str, int] = {}
    for name in names:
        counts[group(name)] = counts.get(group(name), 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "none"


def probe(vocab_size: int, length: int = 16) -> torch.Tensor:
    """Return token ids `(1, length)` spread over a vocabulary, without the first two, which usually pad and end."""
    return torch.linspace(min(2, vocab_size - 1), vocab_size - 1, length).long()[None]


@torch.no_grad()
def slm_logits(slm: PreTrainedModel, output: torch.Tensor) -> torch.Tensor:
    """Return the logits `(1, M, vocabulary)` of an SLM alone."""
    # CODEPATH: an encoder-decoder SLM (T5-small) needs an input for its encoder.
    more = {"decoder_input_ids": output} if slm.config.is_encoder_decoder else {}
    return slm(input_ids=output, **more).logits


@torch.no_grad()
def composite_logits(model: Any) -> torch.Tensor:
    """Return the logits `(1, M, vocabulary)` of an LLM-to-SLM model for a fixed prompt and output."""
    config = model.config
    return model(input_ids=probe(config.encoder.vocab_size), decoder_input_ids=probe(config.vocab_size)).logits
