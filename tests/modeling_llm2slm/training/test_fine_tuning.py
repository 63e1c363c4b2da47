"""What a recipe can set for an LLM-to-SLM model: stored hidden states, adapters, learning rates, streams, bad rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from modeling_llm2slm import DataCollatorForLLM2SLM, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.conversion.compose import compose
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import EncodeSettings
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.states.fingerprints import llm_fingerprint
from modeling_llm2slm.states.store import StateStore
from modeling_llm2slm.states.without_llm import load_without_llm
from modeling_llm2slm.training import features as feature_module
from modeling_llm2slm.training.run import train
from modeling_llm2slm.training.trainer import TextToTextTrainer
from tests.support import families
from tests.support.checkpoints import PAIRS, PROMPTS, stopped_at, write_checkpoint, write_pairs
from tests.support.common import apart, llm_tokenizer, same_tensors
from tests.support.training import losses, weights


# peft 0.21 itself reads this property of every model it adapts.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint("llm2slm", tmp_path_factory.mktemp("composite"))


@pytest.fixture
def recipe(recipe: dict[str, Any], composite: str) -> dict[str, Any]:
    """The recipe of the folder's tests for an LLM-to-SLM model, with the loss of each step."""
    return {**recipe, "model": composite, "logging_steps": 1}


def moved(folder: str | Path, start: str) -> set[str]:
    before, after = weights(start), weights(folder)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


class TestStoredStates:
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-3)])
    def test_losses_and_outputs_are_those_of_a_running_llm(
        self, recipe: dict[str, Any], tmp_path: Path, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = {**recipe, "per_device_eval_batch_size": 3, "learning_rate": 1e-3}
        with_llm = train({**recipe, "output_dir": str(tmp_path / "with")})
        encode(recipe["model"], [recipe["train_data"]], tmp_path / "states", EncodeSettings(dtype=dtype))
        monkeypatch.setattr(LLM2SLMForConditionalGeneration, "encode_llm", None)
        without = train({**recipe, "llm_states": str(tmp_path / "states")})
        assert losses(without) == pytest.approx(losses(with_llm), rel=tolerance)
        evaluated = [
            [row["eval_loss"] for row in report["log"] if "eval_loss" in row] for report in (with_llm, without)
        ]
        assert evaluated[1] == pytest.approx(evaluated[0], rel=tolerance)
        assert without["best_metric"] == pytest.approx(with_llm["best_metric"], abs=5)
        # The saved model has the original LLM again, and the report counts it.
        assert without["parameters"] == with_llm["parameters"]
        assert not [name for name in moved(recipe["output_dir"], recipe["model"]) if name.startswith("encoder.llm.")]
        assert llm_fingerprint(recipe["output_dir"]) == llm_fingerprint(recipe["model"])
        trained = TextToText.from_pretrained(recipe["output_dir"])
        assert trained.model.config.architectures == ["LLM2SLMForConditionalGeneration"]
        assert len(trained.generate(PROMPTS, max_new_tokens=8)) == len(PROMPTS)

    def test_stored_states_train_without_weights_of_the_llm(
        self, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encode(recipe["model"], [recipe["train_data"]], tmp_path / "states")
        seen: list[str] = []
        step = TextToTextTrainer.training_step

        def look(self: TextToTextTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.extend(name for name, _ in self.model.named_parameters())
            return step(self, *args, **kwargs)

        monkeypatch.setattr(TextToTextTrainer, "training_step", look)
        train({**recipe, "llm_states": str(tmp_path / "states"), "max_steps": 1})
        assert seen
        assert not [name for name in seen if ".llm." in name]  # with one tokenizer, not even the embedding is needed
        checkpoint = weights(tmp_path / "out" / "checkpoint-1")
        assert not [name for name in checkpoint if ".llm." in name]

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_second_training_uses_the_same_store(self, recipe: dict[str, Any], tmp_path: Path, dtype: str) -> None:
        """The LLM keeps its dtype; the SLM trains in float32, also if it was saved in the same dtype."""
        TextToText.from_pretrained(recipe["model"], dtype=dtype).save_pretrained(tmp_path / "typed")
        recipe["model"] = str(tmp_path / "typed")
        train({**recipe, "max_steps": 1, "output_dir": str(tmp_path / "running")})
        encode(recipe["model"], [recipe["train_data"]], tmp_path / "states")
        recipe["llm_states"] = str(tmp_path / "states")
        train({**recipe, "max_steps": 1})
        second = {**recipe, "model": recipe["output_dir"], "output_dir": str(tmp_path / "second"), "max_steps": 1}
        assert train(second)["steps"] == 1
        for folder in ("running", "out", "second"):
            model = LLM2SLMForConditionalGeneration.from_pretrained(tmp_path / folder)
            assert (str(model.encoder.llm.dtype), model.dtype) == (f"torch.{dtype}", torch.float32)
            assert llm_fingerprint(tmp_path / folder) == llm_fingerprint(recipe["model"])

    def test_activation_checkpointing_changes_no_loss(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        encode(recipe["model"], [recipe["train_data"]], tmp_path / "states")
        recipe = {**recipe, "llm_states": str(tmp_path / "states"), "max_steps": 3, "metric": "loss"}
        kept = train({**recipe, "output_dir": str(tmp_path / "kept")})
        assert losses(train({**recipe, "activation_checkpointing": True})) == pytest.approx(losses(kept), rel=1e-5)

    def test_worker_processes_read_the_same_states(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        encode(recipe["model"], [recipe["train_data"]], tmp_path / "states")
        recipe = {**recipe, "llm_states": str(tmp_path / "states"), "max_steps": 3, "metric": "loss"}
        alone = train({**recipe, "output_dir": str(tmp_path / "alone")})
        workers = {"dataloader_num_workers": 2, "preprocessing_num_workers": 2}
        assert losses(apart(train, {**recipe, **workers})) == losses(alone)

    def test_store_of_other_data_or_another_model_is_refused_before_training(
        self, recipe: dict[str, Any], tmp_path: Path
    ) -> None:
        encode(recipe["model"], [write_pairs(tmp_path / "few.jsonl", PAIRS[:6])], tmp_path / "states")
        recipe["llm_states"] = str(tmp_path / "states")
        with pytest.raises(ValueError, match=r"pairs\.jsonl: row 6 is not in .*states.* There are 2 bad rows: 6, 7\."):
            train(recipe)
        with pytest.raises(ValueError, match="only LLM-to-SLM models take hidden states"):
            train({**recipe, "model": write_checkpoint("slm", tmp_path)})
        with pytest.raises(FileNotFoundError, match="is not a store of hidden states"):
            train({**recipe, "llm_states": str(tmp_path)})
        assert not (tmp_path / "out").exists()


def test_stock_trainer_trains_and_predicts_from_stored_states(recipe: dict[str, Any], tmp_path: Path) -> None:
    encode(recipe["model"], [recipe["train_data"]], tmp_path / "states", EncodeSettings(dtype="float32"))
    store, processor = StateStore(tmp_path / "states"), LLM2SLMProcessor.from_pretrained(recipe["model"])
    features = [dict(processor(text=pair["prompt"], text_target=pair["target"])) for pair in PAIRS]
    outputs, losses = [], []
    for states, model in (
        (None, LLM2SLMForConditionalGeneration.from_pretrained(recipe["model"])),
        (store, load_without_llm(recipe["model"])),
    ):
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path / "out"), max_steps=3, predict_with_generate=True, generation_max_length=6, use_cpu=True,
            report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-3, seed=1,
        )  # fmt: skip
        trainer = Seq2SeqTrainer(
            model, arguments, train_dataset=features, eval_dataset=features, processing_class=processor,
            data_collator=DataCollatorForLLM2SLM(processor, states=states),
        )  # fmt: skip
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        outputs.append(trainer.predict(features).predictions.tolist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert outputs[0] == outputs[1]


class TestAdapters:
    @pytest.mark.parametrize("stored", [False, True])
    def test_saved_model_has_the_adapter_merged_in_and_in_a_folder(
        self, recipe: dict[str, Any], tmp_path: Path, stored: bool
    ) -> None:
        peft = pytest.importorskip("peft")
        if stored:
            encode(recipe["model"], [recipe["train_data"]], tmp_path / "states")
            recipe["llm_states"] = str(tmp_path / "states")
        report = train({**recipe, "lora": {"r": 4, "lora_dropout": 0.0}, "learning_rate": 1e-2})
        assert losses(report)[-1] < losses(report)[0]
        trained = TextToText.from_pretrained(recipe["output_dir"])
        outputs = trained.generate(PROMPTS, max_new_tokens=8)
        base = TextToText.from_pretrained(recipe["model"])
        base.model = peft.PeftModel.from_pretrained(base.model, Path(recipe["output_dir"]) / "adapter").eval()
        assert base.generate(PROMPTS, max_new_tokens=8) == outputs
        changed = moved(recipe["output_dir"], recipe["model"])
        assert not [name for name in changed if ".llm." in name or "wte" in name or "ln_" in name]
        assert [name for name in changed if "c_attn" in name]
        assert report["trained_parameters"] < TextToText.from_pretrained(recipe["model"]).model.num_parameters() / 2

    def test_stopped_run_resumes_from_the_adapter(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        recipe["lora"] = "{r: 4}"
        whole = train({**recipe, "output_dir": str(tmp_path / "whole")})
        with stopped_at(5):
            train(recipe)
        again = train(recipe)
        assert again["resumed_at_step"] == 4
        assert losses(again) == losses(whole)
        same_tensors(weights(recipe["output_dir"]), weights(tmp_path / "whole"))

    def test_model_without_an_llm_is_refused(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not an LLM-to-SLM model"):
            train({**recipe, "model": write_checkpoint("slm", tmp_path), "lora": {}})


@pytest.mark.parametrize(
    "change",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 2},
        {"streaming": True, "max_steps": 12, "shuffle_buffer": 4, "train_sampling_strategy": "group_by_length"},
        {"optimizer": "adafactor", "learning_rate_mapping": {"projector": 1e-2}, "dataloader_num_workers": 1},
    ],
    ids=["grouped", "accumulated", "streamed", "workers"],
)
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    """In the middle of an epoch, between two logs, with dropout."""
    recipe = {
        **recipe, "metric": "loss", "per_device_train_batch_size": 2, "logging_steps": 3, "save_strategy": "steps",
        "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5, **change,
    }  # fmt: skip
    arguments = recipe, str(tmp_path / "whole")
    forks = "dataloader_num_workers" in change
    whole, again = apart(_whole_and_resumed, *arguments) if forks else _whole_and_resumed(*arguments)
    assert again["resumed_at_step"] == 5
    assert losses(again) == losses(whole)
    same_tensors(weights(recipe["output_dir"]), weights(tmp_path / "whole"))


def _whole_and_resumed(recipe: dict[str, Any], folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = train({**recipe, "output_dir": folder})
    with stopped_at(7):
        train(recipe)
    return whole, train(recipe)


def test_learning_rates_of_a_recipe_reach_the_optimizer(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: dict[str, set[float]] = {}
    step = TextToTextTrainer.training_step

    def look(self: TextToTextTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                rates.setdefault(names[id(parameter)].split(".")[1], set()).add(group["initial_lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TextToTextTrainer, "training_step", look)
    train({**recipe, "max_steps": 1, "learning_rate_mapping": {"projector": 0.01}})
    assert rates["projector"] == {0.01}
    assert rates["transformer"] == {3e-3}
    with pytest.raises(ValueError, match="matches no parameter"):
        train({**recipe, "learning_rate_mapping": {"projektor": 0.01}, "resume": False})


BAD_LINES = ['{"prompt": "src1", "target": null}', '{"prompt": "src1"', '{"prompt": "src1", "target": 7}', "[1]"]


def without_dropout(model: str, folder: Path) -> str:
    """Copy a checkpoint, and turn the SLM's dropout off, so that a step does not depend on the order of the rows."""
    copied = Path(shutil.copytree(model, folder / "without_dropout"))
    config = json.loads((copied / "config.json").read_text())
    config["decoder"] |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    (copied / "config.json").write_text(json.dumps(config))
    return str(copied)


class TestBadRows:
    def test_bad_rows_are_reported_by_number_and_skipped_on_request(
        self, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
        lines[2:2] = BAD_LINES
        (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
        recipe = {**recipe, "train_data": str(tmp_path / "bad.jsonl"), "max_steps": 2, "metric": "loss"}
        with pytest.raises(
            ValueError, match=r"target of row 2 is None.* There are 4 bad rows: 2, 3, 4, 5\..*skip_bad_ro"
        ):
            train(recipe)
        whole = train({**recipe, "train_data": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "whole")})
        assert losses(train({**recipe, "skip_bad_rows": True})) == losses(whole)
        assert "4 bad rows were skipped: 2, 3, 4, 5." in caplog.text

    def test_row_numbers_are_those_of_the_file_also_after_skipped_rows(
        self, recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if the first rows that are tokenized have no problem."""
        monkeypatch.setattr(feature_module, "ROWS_AT_ONCE", 2)
        pairs: list[dict[str, Any]] = [{**pair, "other": "src3"} for pair in PAIRS]
        pairs[1:1] = [{"prompt": "src1", "target": None, "other": None}]
        pairs[6:6] = [{"prompt": "src1 " * 70, "target": "src2", "other": "src2"}]
        recipe = {**recipe, "train_data": write_pairs(tmp_path / "bad.jsonl", pairs), "metric": "loss"}
        report = train({**recipe, "target_column": ["target", "other"], "skip_bad_rows": True, "num_train_epochs": 1})
        assert "1 bad row was skipped: 1." in caplog.text
        assert "1 bad row was skipped: 6." in caplog.text
        assert report["steps"] == 4

    @pytest.mark.parametrize("smoothing", [0, 0.1])
    def test_long_prompts_and_long_targets_share_a_batch(
        self, recipe: dict[str, Any], tmp_path: Path, smoothing: float
    ) -> None:
        """A long prompt with a long target, with more padding than max positions."""
        pairs = [{"prompt": "src1 " * 50, "target": "src2"}, {"prompt": "src1", "target": "src2 " * 50}]
        data = write_pairs(tmp_path / "mixed.jsonl", pairs)
        recipe = {**recipe, "train_data": data, "validation_data": data, "metric": "loss", "max_steps": 1}
        recipe |= {"lr_scheduler_type": "constant", "label_smoothing_factor": smoothing}
        recipe |= {"model": without_dropout(recipe["model"], tmp_path), "optim": "sgd", "learning_rate": 1.0}
        together = train(recipe)
        apart = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
        one_by_one = train({**recipe, **apart, "output_dir": str(tmp_path / "apart")})
        assert together["log"][-2]["eval_loss"] == pytest.approx(one_by_one["log"][-2]["eval_loss"], rel=1e-3)

    @pytest.mark.parametrize("kind", ["llm2slm", "slm"])
    def test_rows_beyond_the_max_positions_are_found_before_training(
        self, recipe: dict[str, Any], tmp_path: Path, kind: str
    ) -> None:
        pairs = [PAIRS[0], {"prompt": "src1 " * 40, "target": "src2 " * 40}, *PAIRS[1:]]
        recipe["train_data"] = write_pairs(tmp_path / "long.jsonl", pairs)
        recipe = {**recipe, "model": write_checkpoint(kind, tmp_path / "m"), "max_steps": 1, "metric": "loss"}
        with pytest.raises(
            ValueError, match=r"long\.jsonl: row 1 has 82 tokens, but the (SLM|model) has 64 positions"
        ):
            train(recipe)
        assert not (tmp_path / "out").exists()
        assert train({**recipe, "skip_bad_rows": True})["steps"] == 1


def test_model_learns_from_a_stream(recipe: dict[str, Any]) -> None:
    recipe = {**recipe, "streaming": True, "metric": "loss"}
    with pytest.raises(ValueError, match="max_steps"):
        train(recipe)
    report = apart(_streamed, {**recipe, "max_steps": 20, "learning_rate": 1e-2, "dataloader_num_workers": 1})
    assert losses(report)[-1] < 0.8 * losses(report)[0]


def _streamed(recipe: dict[str, Any]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as context:
        load = feature_module.load_examples
        context.setattr(feature_module, "load_examples", _only(load, recipe["validation_data"]))
        return train(recipe)


def _only(load: Any, source: str) -> Any:
    """Load one source once; refuse any other, which would mean that the training data is indexed."""
    calls: list[str] = []

    def check(data: str, *args: Any, **options: Any) -> Any:
        calls.append(data)
        assert calls == [source], "the training data was indexed"
        return load(data, *args, **options)

    return check


def test_recipe_trains_on_references_and_outputs_of_the_llm(recipe: dict[str, Any], tmp_path: Path) -> None:
    pairs = [{**pair, "llm_output": "src50"} for pair in PAIRS]
    recipe = {**recipe, "train_data": write_pairs(tmp_path / "both.jsonl", pairs), "num_train_epochs": 1}
    assert train({**recipe, "target_column": ["target", "llm_output"]})["steps"] == 4
    recipe = {**recipe, "output_dir": str(tmp_path / "one"), "validation_data": None, "metric": "loss"}
    assert train({**recipe, "target_column": "llm_output"})["steps"] == 2


class TestFusionCache:
    @pytest.fixture
    def cut(self, recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
        """A recipe for an SLM that was cut from a decoder-only LLM; the two share a tokenizer."""
        tokenizer, parts = llm_tokenizer(), {}
        slm = AutoModelForCausalLM.from_config(
            families.SLMS["llama"].config(vocab_size=len(tokenizer), eos_token_id=1)
        )
        slm.config.cut_from_layers = [0, 2]
        for name, model in (("llm", families.build_whole("llama", vocab_size=len(tokenizer))), ("slm", slm)):
            parts[name] = tmp_path / name
            model.save_pretrained(parts[name])
            tokenizer.save_pretrained(parts[name])
        compose(parts["llm"], parts["slm"], tmp_path / "cut", fusion="cache")
        return {**recipe, "model": str(tmp_path / "cut"), "metric": "loss"}

    def test_stored_keys_and_values_train_as_a_running_llm_does(self, cut: dict[str, Any], tmp_path: Path) -> None:
        with_llm = train({**cut, "output_dir": str(tmp_path / "with")})
        encode(cut["model"], [cut["train_data"]], tmp_path / "states", EncodeSettings(dtype="float32"))
        without = train({**cut, "llm_states": str(tmp_path / "states"), "include_llm": False})
        assert losses(without) == pytest.approx(losses(with_llm), rel=1e-4)
        outputs = [
            TextToText.from_pretrained(path).generate(PROMPTS, 3) for path in (tmp_path / "with", tmp_path / "out")
        ]
        assert outputs[0] == outputs[1]
        assert {name.split(".")[0] for name in weights(tmp_path / "out")} == {"decoder"}

    def test_settings_that_cannot_work_are_refused_before_training(self, cut: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match='checkpointing drops the cache that fusion "cache" fills. Leave it out'):
            train({**cut, "activation_checkpointing": True})
        encode(cut["model"], [cut["train_data"]], tmp_path / "states")
        with pytest.raises(ValueError, match="metric: chrf generates outputs, whose first token comes from the LLM"):
            train({**cut, "llm_states": str(tmp_path / "states"), "metric": "chrf"})
