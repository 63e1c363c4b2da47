"""Settings check their bounds and choices when they are created, and name the field."""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, fields
from typing import Any

import pytest

from modeling_llm2slm import settings
from modeling_llm2slm.settings import (
    BuildSettings,
    DecodingSettings,
    EncodeSettings,
    GenerateFileSettings,
    LoadSettings,
    PlanSettings,
    SamplingSettings,
    ServeSettings,
    Settings,
)


ALL = [
    value
    for value in vars(settings).values()
    if isinstance(value, type) and issubclass(value, Settings) and value is not Settings
]


def required(settings_class: Any) -> dict[str, str]:
    """Return a value for each setting without a default; all of them are texts."""
    without_default = (each.name for each in fields(settings_class) if each.default is each.default_factory is MISSING)
    return dict.fromkeys(without_default, "text")


@pytest.mark.parametrize(
    ("settings_class", "values", "message"),
    [
        (DecodingSettings, {"num_beams": 0}, "num_beams is 0, but it must be at least 1"),
        (BuildSettings, {"target_max_length": 1}, "target_max_length is 1, but it must be at least 2"),
        (ServeSettings, {"timeout": 0}, "timeout is 0, but it must be at least 0.1"),
        (PlanSettings, {"epochs": 0}, "epochs is 0, but it must be above 0"),
        (SamplingSettings, {"sample": True, "top_p": 1.1}, "top_p is 1.1, but it must be at most 1"),
        (SamplingSettings, {"sample": True, "temperature": 0}, "temperature is 0, but it must be at least 0.001"),
        (LoadSettings, {"quantize": "int4"}, "quantize is 'int4', but it must be one of: int8, nf4"),
        (EncodeSettings, {"dtype": "int8"}, "dtype is 'int8', but it must be one of: bfloat16, float16, float32"),
    ],
)
def test_a_value_outside_its_bounds_or_choices_is_an_error(
    settings_class: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings_class(**values)


@pytest.mark.parametrize(
    ("settings_class", "name"),
    [
        (settings_class, setting.name)
        for settings_class in ALL
        for setting in fields(settings_class)
        if {"minimum", "maximum", "above"} & setting.metadata.keys()
    ],
)
def test_nan_is_outside_every_bound(settings_class: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is nan, but it must be"):
        settings_class(**required(settings_class) | {name: float("nan")})


@pytest.mark.parametrize("settings_class", ALL)
def test_defaults_are_valid_and_every_setting_has_a_help_text(settings_class: Any) -> None:
    created = settings_class(**required(settings_class))
    assert all(setting.metadata["help"] for setting in fields(settings_class))
    with pytest.raises(FrozenInstanceError):
        setattr(created, fields(settings_class)[0].name, None)


def test_bounds_are_inclusive_and_none_means_unset() -> None:
    limits = SamplingSettings(sample=True, top_p=1.0, num_beams=1, max_new_tokens=None)
    assert limits.generate_kwargs() == {"num_beams": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    assert DecodingSettings(max_new_tokens=5).generate_kwargs() == {
        "max_new_tokens": 5, "num_beams": 1, "do_sample": False,
    }  # fmt: skip


def test_sampling_options_need_sampling() -> None:
    with pytest.raises(ValueError, match="temperature and top_p need sampling"):
        GenerateFileSettings(temperature=0.5)
