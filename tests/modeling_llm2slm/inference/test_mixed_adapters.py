"""A batch whose prompts have different adapters gives each the output of its adapter alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, ia3_config, lora_config
from tests.support.common import (
    FUSIONS,
    PROMPTS,
    build_model,
    pad_prompts,
    strip_padding,
    t5_config,
    with_random_adapters,
)


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NAMES = ["two", "__base__", "one"]


def with_adapters(model: LLM2SLMForConditionalGeneration, **options: Any) -> Any:
    """The model with the adapters "one" and "two", all of whose weights are random."""
    adapted = peft.get_peft_model(model, lora_config(model, r=2, **options), adapter_name="one")
    adapted.add_adapter("two", lora_config(model, r=4, **options))
    return with_random_adapters(adapted)


def t5_slm() -> LLM2SLMForConditionalGeneration:
    torch.manual_seed(0)
    config = LLM2SLMConfig(encoder=t5_config(), decoder=t5_config(initializer_factor=3.0))
    return LLM2SLMForConditionalGeneration(config).eval()


def alone(adapted: Any, name: str, prompt: list[int], **kwargs: Any) -> list[list[int]]:
    """What one adapter generates for one prompt."""
    with adapted.disable_adapter() if name == "__base__" else torch.no_grad():
        if name != "__base__":
            adapted.set_adapter(name)
        return strip_padding(adapted.generate(input_ids=torch.tensor([prompt]), **kwargs))


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
WAYS = {
    "greedy": GREEDY,
    "beams": {**GREEDY, "num_beams": 3},
    "several beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "static": {**GREEDY, "cache_implementation": "static"},
    "beams of a static cache": {**GREEDY, "num_beams": 2, "cache_implementation": "static"},
    "beams of a generation config": {"generation_config": GenerationConfig(**GREEDY, num_beams=3)},
    "no cache": {**GREEDY, "use_cache": False, "num_beams": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("fusion", ["replace", "add"])
def test_each_prompt_has_the_output_of_its_adapter_alone(fusion: str, dora: bool, way: str) -> None:
    adapted = with_adapters(build_model(fusion), use_dora=dora)
    expected = [alone(adapted, *row, **WAYS[way]) for row in zip(NAMES, PROMPTS, strict=True)]
    mixed = strip_padding(adapted.generate(**pad_prompts(PROMPTS), adapter_names=NAMES, **WAYS[way]))
    assert mixed == [output for outputs in expected for output in outputs]
    others = [strip_padding(adapted.generate(**pad_prompts(PROMPTS), **WAYS[way]))]
    assert mixed not in others


@pytest.mark.parametrize("way", [way for way in WAYS if "config" not in way])
def test_the_encoder_of_an_slm_is_adapted_too(way: str) -> None:
    adapted = with_adapters(t5_slm()).double()  # large random weights amplify rounding
    expected = [adapted_logits(adapted, name, prompt) for name, prompt in zip(NAMES, PROMPTS, strict=True)]
    options = {**WAYS[way], "return_dict_in_generate": True, "output_logits": True, "num_return_sequences": 1}
    mixed = adapted.generate(**pad_prompts(PROMPTS), adapter_names=NAMES, **options)
    first = mixed.logits[0][:: options.get("num_beams", 1)]
    torch.testing.assert_close(first.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert mixed.sequences.shape[0] == len(PROMPTS)


def adapted_logits(adapted: Any, name: str, prompt: list[int]) -> torch.Tensor:
    """The logits of one adapter after the start token."""
    with adapted.disable_adapter() if name == "__base__" else torch.no_grad():
        if name != "__base__":
            adapted.set_adapter(name)
        batch = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0]])}
        return adapted(**batch).logits[0, 0].detach()


def test_samples_of_a_prompt_share_its_adapter() -> None:
    """With a temperature near zero, every sample is the greedy output."""
    adapted = with_adapters(build_model("add"))
    sampling = {"do_sample": True, "temperature": 1e-4, "max_new_tokens": 8}
    greedy = strip_padding(adapted.generate(**pad_prompts(PROMPTS), adapter_names=NAMES, **GREEDY))
    for more in ({"num_return_sequences": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        torch.manual_seed(0)
        samples = strip_padding(adapted.generate(**pad_prompts(PROMPTS), adapter_names=NAMES, **{**sampling, **more}))
        if "num_beams" not in more:
            assert samples == [output for output in greedy for _ in range(3)]
        assert len(samples) == len(PROMPTS) * more["num_return_sequences"]


@pytest.mark.parametrize("kind", ["encode_prompt", "encode_llm"])
def test_a_prompt_may_be_given_encoded(kind: str) -> None:
    adapted, batch = with_adapters(build_model("replace"), modules_to_save=None), pad_prompts(PROMPTS)
    expected = adapted.generate(**batch, adapter_names=NAMES, num_beams=2, **GREEDY)
    if kind == "encode_llm":
        given = {"llm_hidden_states": adapted.encode_llm(**batch), "attention_mask": batch["attention_mask"]}
    else:
        given = {"encoder_outputs": adapted.encode_prompt(**batch)}
    assert torch.equal(adapted.generate(**given, adapter_names=NAMES, num_beams=2, **GREEDY), expected)


def test_prompt_lookup_drafts_with_the_adapter_of_its_prompt() -> None:
    adapted = with_adapters(build_model("add_shared"))
    for name, prompt in zip(NAMES, PROMPTS, strict=True):
        batch = {"input_ids": torch.tensor([prompt]), "adapter_names": [name]}
        expected = adapted.generate(**batch, **GREEDY)
        assert torch.equal(adapted.generate(**batch, prompt_lookup_num_tokens=3, **GREEDY), expected)


def test_what_cannot_be_mixed_is_refused_before_any_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = with_adapters(build_model("add"), modules_to_save=["projector"])
    unequal = with_adapters(build_model("replace"))
    unequal.add_adapter("three", lora_config(unequal.base_model.model, modules_to_save=None))
    good = with_adapters(build_model("add"))
    cases = [
        (whole, NAMES, "Name its linear layers in `modules_to_save`"),
        (unequal, ["one", "two", "three"], "'three' cannot be mixed .* same `modules_to_save`"),
        (good, ["one", "two"], "`adapter_names` has 2 names for 3 prompts"),
        (good, ["one"] * 6, "`adapter_names` has 6 names for 3 prompts"),
    ]
    for adapted, names, message in cases:
        expected = adapted.generate(**pad_prompts(PROMPTS), **GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(adapted.base_model.model.encoder, "run_llm", forbidden)
            with pytest.raises(ValueError, match=message):
                adapted.generate(**pad_prompts(PROMPTS), adapter_names=names, **GREEDY)
        assert torch.equal(adapted.generate(**pad_prompts(PROMPTS), **GREEDY), expected)


def test_other_methods_cannot_mix() -> None:
    model = build_model("add")
    adapted = peft.get_peft_model(model, ia3_config(model), adapter_name="one").eval()
    with pytest.raises(ValueError, match="Only LoRA and DoRA adapters can be mixed"):
        adapted.generate(**pad_prompts(PROMPTS), adapter_names=["one"] * 3, **GREEDY)
    adapted.generate(**pad_prompts(PROMPTS), **GREEDY)


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the LLM ran")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nothing_stays_behind(fusion: str) -> None:
    adapted = with_adapters(build_model(fusion), use_dora=True)
    adapted.generate(**pad_prompts(PROMPTS), adapter_names=NAMES, num_beams=2, **GREEDY)
    assert not [module for module in adapted.modules() if module._forward_pre_hooks]
    flags = [module.use_dora for module in adapted.modules() if hasattr(module, "use_dora")]
    assert flags
    assert all(one == {"one": True, "two": True} for one in flags)
