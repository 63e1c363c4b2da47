"""Speed-ups: every stage runs once, also in interrupted runs, and wrong input is found before the first."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import llm2slm
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import DistillSettings, EncodeSettings, SpeedupSettings
from modeling_llm2slm.states.encoding import encode
from modeling_llm2slm.training.distillation import distill
from modeling_llm2slm.training.recipe import load_recipe
from modeling_llm2slm.training.run import train
from modeling_llm2slm.workflows import speedup
from modeling_llm2slm.workflows.speedup import Speedup
from tests.support.checkpoints import WORDS, write_bart, write_checkpoint


pytest.importorskip("modeling_llm2slm.configuration", reason="the recipe is found in an installed package only")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SpeedupSettings:
    folder = tmp_path_factory.mktemp("speedup")
    llm = write_checkpoint("llm", folder)
    prompts = [" ".join(reversed(words)) for words in WORDS] + [" ".join(words) for words in WORDS]
    (folder / "prompts.txt").write_text("\n".join([*prompts, prompts[0]]) + "\n")
    recipe = {"num_train_epochs": 1, "per_device_train_batch_size": 4}
    return SpeedupSettings(
        llm=llm,
        prompts=str(folder / "prompts.txt"),
        slm=str(folder / "gpt2.json"),
        num_beams=1,
        max_new_tokens=5,
        recipe=recipe,
    )


STAGES = ["distill", "build", "encode", "train", "evaluate"]


def test_prompts_become_a_model_and_no_stage_runs_twice(
    settings: SpeedupSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    result = Speedup(settings, tmp_path).run(lambda stage, command: told.append(f"{stage}: {command}"))
    assert [line.partition(":")[0] for line in told] == STAGES
    assert all(f"llm2slm {stage}" in line for stage, line in zip(STAGES, told, strict=True))
    assert TextToText.from_pretrained(tmp_path / "model").model.config.model_type == "llm2slm"
    splits = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in speedup.SPLITS]
    assert [len({row["prompt"] for row in rows}) for rows in splits] == [len(told) + 7 + 1, 1, 1]
    assert not {row["prompt"] for row in splits[0]} & {row["prompt"] for row in splits[2]}
    assert result["prompts"] == len(splits[2])
    for name in ("distill", "build", "encode", "train", "compare"):
        monkeypatch.setattr(speedup, name, None)
    assert Speedup(settings, tmp_path).run() == result


def test_layers_of_a_decoder_only_llm_become_the_slm(
    settings: SpeedupSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**settings.recipe, "prompt_max_length": 24}
    cut = replace(settings, llm=write_checkpoint("slm", tmp_path), slm="cut:1", recipe=recipe)
    told: list[str] = []
    result = Speedup(cut, tmp_path / "out").run(lambda stage, command: told.append(command))
    assert [command.split()[1] for command in told] == ["distill", "convert", "build", "encode", "train", "evaluate"]
    chosen = f"--layers 1 --data {tmp_path}/out/train.jsonl --target-column llm_output --prompt-max-length 24"
    assert told[1] == f"llm2slm convert cut {cut.llm} {tmp_path}/out/slm {chosen}"
    config = TextToText.from_pretrained(tmp_path / "out" / "model").model.config
    assert config.decoder_layers in ([0], [1])
    assert (config.fusion, config.shared_tokenizer) == ("cache", True)
    for name in ("distill", "cut_checkpoint", "build", "encode", "train", "compare"):
        monkeypatch.setattr(speedup, name, None)
    assert Speedup(cut, tmp_path / "out").run() == result
    with pytest.raises(ValueError, match="was started with --slm cut:1"):
        Speedup(replace(cut, slm="cut:0,1"), tmp_path / "out")


@pytest.mark.parametrize(
    ("slm", "message"),
    [
        ("cut:a", "slm is 'cut:a', but a cut names layers of the LLM, or their number"),
        ("cut:²", "slm is 'cut:²', but a cut names layers of the LLM, or their number"),
        (f"cut:{'9' * 5000}", "but a cut names layers of the LLM, or their number"),
        ("cut:9", "`layers` is 9, but it must be 1 to 2"),
        ("cut:1,0", "must name layers from 0 to 1 in ascending order"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused_before_any_work(
    settings: SpeedupSettings, tmp_path: Path, slm: str, message: str
) -> None:
    llm = write_checkpoint("slm", tmp_path)
    with pytest.raises(ValueError, match=message):
        Speedup(replace(settings, llm=llm, slm=slm), tmp_path / "out")
    with pytest.raises(ValueError, match="is an encoder-decoder, and one with fewer layers is a plain model"):
        Speedup(replace(settings, slm="cut:1"), tmp_path / "out")


@pytest.mark.parametrize("stage", ["build", "encode", "train", "compare"])
def test_interrupted_run_resumes(
    settings: SpeedupSettings, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(speedup, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            Speedup(settings, tmp_path).run()
    monkeypatch.setattr(speedup, "distill", None)
    assert Speedup(settings, tmp_path).run()["prompts"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slm": "no/such/model"}, "no/such/model cannot be loaded"),
        ({"llm": "no/such/model"}, "no/such/model cannot be loaded"),
        ({"llm": "t5.json"}, "t5.json is a config; speedup needs a trained LLM: a folder or a name on the Hub"),
        ({"fusion": "ad"}, "fusion"),
        ({"encoder_dtype": "bfloat61"}, "bfloat61.* such as bfloat16"),
        ({"recipe": {"learning_rat": 1}}, "Did you mean learning_rate"),
        ({"recipe": {"prompt_column": "source"}}, "set it with --prompt-column"),
        *(
            ({"recipe": {name: "x"}}, f"{name} is set by the speed-up itself")
            for name in ("model", "output_dir", "train_data", "validation_data", "llm_states")
        ),
    ],
)
def test_wrong_settings_are_refused_before_any_work(
    settings: SpeedupSettings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        Speedup(replace(settings, **change), tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


def test_every_stage_truncates_prompts_alike_and_no_record_holds_a_token(
    settings: SpeedupSettings, tmp_path: Path
) -> None:
    recipe = {**settings.recipe, "prompt_max_length": "2", "hub_token": "hf_secret"}
    Speedup(replace(settings, recipe=recipe), tmp_path).run()
    assert TextToText.from_pretrained(tmp_path / "model").prompt_max_length == 2
    for file in ("speedup.json", "recipe.yaml", "model/training.json", "model/README.md"):
        text = (tmp_path / file).read_text()
        assert "prompt_max_length" in text
        assert "hf_secret" not in text


def test_shown_commands_have_the_settings_of_their_stages(settings: SpeedupSettings, tmp_path: Path) -> None:
    recipe = {**settings.recipe, "prompt_max_length": 4, "skip_bad_rows": True}
    changed = replace(
        settings, slm_tokenizer=settings.llm, prompt_column="source", limit=9, batch_size=5, fusion="replace",
        encoder_dtype="bfloat16", recipe=recipe,
    )  # fmt: skip
    app, given = typer.main.get_command(llm2slm.app), {}
    for stage, (command, _) in Speedup(changed, tmp_path, "cuda").stages().items():
        words = shlex.split(command)
        assert words[:2] == ["llm2slm", stage]
        given[stage] = app.commands[stage].make_context(stage, words[2:]).params  # type: ignore[attr-defined]
    data = {"prompt_max_length": 4, "skip_bad_rows": True, "device": "cuda"}
    generation = {"num_beams": 1, "max_new_tokens": 5}
    expected: dict[str, dict[str, Any]] = {
        "distill": {**data, **generation, "prompt_column": "source", "limit": 9, "batch_size": 5},
        "build": {
            "slm_tokenizer": settings.llm,
            "fusion": "replace",
            "encoder_dtype": "bfloat16",
            "max_new_tokens": 5,
        },
        "encode": {**data, "batch_size": 5, "prompt_column": "prompt"},
        "evaluate": {**data, **generation, "against": settings.llm},
    }
    for stage, options in expected.items():
        assert {name: given[stage][name] for name in options} == options


def test_settings_of_finished_stages_may_not_change(settings: SpeedupSettings, tmp_path: Path) -> None:
    Speedup(settings, tmp_path).distill()
    with pytest.raises(ValueError, match="was started with --num-beams 1. Use the same value, or another --output"):
        Speedup(replace(settings, num_beams=3), tmp_path)
    with pytest.raises(ValueError, match="was started without --prompt-max-length. Use the same value"):
        Speedup(replace(settings, recipe={**settings.recipe, "prompt_max_length": 3}), tmp_path)
    recipe = {**settings.recipe, "learning_rate": 1e-3}
    changed = Speedup(replace(settings, fusion="replace", recipe=recipe), tmp_path)  # nothing was built or trained yet
    changed.distill()
    changed.build()
    with pytest.raises(ValueError, match="was started with --fusion replace. Use the same value"):
        Speedup(settings, tmp_path)
    changed = Speedup(replace(changed.settings, batch_size=2), tmp_path)  # what there is memory for
    changed.encode()
    changed.train()
    with pytest.raises(ValueError, match="was started with --learning-rate 0.001. Use the same value"):
        Speedup(replace(settings, fusion="replace"), tmp_path)
    (tmp_path / "model" / "training.json").unlink()  # as if it had been stopped at its last checkpoint
    with pytest.raises(ValueError, match="was started with --learning-rate 0.001. Use the same value"):
        Speedup(replace(settings, fusion="replace"), tmp_path)
    Speedup(replace(changed.settings, recipe={**recipe, "skip_bad_rows": True}), tmp_path).run()


def test_misspelled_field_is_named_before_changed_settings(settings: SpeedupSettings, tmp_path: Path) -> None:
    Speedup(settings, tmp_path).distill()
    with pytest.raises(ValueError, match="Did you mean num_train_epochs"):
        Speedup(replace(settings, num_beams=3, recipe={"num_train_epochz": 3}), tmp_path)


def test_prompts_beyond_the_max_positions_are_refused_before_any_work(
    settings: SpeedupSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(words) for words in WORDS]
    (tmp_path / "long.txt").write_text("\n".join([*texts[:2], " ".join(texts * 9), *texts[2:]]) + "\n")
    long = replace(settings, prompts=str(tmp_path / "long.txt"))
    with monkeypatch.context() as context:
        context.setattr(speedup, "distill", None)
        with pytest.raises(ValueError, match=r"row 2 is too long: The prompt has .* positions.*skip_bad_rows"):
            Speedup(long, tmp_path / "out").run()
        (tmp_path / "all.txt").write_text(" ".join(texts * 9) + "\n")
        with pytest.raises(ValueError, match="no row can be used; row 0 is too long: The prompt has"):
            Speedup(replace(long, prompts=str(tmp_path / "all.txt")), tmp_path / "out").run()
    for name, fix in (("skipped", {"skip_bad_rows": True}), ("cut", {"prompt_max_length": 8})):
        result = Speedup(replace(long, recipe={**settings.recipe, **fix}), tmp_path / name).run()
        assert result["prompts"] > 0


def test_prompts_beyond_the_max_positions_of_the_llm_are_skipped(
    settings: SpeedupSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm, texts = write_bart(tmp_path / "bart"), [" ".join(words) for words in WORDS]
    prompts = tmp_path / "long.txt"
    prompts.write_text("\n".join([*texts[:2], " ".join(texts * 4), *texts[2:]]) + "\n")
    recipe = {**settings.recipe, "skip_bad_rows": True}
    bart = replace(settings, llm=llm, prompts=str(prompts), recipe=recipe)
    assert Speedup(bart, tmp_path / "out").run()["prompts"] > 0
    assert len((tmp_path / "out" / "distilled.jsonl").read_text().splitlines()) == len(texts)
    distillation = DistillSettings(max_new_tokens=5, num_beams=1)
    with pytest.raises(ValueError, match=r"row 2 is too long: .*the LLM has 64 positions.*skip_bad_rows"):
        distill(llm, prompts, tmp_path / "all.jsonl", distillation)
    both, states = [tmp_path / "out" / "train.jsonl", prompts], tmp_path / "states"
    with pytest.raises(ValueError, match=r"long\.txt: row 2 has a prompt of .* LLM has 64.*skip_bad_rows"):
        encode(tmp_path / "out" / "start", both, states)
    caplog.clear()
    encode(tmp_path / "out" / "start", both, states, EncodeSettings(skip_bad_rows=True))
    assert "long.txt: 1 bad row was skipped: 2." in caplog.text
    with pytest.raises(ValueError, match="output up to 70"):
        distill(llm, prompts, tmp_path / "all.jsonl", replace(distillation, max_new_tokens=70))


def test_changed_prompts_need_another_folder(settings: SpeedupSettings, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(Path(settings.prompts).read_text())
    own = replace(settings, prompts=str(prompts))
    Speedup(own, tmp_path / "out").distill()
    Speedup(own, tmp_path / "out")
    with prompts.open("a") as file:
        file.write("src1\n")
    with pytest.raises(ValueError, match=r"prompts.txt has changed since .*out was started.*--output"):
        Speedup(own, tmp_path / "out")


def test_truncated_record_is_named(settings: SpeedupSettings, tmp_path: Path) -> None:
    (tmp_path / "speedup.json").write_text('{"llm": ')
    with pytest.raises(ValueError, match=r"speedup.json is truncated or corrupted .*--output"):
        Speedup(settings, tmp_path)


def test_changed_llm_needs_another_folder(settings: SpeedupSettings, tmp_path: Path) -> None:
    shutil.copytree(settings.llm, tmp_path / "llm")
    own = replace(settings, llm=str(tmp_path / "llm"))
    Speedup(own, tmp_path / "out").distill()
    Speedup(own, tmp_path / "out")
    model = AutoModelForSeq2SeqLM.from_pretrained(own.llm)
    model.lm_head.weight.data += 1
    model.save_pretrained(own.llm)
    with pytest.raises(ValueError, match=r"llm has changed since .*out was started.*--output"):
        Speedup(own, tmp_path / "out")


def test_max_new_tokens_is_saved_with_the_model(settings: SpeedupSettings, tmp_path: Path) -> None:
    Speedup(settings, tmp_path).build()
    assert TextToText.from_pretrained(tmp_path / "start").with_limit({}) == {"max_new_tokens": 5}


def test_references_of_some_prompts_are_ignored(settings: SpeedupSettings, tmp_path: Path) -> None:
    rows = [{"prompt": " ".join(words), "target": None if len(words) % 2 else "x"} for words in WORDS]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = Speedup(replace(settings, prompts=str(tmp_path / "some.jsonl")), tmp_path / "out").run()
    assert result["agreement"]


def test_two_different_prompts_are_too_few_to_split(settings: SpeedupSettings, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("src1\nsrc2\nsrc1\n")
    with pytest.raises(ValueError, match="has 2 different prompts"):
        Speedup(replace(settings, prompts=str(tmp_path / "two.txt")), tmp_path / "out").distill()


def test_results_of_another_program_are_refused(settings: SpeedupSettings, tmp_path: Path) -> None:
    for name in ("train.jsonl", "start"):
        folder = tmp_path / name.partition(".")[0]
        (folder / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=rf"{folder} has {name}, which no speed-up wrote .*--output"):
            Speedup(settings, folder)


def test_settings_stay_fixed_when_the_distilled_file_is_removed(settings: SpeedupSettings, tmp_path: Path) -> None:
    Speedup(settings, tmp_path / "built").build()
    Speedup(replace(settings, num_beams=2), tmp_path / "built")
    with pytest.raises(ValueError, match="was started with --max-new-tokens 5. Use the same value"):
        Speedup(replace(settings, max_new_tokens=2), tmp_path / "built")
    Speedup(settings, tmp_path / "split").distill()
    (tmp_path / "split" / "distilled.jsonl").unlink()
    with pytest.raises(ValueError, match="was started with --num-beams 1. Use the same value, or another --output"):
        Speedup(replace(settings, num_beams=2), tmp_path / "split")


def test_settings_may_change_before_the_first_output(
    settings: SpeedupSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(speedup, "distill", stop)
        with pytest.raises(KeyboardInterrupt):
            Speedup(settings, tmp_path).run()
    assert (tmp_path / "speedup.json").is_file()  # what is made from now on is its own
    Speedup(replace(settings, num_beams=2), tmp_path).distill()
    with pytest.raises(ValueError, match="was started with --num-beams 2. Use the same value"):
        Speedup(settings, tmp_path)


def test_retrained_model_is_evaluated_again(settings: SpeedupSettings, tmp_path: Path) -> None:
    Speedup(settings, tmp_path).run()
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text("{}")
    assert Speedup(settings, tmp_path).run() == {}
    train(load_recipe(str(tmp_path / "recipe.yaml"), {"resume": False}))
    assert Speedup(settings, tmp_path).run()["prompts"] > 0


def test_config_file_gets_the_special_tokens_of_its_tokenizer(settings: SpeedupSettings, tmp_path: Path) -> None:
    config = json.loads(Path(settings.slm).read_text())
    own = {name: value for name, value in config.items() if not name.endswith("_token_id")}
    (tmp_path / "slm.json").write_text(json.dumps(own))
    made = Speedup(replace(settings, slm=str(tmp_path / "slm.json")), tmp_path / "out").config
    assert made.decoder.eos_token_id == AutoTokenizer.from_pretrained(settings.llm).eos_token_id
    (tmp_path / "slm.json").write_text(json.dumps({**own, "vocab_size": 3}))
    with pytest.raises(ValueError, match="Set vocab_size"):
        Speedup(replace(settings, slm=str(tmp_path / "slm.json")), tmp_path / "out")


def test_lone_surrogate_in_another_column_is_kept(settings: SpeedupSettings, tmp_path: Path) -> None:
    rows = [{"prompt": " ".join(words), "note": "\ud83d"} for words in WORDS]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Speedup(replace(settings, prompts=str(tmp_path / "cut.jsonl")), tmp_path / "out").distill()
    split = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").open()]
    assert {row["note"] for row in split} == {"\ud83d"}
