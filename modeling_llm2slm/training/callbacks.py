"""What happens between the steps of a training: logging, the order of each epoch, lines of progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import is_in_notebook

from ..data.order import EpochSampler
from ..data.progress import RepeatedLine
from .batches import effective_batch_size


class LogWhenSaved(TrainerCallback):
    """
    Logs the loss with every checkpoint: a checkpoint does not hold the losses summed up since the last log, and a
    resumed run must log the same values as an uninterrupted one.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save


@dataclass
class SetEpoch(TrainerCallback):
    """Sets the epoch of a sampler: when a run resumes on several devices, accelerate's wrappers do not set it."""

    sampler: EpochSampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


def _write_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class ProgressLines(TrainerCallback):
    """
    Prints a line of progress every `interval` seconds, for output that is not a terminal.

    Use it as a context manager around all of a training, so that lines also appear while data is tokenized and while
    outputs are generated for a metric: a thread prints them.

    Args:
        interval: Seconds between two lines.
        write: Called with each line. Default: prints it to standard error.
    """

    def __init__(self, interval: float = 30.0, write: Callable[[str], None] = _write_line):
        self._lines = RepeatedLine(write, interval)
        self._lines.update(self.line)
        self.activity = "Preparing the model and the data"
        self._loss: float | None = None
        self._position: tuple[int, int, int, float] | None = None  # first step, this step, last step, seconds between
        self._began = 0.0
        self._batch_size = 1

    @classmethod
    def replace_bar(cls, trainer: Trainer, lines: ProgressLines | None) -> None:
        """Let `lines`, where they are given, report the progress of a Trainer in place of its own callbacks."""
        if lines is not None:
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(lines)

    def __enter__(self) -> ProgressLines:
        self._lines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__()

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._batch_size = time.monotonic(), effective_batch_size(args)
        self._position = (state.global_step, state.global_step, state.max_steps, 0.0)
        self.activity = "Training"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = self._position[0] if self._position else state.global_step
        self._position = (first, state.global_step, state.max_steps, time.monotonic() - self._began)
        self.activity = "Training"

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.activity = "Validating"

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._position, self.activity = None, "Writing the model"

    def line(self) -> str:
        """Return the line for now, such as `Training: step 20 of 100, loss 2.31, 51.2 examples/s, 0:03:20 left`."""
        if self._position is None:
            return f"{self.activity} ..."
        first, step, last, seconds = self._position
        words = [f"step {step:,} of {last:,}"]
        if self._loss is not None:
            words.append(f"loss {float(self._loss):.4g}")
        if step > first:
            words.append(f"{(step - first) * self._batch_size / seconds:.1f} examples/s")
            words.append(f"{timedelta(seconds=round((last - step) * seconds / (step - first)))} left")
        return f"{self.activity}: {', '.join(words)}"


def progress_lines(arguments: TrainingArguments, quiet: bool = False) -> ProgressLines | None:
    """Return lines of progress for a training whose output shows no bar; `None` where the Trainer shows one."""
    if quiet:
        return ProgressLines(write=lambda line: None)
    if arguments.process_index > 0 or (not arguments.disable_tqdm and (sys.stderr.isatty() or is_in_notebook())):
        return None
    return ProgressLines()
