"""What a conversion did, and the checks that it passed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass
class Report:
    """
    The outcome of a conversion.

    Args:
        title: What became what.
        rows: What was done, carried over, left out and checked, each with its result.
    """

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, result: object) -> None:
        self.rows.append((what, f"{result:,}" if isinstance(result, int) else str(result)))

    def compare(self, what: str, outputs: Sequence[torch.Tensor], tolerance: float = 0.0) -> None:
        """
        Compare outputs of what was written with those of what it came from.

        Args:
            what: What is compared.
            outputs: Of the new checkpoint and of the old one.
            tolerance: The largest difference allowed, as a part of the largest value expected.

        Raises:
            ValueError: If they differ by more, or are not finite.
        """
        written, expected = outputs
        for name, values in (("source", expected), ("result", written)):
            if not values.isfinite().all():
                raise ValueError(f"The {what} of the {name} are not finite: its weights are damaged.")
        difference = float((written.double() - expected.double()).abs().max())
        scale = float(expected.double().abs().max())
        if difference > tolerance * scale:
            raise ValueError(f"The {what} differ by {difference:.3g} of {scale:.3g} afterwards; nothing is kept.")
        self.add(f"{what}, largest difference", "none" if difference == 0 else f"{difference:.2g} of {scale:.2g}")


def check_finite(tensors: Mapping[str, Any]) -> None:
    """Raise `ValueError` for the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        values = tensor[...]
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite: the checkpoint is damaged.")


def groups(names: Iterable[str], group: Callable[[str], str]) -> str:
    """Names counted by group: `12 x crossattention, 2 x enc_to_dec_proj`."""
    counts: dict[str, int] = {}
    for name in names:
        counts[group(name)] = counts.get(group(name), 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "none"


def probe(vocab_size: int, length: int = 16) -> torch.Tensor:
    """Token ids `(1, length)` spread over a vocabulary, without the first two, which pad and end as a rule."""
    return torch.linspace(min(2, vocab_size - 1), vocab_size - 1, length).long()[None]


@torch.no_grad()
def slm_logits(slm: PreTrainedModel, answer: torch.Tensor) -> torch.Tensor:
    """What an SLM says by itself, `(1, M, vocabulary)`."""
    # CODEPATH: an encoder-decoder SLM needs something to read.
    more = {"decoder_input_ids": answer} if slm.config.is_encoder_decoder else {}
    return slm(input_ids=answer, **more).logits


@torch.no_grad()
def composite_logits(model: Any) -> torch.Tensor:
    """What a composite answers to a probe, `(1, M, vocabulary)`."""
    config = model.config
    return model(input_ids=probe(config.encoder.vocab_size), decoder_input_ids=probe(config.vocab_size)).logits
