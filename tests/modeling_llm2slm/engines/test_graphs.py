"""The modules that become graphs compute what the model computes, before they are traced."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from modeling_llm2slm.engines.graphs import embedding_table, graphs_of
from tests.support.common import PROMPTS, pad_prompts
from tests.support.exports import KINDS, learned


@pytest.mark.parametrize(("slm", "fusion"), KINDS)
def test_graphs_give_the_logits_of_the_model(slm: str, fusion: str) -> None:
    model, output = learned(slm, fusion), torch.tensor([[1, 5, 9]])
    inputs = pad_prompts(PROMPTS[:1])
    graphs, table = graphs_of(model), embedding_table(model.decoder, torch.float32)
    if fusion == "add_shared":
        inputs["inputs_embeds"] = table[inputs["input_ids"]]
    prompt, mask = graphs["prompt"](**inputs)["last_hidden_state"], inputs["attention_mask"]
    if "cross" in graphs:
        more = {"inputs_embeds": table[output], "attention_mask": mask, **graphs["cross"](prompt)}
    else:
        embeds = torch.cat([prompt, table[output]], dim=1)
        width = embeds.shape[1]
        more = {"inputs_embeds": embeds, "attention_mask": torch.ones(1, width).long()}
        more["position_ids"] = torch.arange(width)[None]
    found = graphs["step"](**more, past_key_values=DynamicCache())["logits"]
    inputs.pop("inputs_embeds", None)
    expected = model(**inputs, decoder_input_ids=output).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
