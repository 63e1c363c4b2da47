"""Time per stage and FLOPs of one output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from ..configuration_llm2slm import LLM2SLMConfig
from ..evaluation.timing import seconds_of, time_tokens
from ..inference.engine import BenchmarkModels, engine
from ..inference.parts import decoding_modules
from ..training.memory import make_fake, without_storage
from .cells import Cell
from .contestants import endless


class Stages:
    """
    Times the stages of the LLM-to-SLM model on PyTorch: the LLM, the projector (with the SLM's encoder), the first
    token.

    Attributes:
        decode_bytes: Bytes of the weights that each token reads.
    """

    def __init__(self, models: BenchmarkModels, device: str):
        self.model: Any = endless(engine("pytorch").contestants()["llm2slm"].load(models, models.folder, device))
        weights = {weight for part in decoding_modules(self.model.decoder) for weight in part.parameters()}
        self.decode_bytes = sum(weight.nbytes for weight in weights)

    def __call__(self, cell: Cell) -> dict[str, float]:
        """Return seconds by stage."""
        ids = cell.ids(self.model.config.encoder.vocab_size).to(self.model.device)
        mask, seconds = torch.ones_like(ids), {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            values: list[Any] = []
            seconds[name] = seconds_of(lambda: values.append(work()))
            return values[0]

        states = timed("LLM", lambda: self.model.encode_llm(ids, mask))
        prompt = timed("projector", lambda: self.model.encode_prompt(ids, mask, llm_hidden_states=states))
        seconds["first token"] = self._first_token(prompt, cell.beams)
        if cell.beams > 1:
            seconds["first token, greedy"] = self._first_token(prompt, 1)
        return seconds

    def _first_token(self, prompt: Any, beams: int) -> float:
        return time_tokens(self.model, {"encoder_outputs": prompt}, 1, num_beams=beams).total


class Flops:
    """Counts the floating-point operations of an output, on models without storage."""

    def __init__(self, models: BenchmarkModels):
        config = LLM2SLMConfig.from_pretrained(models.llm2slm)
        config._attn_implementation = "eager"  # the counter misses the fused attention of CPUs
        self.composite = without_storage(config)
        with torch.device("meta"):
            llm = AutoConfig.from_pretrained(models.llm)
            self.llm = AutoModelForSeq2SeqLM.from_config(llm, attn_implementation="eager")
        self.fake = FakeTensorMode()  # on the meta device alone, models would read the values of masks
        for model in (self.llm, self.composite):
            make_fake(model, self.fake)

    def ratio(self, cell: Cell) -> float:
        """Return the LLM's operations divided by the LLM-to-SLM model's. The batch size does not change it."""
        return self.operations(self.llm, cell) / self.operations(self.composite, cell)

    def operations(self, model: Any, cell: Cell) -> int:
        """Return the operations of one of the two models for one prompt and its output."""
        with FlopCounterMode(display=False) as counter, self.fake, torch.no_grad():
            ids, labels = (torch.zeros(1, length, dtype=torch.long) for length in (cell.prompt, cell.output))
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        return counter.get_total_flops()
