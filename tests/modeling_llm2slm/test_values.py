"""Every field of every schema takes a value, which is then used, or refuses it in one sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging

from modeling_llm2slm import settings as declared
from modeling_llm2slm.benchmark.cells import Cell
from modeling_llm2slm.serving.schema import (
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    Limits,
    RequestError,
    is_neutral,
    parse_request,
)
from modeling_llm2slm.settings import GenerateArguments, Settings, check_generate_arguments, has_type, shown
from modeling_llm2slm.training.recipe import Recipe, parse_recipe, recipe_fields
from tests.modeling_llm2slm.test_settings import ALL, required
from tests.support.values import ANY, PLAIN


NEEDED = {"model": "m", "train_data": "d.jsonl", "output_dir": "o"}
LIMITS = Limits("tiny", max_tokens=70, max_prompts=64)
VALID: dict[Any, dict[str, Any]] = {
    CompletionRequest: {"prompt": "a"}, ChatRequest: {"messages": [{"role": "user", "content": "a"}]},
}  # fmt: skip
SECONDS = 5


def cases(number: int) -> Any:
    """The settings of a property test: the same cases each time, and no search for smaller ones."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=checks,
    )  # fmt: skip


def outcome(use: Callable[[], Any], name: str) -> Any:
    """What a call returns, or `None` if it refuses a value in one short sentence that names the field."""
    start = time.perf_counter()
    try:
        return use()
    except ValueError as error:
        message = str(error)
        assert name in message, message
        assert "\n" not in message, message
        assert len(message) < 1000, message
        assert message.endswith((".", "?")), message
    finally:
        assert time.perf_counter() - start < SECONDS
    return None


@pytest.mark.parametrize(("kind", "name"), [(kind, setting.name) for kind in [*ALL, Cell] for setting in fields(kind)])
@cases(30)
@given(value=ANY)
def test_every_setting(kind: type[Settings], name: str, value: Any) -> None:
    sampling = {"sample": True} if kind.__name__ in ("SamplingSettings", "GenerateFileSettings") else {}
    made = outcome(lambda: kind(**{**required(kind), **sampling, name: value}), name)
    if made is not None:
        kept = getattr(made, name)
        assert kept == (str(value) if hasattr(value, "__fspath__") else value)
        assert has_type(kept, get_type_hints(kind)[name])
        assert isinstance(kept, bool) == isinstance(value, bool)


@pytest.mark.parametrize("name", [field.name for field in (*recipe_fields(), *recipe_fields(trainer=True))])
@cases(20)
@given(value=ANY)
def test_every_field_of_a_recipe(name: str, value: Any) -> None:
    transformers_logging.set_verbosity_error()  # some values are deprecated there
    made = outcome(lambda: parse_recipe({**NEEDED, name: value}), name)
    if made is not None and value is not None:
        kept = getattr(made[0] if name in Recipe.model_fields else made[1], name)
        assert is_used(value, kept) or name == "dataloader_pin_memory"  # without effect on a CPU


def is_used(value: Any, kept: Any) -> bool:
    """Whether a field holds the value: as it was given, or what a text says."""
    if isinstance(value, bool | int | float) and isinstance(kept, bool | int | float):
        return type(kept)(value) == kept
    return kept is not None or value in ("", "none", "None")


@pytest.mark.parametrize("field", ["lora", "generation"])
@cases(300)
@given(data=st.data())
def test_every_option_within_a_recipe(field: str, data: st.DataObject) -> None:
    from peft import LoraConfig

    kind = LoraConfig if field == "lora" else GenerateArguments
    name = data.draw(st.sampled_from([option.name for option in fields(kind)]))
    value = data.draw(ANY)
    given_options = {name: value} if field == "lora" else {"do_sample": True, name: value}
    made = outcome(lambda: parse_recipe({**NEEDED, field: given_options}), field)
    if made is not None and value is not None:
        assert is_used(value, getattr(made[0], field)[name])


@cases(500)
@given(name=st.sampled_from([field.name for field in fields(GenerateArguments)]), value=ANY)
def test_every_argument_of_generate(name: str, value: Any) -> None:
    outcome(lambda: check_generate_arguments({name: value}), name)


def parse_field(kind: Any, name: str, value: Any) -> Any:
    """Return the value of a field of a body, and the request with it or its error; None if JSON has no such value."""
    try:
        body = json.dumps({**VALID[kind], name: value}).encode()
    except (ValueError, RecursionError):  # Python writes no such JSON
        return None
    try:
        result: Any = parse_request(body, LIMITS, kind)
    except RequestError as error:
        result = error
    if isinstance(result, RequestError):
        assert result.status_code in (400, 404)
        assert "\n" not in result.detail
        assert len(result.detail) < 1000
        return value, result
    result.decoding(20, 1)
    assert len(result.prompts) * result.samples <= 64
    return json.loads(body)[name], result


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in (CompletionRequest, ChatRequest) for name in kind.model_fields]
)
@cases(60)
@given(value=PLAIN)
def test_every_field_of_a_request(kind: Any, name: str, value: Any) -> None:
    value, result = parse_field(kind, name, value) or (None, None)
    if isinstance(result, kind):
        kept = getattr(result, name)
        assert value is None or kept in (value, [value]) or name in ("stream_options", "messages")


@pytest.mark.parametrize("name", NEUTRAL)
@cases(20)
@given(value=PLAIN)
def test_every_field_that_only_neutral_values_may_have(name: str, value: Any) -> None:
    kind = CompletionRequest if name not in CompletionRequest.model_fields else ChatRequest
    given_value, result = parse_field(kind, name, value) or (None, None)
    if result is not None and name not in kind.model_fields:
        assert isinstance(result, kind) == is_neutral(name, given_value)
    for neutral in NEUTRAL[name] or ():
        assert isinstance(parse_field(CompletionRequest, name, neutral)[1], CompletionRequest) or name == "logprobs"


@cases(300)
@given(body=st.binary(max_size=200) | st.text(alphabet='{}[]":,0123456789eE-.ntf', max_size=100).map(str.encode))
def test_every_body_of_a_request(body: bytes) -> None:
    with pytest.raises(RequestError) as error:
        parse_request(body, LIMITS, CompletionRequest)
    assert error.value.status_code == 400


@cases(300)
@given(value=ANY)
def test_every_value_is_shown_in_few_words(value: Any) -> None:
    assert len(shown(value)) < 300


def test_every_class_of_settings_declares_types_that_are_checked() -> None:
    for kind in [*ALL, Cell]:
        for setting, hint in declared.types_of(kind).items():
            assert not has_type(object(), hint), f"{kind.__name__}.{setting.name} takes anything"
