"""A Trainer that scores generated outputs, with our order of the data, learning rates and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput

from ..checkpoint_llm2slm import LLM_PREFIX
from ..data.order import EpochSampler
from ..evaluation.metrics import score
from ..files_llm2slm import first_line
from ..inference.text_to_text import TextToText
from .batches import WithoutLength, data_seed, effective_batch_size
from .callbacks import LogWhenSaved, SetEpoch
from .optimization import parameter_groups, relative_adafactor
from .resuming import TrainingFailed, last_checkpoint


class TextToTextTrainer(Seq2SeqTrainer):
    """
    A [`~transformers.Seq2SeqTrainer`] that also scores generated outputs, for every kind of model. It raises
    [`TrainingFailed`] at the first step whose loss or gradient norm is not finite, before the weights change.

    Args:
        text_to_text: The model with its processor.
        validation_examples: Examples (`prompt`, `target`) to generate outputs for and to score them by; `None` scores
            nothing.
        metric: One of [`METRICS`], reported as `eval_<metric>`; `"loss"` generates nothing.
        generation: Arguments of `generate()`; sampling needs `do_sample=True`.
        learning_rate_mapping: See [`parameter_groups`].
        optimizer: `"adafactor"` for [`relative_adafactor`]; `"adamw"` leaves the choice to `args.optim`.
        without_llm: Leave the LLM out of checkpoints, which serve only to resume from.
        kwargs: Arguments of the Trainer.
    """

    optimizer: Any  # its type is not found in transformers

    def __init__(
        self,
        text_to_text: TextToText,
        validation_examples: Dataset | None = None,
        metric: str = "loss",
        generation: Mapping[str, Any] | None = None,
        learning_rate_mapping: Mapping[str, float] | None = None,
        optimizer: str = "adamw",
        without_llm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(model=text_to_text.model, data_collator=WithoutLength(text_to_text.collator), **kwargs)
        self.text_to_text = text_to_text
        self.validation_examples = validation_examples
        self.metric = metric
        self.generation = {"do_sample": False, **(generation or {})}
        self.learning_rate_mapping = dict(learning_rate_mapping or {})
        self.optimizer_name = optimizer
        self.without_llm = without_llm
        self._last_batch: dict[str, Any] = {}
        self._last_learning_rate = self.args.learning_rate
        self._checked_step = 0
        self.add_callback(LogWhenSaved())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is None and self.without_llm:
            state = self.model.state_dict()
            state_dict = {name: tensor for name, tensor in state.items() if not name.startswith(LLM_PREFIX)}
        super()._save(output_dir, state_dict)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._last_batch = dict(inputs)
        self._last_learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._check_finite("training loss", loss, self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        scaler = getattr(self.accelerator, "scaler", None)
        # In float16, gradients that overflow are normal: the step is skipped, and the next one has a smaller scale.
        if not self.args.fp16 or (scaler is not None and scaler.get_scale() < 1):
            self._check_finite("gradient norm", norm, self.state.global_step + 1)
        return norm

    @torch.no_grad()
    def check_weights(self) -> None:
        """
        Raise [`TrainingFailed`] if the last batch has no finite loss with the weights as they are now, which may be
        saved before the next step computes a loss.
        """
        if not self._last_batch or self._checked_step == self.state.global_step:
            return
        model, training = self.model_wrapped, self.model_wrapped.training
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model.eval(), self._prepare_inputs(self._last_batch)).mean()
        model.train(training)
        self._check_finite("training loss", loss, self.state.global_step)
        self._checked_step = self.state.global_step

    def _check_finite(self, what: str, value: Any, step: int) -> None:
        if value is None or math.isfinite(value):
            return
        args, fix = self.args, "Lower learning_rate or max_grad_norm, or raise warmup_steps"
        precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "float32"
        if precision != "float32":
            fix += f", or set {precision}: false"
        checkpoint = last_checkpoint(args.output_dir)
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
        raise TrainingFailed(
            f"The {what} is {float(value)} at step {step}, with learning rate {self._last_learning_rate:g} in "
            f"{precision}, so the training stops. {fix}, and train from scratch with resume: false or in another "
            f"output_dir. {kept}"
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.check_weights()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # the only sign of a full disk that `torch.save` gives
                raise
            raise OSError(
                f"A checkpoint cannot be written to {self.args.output_dir}; its disk may be full. Free disk space and "
                "repeat the command, which resumes from the last complete checkpoint."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _resuming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A checkpoint holds tied weights once, under one of their names.
        tied = self.model.all_tied_weights_keys
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        trained, args = self.model if model is None else model, self.args
        relative = self.optimizer_name == "adafactor"
        if self.optimizer is None and (relative or self.learning_rate_mapping):
            groups = parameter_groups(trained, args.learning_rate, self.learning_rate_mapping, args.weight_decay)
            if relative:
                self.optimizer = relative_adafactor(groups)
            else:
                optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(args, trained)
                self.optimizer = optimizer_class(groups, **kwargs)
        return super().create_optimizer() if model is None else super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # A resumed epoch cannot always restore the generators of the stock samplers, and the one that groups by length
        # sorts within its groups, so that long examples precede short ones again and again.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length") or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        grouped = strategy == "group_by_length"
        sampler = EpochSampler(
            len(dataset),
            data_seed(self.args),
            torch.tensor(dataset["length"][:]) if grouped else None,
            effective_batch_size(self.args),
        )
        self.add_callback(SetEpoch(sampler))
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # a run resumed after its last step would take one more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        # In this method and not in evaluate(), so that callbacks such as early stopping see the metric as well.
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics.get(f"{metric_key_prefix}_loss")
        self._check_finite("validation loss", loss, self.state.global_step)
        if self.metric != "loss" and self.validation_examples is not None:
            outputs = self._generate(self.validation_examples["prompt"][:])
            scores = score(outputs, self.validation_examples["target"][:], [self.metric])
            output.metrics[f"{metric_key_prefix}_{self.metric}"] = scores[self.metric]
        return output

    def _generate(self, prompts: list[str]) -> list[str]:
        """Return an output for each prompt. Each process generates its share, unless the model is sharded."""
        rank, world = self.args.process_index, self.args.world_size
        batch_size = self.args.per_device_eval_batch_size
        if world == 1 or self.is_fsdp_enabled:
            return self.text_to_text.generate(prompts, batch_size, **self.generation)
        from accelerate.utils import gather_object

        share = range(rank, len(prompts), world)
        outputs = self.text_to_text.generate([prompts[index] for index in share], batch_size, **self.generation)
        return [output for _, output in sorted(gather_object(list(zip(share, outputs, strict=True))))]


@contextmanager
def _resuming(checkpoint: str | None) -> Iterator[None]:
    """Turn any failure to read a checkpoint of the Trainer into an `OSError` of one sentence."""
    try:
        yield
    except Exception as error:  # a damaged file raises a different class for each format
        raise OSError(
            f"{checkpoint} is damaged ({first_line(error)}). Remove this folder to resume from the checkpoint before "
            "it, or train from scratch with resume: false."
        ) from error
