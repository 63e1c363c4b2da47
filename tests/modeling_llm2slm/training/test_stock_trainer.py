"""The stock `Trainer` and `Seq2SeqTrainer` train our model without changes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    EvalPrediction,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
)

from modeling_llm2slm import DataCollatorForLLM2SLM, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from tests.support.common import END, build_model, gpt2_config, llm_tokenizer, same_tensors, slm_tokenizer, t5_config


PROMPTS = [
    "src4 src9 src30",
    "src5",
    "src1 src2",
    "src7 src7 src8",
    "src60 src61",
    "src33",
    "src90 src2 src5",
    "src19",
]
TARGETS = [
    "out3 out8 out1",
    "out40",
    "out9 out9",
    "out2 out3 out5 out7 out11",
    "out50",
    "out6 out28",
    "out4",
    "out70 out71",
]


@pytest.fixture
def processor() -> LLM2SLMProcessor:
    return LLM2SLMProcessor(llm_tokenizer(), slm_tokenizer())


def features(processor: LLM2SLMProcessor) -> list[dict[str, Any]]:
    return [dict(processor(text=p, text_target=a)) for p, a in zip(PROMPTS, TARGETS, strict=True)]


def arguments(folder: Path, cls: type = TrainingArguments, **overrides: Any) -> Any:
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "max_grad_norm": 0.0,
        "learning_rate": 0.01,
    }
    return cls(**(values | overrides))


def without_dropout(model: LLM2SLMForConditionalGeneration) -> LLM2SLMForConditionalGeneration:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def train_with_sgd(
    folder: Path, processor: LLM2SLMProcessor, **overrides: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights after two steps over the same eight examples."""
    model = without_dropout(build_model("add"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    trainer = Trainer(
        model,
        arguments(folder, **overrides),
        data_collator=DataCollatorForLLM2SLM(processor),
        train_dataset=features(processor),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.state_dict()


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def test_gradient_accumulation_gives_the_loss_and_weights_of_the_whole_batch(
    processor: LLM2SLMProcessor, tmp_path: Path
) -> None:
    """The targets have unequal lengths, so a mean of means would differ."""
    losses, weights = train_with_sgd(tmp_path, processor)
    other_losses, other_weights = train_with_sgd(tmp_path, processor, **ACCUMULATED)
    assert len(losses) == 2
    assert other_losses == pytest.approx(losses, rel=1e-4)
    start = build_model("add").state_dict()
    assert not torch.equal(weights["decoder.lm_head.weight"], start["decoder.lm_head.weight"])
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-5)
        if name.startswith("encoder.llm."):
            assert torch.equal(weight, start[name])


def test_dropped_num_items_in_batch_changes_the_loss(
    processor: LLM2SLMProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, _ = train_with_sgd(tmp_path, processor)
    original = LLM2SLMForConditionalGeneration.forward

    @functools.wraps(original)  # Trainer reads the signature
    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("num_items_in_batch", None)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LLM2SLMForConditionalGeneration, "forward", faulty)
    other_losses, _ = train_with_sgd(tmp_path, processor, **ACCUMULATED)
    assert other_losses != pytest.approx(losses, rel=0.05)


def test_label_smoothing_has_the_expected_loss(processor: LLM2SLMProcessor, tmp_path: Path) -> None:
    model = without_dropout(build_model("add"))
    collator = DataCollatorForLLM2SLM(processor, model=model)
    batch = collator(features(processor))
    with torch.no_grad():
        scores = model(**batch).logits.log_softmax(-1)
    kept = batch["labels"] != -100
    expected = 0.9 * -scores[kept].gather(1, batch["labels"][kept][:, None]).mean() - 0.1 * scores[kept].mean()
    trainer = Trainer(
        model,
        arguments(tmp_path, label_smoothing_factor=0.1, max_steps=1),
        data_collator=collator,
        train_dataset=features(processor),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("with_processor", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_predict_with_generate_has_the_outputs_of_single_prompts(
    beams: int, with_processor: bool, processor: LLM2SLMProcessor, tmp_path: Path
) -> None:
    model, seen = build_model("add"), []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"outputs": float(len(prediction.predictions))}

    trainer = Seq2SeqTrainer(
        model,
        arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            predict_with_generate=True,
            generation_max_length=9,
            generation_num_beams=beams,
            per_device_eval_batch_size=3,
        ),
        data_collator=DataCollatorForLLM2SLM(processor),
        eval_dataset=features(processor),
        processing_class=processor if with_processor else None,
        compute_metrics=keep,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_outputs"] == len(PROMPTS)
    assert np.isfinite(metrics["eval_loss"])
    labels = DataCollatorForLLM2SLM(processor)(features(processor))["labels"]
    assert (seen[0].label_ids == -100).any()
    width = labels.shape[1]
    assert seen[0].label_ids[:, :width][labels.numpy() != -100].tolist() == labels[labels != -100].tolist()
    for prompt, output in zip(PROMPTS, seen[0].predictions, strict=True):
        alone = model.generate(
            **processor(text=prompt, return_tensors="pt"), max_length=9, num_beams=beams, do_sample=False
        )[0].tolist()
        row = output.tolist()
        assert row[: len(alone)] == alone
        assert set(row[len(alone) :]) <= {END, -100}
    texts = processor.batch_decode(
        np.where(seen[0].predictions == -100, END, seen[0].predictions), skip_special_tokens=True
    )
    assert len(texts) == len(PROMPTS)


def test_evaluation_loss_and_prediction_without_generation(processor: LLM2SLMProcessor, tmp_path: Path) -> None:
    """Trainer must gather every tensor of the output, not only the logits."""
    model = build_model("add")
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=8),
        data_collator=DataCollatorForLLM2SLM(processor),
        eval_dataset=features(processor),
    )
    batch = DataCollatorForLLM2SLM(processor)(features(processor))
    with torch.no_grad():
        expected = model(**batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    predictions = trainer.predict(features(processor)).predictions
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-4, atol=1e-4)


def test_checkpoint_resumes_and_loads(processor: LLM2SLMProcessor, tmp_path: Path) -> None:
    """Two steps and two more from the checkpoint are four; the checkpoint is a whole model and its processor."""

    def train(folder: Path, steps: int, resume: bool = False) -> LLM2SLMForConditionalGeneration:
        model = without_dropout(build_model("add"))
        trainer = Trainer(
            model,
            arguments(
                folder,
                max_steps=steps,
                save_strategy="steps",
                save_steps=2,
                lr_scheduler_type="constant",
                per_device_train_batch_size=4,
            ),
            data_collator=DataCollatorForLLM2SLM(processor),
            train_dataset=features(processor),
            processing_class=processor,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return model

    train(tmp_path / "parts", 2)
    resumed, whole = train(tmp_path / "parts", 4, resume=True), train(tmp_path / "whole", 4)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight)
    folder = tmp_path / "whole" / "checkpoint-4"
    same_tensors(AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict(), whole.state_dict())
    assert type(AutoProcessor.from_pretrained(folder)) is LLM2SLMProcessor


@pytest.mark.parametrize("end", [1, [1, 5]])
@pytest.mark.parametrize("pad", ["<pad>", "src50", "src110"])
def test_training_keeps_the_special_ids(pad: str, end: Any, processor: LLM2SLMProcessor, tmp_path: Path) -> None:
    """
    Stock `Trainer` aligns a model's special ids with `processing_class.tokenizer`, which is the LLM's. It may have a
    pad token that the LLM's config does not name; that of `src110` is beyond the SLM's vocabulary.
    """
    model = build_model("add")
    model.config.encoder.eos_token_id = end
    processor.tokenizer.pad_token = pad
    before = (ids_of(model.config), ids_of(model.config.decoder), ids_of(model.generation_config))
    trainer = Seq2SeqTrainer(
        model,
        arguments(tmp_path, Seq2SeqTrainingArguments),
        data_collator=DataCollatorForLLM2SLM(processor),
        train_dataset=features(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for trained in (model, saved):
        assert (ids_of(trained.config), ids_of(trained.config.decoder), ids_of(trained.generation_config)) == before


def ids_of(config: Any) -> list[Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return [getattr(config, name, None) for name in names]


def test_gradient_checkpointing_changes_no_weight(processor: LLM2SLMProcessor, tmp_path: Path) -> None:
    losses, weights = train_with_sgd(tmp_path, processor)
    # The argument has a new name in transformers 5.23, where the old one is deprecated.
    name = (
        "activation_checkpointing"
        if hasattr(TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    other_losses, other_weights = train_with_sgd(tmp_path, processor, **{name: True})
    assert other_losses == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-5)


def test_overfitted_model_generates_its_targets(processor: LLM2SLMProcessor, tmp_path: Path) -> None:
    """A low loss alone could come from a shift by one; the generated text could not."""
    torch.manual_seed(0)
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=T5EncoderModel(t5_config()),
        decoder_model=GPT2LMHeadModel(gpt2_config(initializer_range=0.05)),
        shared_tokenizer=False,
    )
    trainer = Seq2SeqTrainer(
        without_dropout(model),
        arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=75, logging_steps=15, lr_scheduler_type="constant"),
        data_collator=DataCollatorForLLM2SLM(processor),
        train_dataset=features(processor),
        processing_class=processor,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 1
    assert trainer.state.log_history[-2]["loss"] < 0.05
    for kwargs in ({}, {"num_beams": 3}):
        batch = processor(text=PROMPTS, padding=True, return_tensors="pt")
        outputs = model.eval().generate(**batch, max_new_tokens=12, do_sample=False, **kwargs)
        assert processor.batch_decode(outputs, skip_special_tokens=True) == TARGETS


def test_ids_that_the_user_sets_everywhere_are_kept() -> None:
    """`Trainer` writes into one config and the generation config."""
    model = build_model("replace")
    for holder in (model.config, model.config.decoder, model.generation_config):
        holder.pad_token_id = 7
    model.train()
    assert [ids_of(each)[2] for each in (model.config, model.config.decoder, model.generation_config)] == [7, 7, 7]


def test_ids_of_the_user_are_kept(tmp_path: Path) -> None:
    """Ids of the two vocabularies coincide all the time; only what is also written into a config is `Trainer`'s."""
    model = build_model("replace")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [1, 98], 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for change in (loaded.eval, loaded.train, loaded.eval):
        change()
        assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == ([1, 98], 0)
