"""Graphs of the model: compiled decoding, exported parts, parts on different devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from tests.support import families
from tests.support.common import (
    END,
    PROMPTS,
    build_family,
    compose,
    make_labels,
    pad_prompts,
    shared_family,
    strip_padding,
)


PROMPT_LENGTHS = (5, 9, 17, 30)
# Gemma's sliding layers count their first steps in a Python number, with which transformers compiles three graphs, for
# the bare Gemma as well.
GRAPHS = {slm: 3 if slm == "gemma3" else 1 for slm in families.SLMS if slm not in families.NO_STATIC_CACHE}
PARAMETERS = [slm if slm == "gpt2" else pytest.param(slm, marks=pytest.mark.slow) for slm in GRAPHS]
KINDS = ("gpt2", "llama", "t5")


def compiled(slm: str, backend: str) -> dict[str, Any]:
    """Arguments of `generate()` for decoding in one graph, also on a CPU; an encoder-decoder's with dynamic shapes."""
    dynamic = True if families.SLMS[slm].config().is_encoder_decoder else None
    config = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=dynamic)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config, "max_cache_len": 63}


def check_one_graph(slm: str, backend: str, *sharing: str) -> None:
    """Compiled generation gives the eager outputs, from as many graphs as `GRAPHS` says, for prompts of any length."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, graphs = build_family(slm, *sharing).model, []
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    for length in PROMPT_LENGTHS:
        ids = torch.arange(3, 3 + length)[None]
        sequence = model.generate(ids, **kwargs, **compiled(slm, backend))
        assert sequence.tolist() == model.generate(ids, **kwargs).tolist()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [GRAPHS[slm]] * len(PROMPT_LENGTHS)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("slm", PARAMETERS)
def test_one_graph_serves_prompts_of_all_lengths(slm: str) -> None:
    check_one_graph(slm, "eager")


@pytest.mark.parametrize("slm", ["llama", *[pytest.param(slm, marks=pytest.mark.slow) for slm in ("gemma3", "gpt2")]])
def test_one_graph_serves_all_prompts_of_fusion_cache(slm: str) -> None:
    check_one_graph(slm, "eager", slm, "cache")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("slm", KINDS)
def test_compiled_and_eager_generation_agree(slm: str) -> None:
    check_one_graph(slm, "inductor")


TRAINED = [("gpt2", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("t5", True), ("t5", False)])]


def build_trained(slm: str, freeze_llm: bool) -> LLM2SLMForConditionalGeneration:
    return compose(families.build_llm("t5"), families.build_slm(slm), "add", freeze_llm=freeze_llm).model


@pytest.mark.parametrize(("slm", "freeze_llm"), TRAINED)
def test_a_shorter_output_is_not_compiled_again(slm: str, freeze_llm: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build_trained(slm, freeze_llm).eval()
    for length in (8, 5, 3):
        kwargs = {**pad_prompts(PROMPTS), "max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        assert model.generate(**kwargs, **compiled(slm, "eager")).tolist() == model.generate(**kwargs).tolist()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("freeze_llm", [True, False])
@pytest.mark.parametrize("slm", KINDS)
def test_a_training_step_is_one_graph(slm: str, freeze_llm: bool) -> None:
    """Compiled without a break, it gives the gradients of the eager step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, gradients = build_trained(slm, freeze_llm).eval(), []  # no dropout
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        gradients.append(torch.autograd.grad(step(**pad_prompts(PROMPTS), labels=make_labels()).loss, weights))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("slm", PARAMETERS)
def test_compiled_beams_and_padding(slm: str) -> None:
    torch._dynamo.reset()
    model = shared_family(slm).model
    for side in ("left", "right"):
        batch, kwargs = pad_prompts(PROMPTS, side), {"num_beams": 2, "max_new_tokens": 6, "do_sample": False}
        sequence = model.generate(**batch, **kwargs, **compiled(slm, "eager"))
        assert sequence.tolist() == model.generate(**batch, **kwargs).tolist()


@pytest.mark.parametrize("slm", ["gpt2", pytest.param("llama", marks=pytest.mark.slow), "t5"])
def test_the_parts_can_be_exported(slm: str) -> None:
    """`torch.export` takes the encoder and a forward over the output, for prompts of any length."""
    parts = build_family(slm)
    model = parts.model.eval()
    batch = pad_prompts(PROMPTS, "left")
    length = torch.export.Dim("length", min=2, max=40)
    names = ("input_ids", "attention_mask")
    shapes = {name: {1: length} for name in names}
    with torch.no_grad():
        encoder = torch.export.export(model.get_encoder(), (), batch, dynamic_shapes=shapes, strict=False)
        states = encoder.module()(**pad_prompts(PROMPTS, "left", extra=3))
        wanted = model.encode_prompt(**pad_prompts(PROMPTS, "left", extra=3))
        torch.testing.assert_close(states.last_hidden_state, wanted.last_hidden_state)
        assert torch.equal(states.attention_mask, wanted.attention_mask)

        sequence = {"decoder_input_ids": torch.tensor([[END, 5, 6, 7]] * len(PROMPTS)), "use_cache": False}
        whole = torch.export.export(model, (), {**batch, **sequence}, strict=False)
        torch.testing.assert_close(whole.module()(**batch, **sequence).logits, model(**batch, **sequence).logits)
        projector = torch.export.export(model.encoder.projector, (model.encode_llm(**batch),))
        assert projector is not None


@pytest.mark.parametrize("slm", KINDS)
@pytest.mark.parametrize("fusion", ["add", "add_shared"])
def test_the_llm_on_another_device(slm: str, fusion: str, tmp_path: Path) -> None:
    """A device map takes the LLM from the disk while the SLM is in memory, and the other way round."""
    model = build_family(slm, fusion=fusion).model
    model.save_pretrained(tmp_path / "model")
    batch, kwargs = pad_prompts(PROMPTS), {"max_new_tokens": 8, "num_beams": 2, "do_sample": False}
    wanted = strip_padding(model.generate(**batch, **kwargs))
    rest = {"encoder.projector": "cpu"} | ({"encoder.prompt_embedding": "cpu"} if fusion == "add" else {})
    for llm, small in (("disk", "cpu"), ("cpu", "disk")):
        loaded = LLM2SLMForConditionalGeneration.from_pretrained(
            tmp_path / "model",
            device_map={"encoder.llm": llm, "decoder": small, **rest},
            offload_folder=str(tmp_path / f"offload-{llm}"),
        )
        on_disk = loaded.encoder.llm if llm == "disk" else loaded.decoder
        assert {weight.device.type for weight in on_disk.parameters()} == {"meta"}
        assert strip_padding(loaded.generate(**batch, **kwargs)) == wanted
