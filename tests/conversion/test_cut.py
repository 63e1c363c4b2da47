"""Cut models: the chosen layers, unchanged, in every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MT5Config,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    SmolLM3Config,
    T5Config,
    UMT5Config,
)

from modeling_llm2slm.conversion.cut import cut, cut_checkpoint
from modeling_llm2slm.conversion.layers import choose_layers, find_layers, skipping
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import CorpusSettings
from tests.support.checkpoints import PAIRS, write_checkpoint, write_pairs
from tests.support.common import slm_tokenizer
from tests.support.conversions import same_bytes, weights_of
from tests.support.families import BART, GPT, GROUPED, PAD, ROTARY, T5, move_vectors, t5gemma_config


LAYERS = 6
OPT: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 16}
LOCAL = ["sliding_attention"] * 2 + ["full_attention"]
SIX = {"num_hidden_layers": LAYERS}
DECODER = {"num_layers": LAYERS, "num_decoder_layers": LAYERS, "pad_token_id": PAD, "decoder_start_token_id": PAD}
BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
}
GPT2: dict[str, Any] = {**GPT, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2_scaled": lambda: GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt_neo": lambda: GPTNeoConfig(**GPT, hidden_size=32, num_layers=LAYERS, num_heads=4, window_size=4,
        max_position_embeddings=64, attention_types=[[["global", "local", "local"], 2]]),
    "gpt_neox": lambda: GPTNeoXConfig(**{**GPT, **ROTARY, **SIX}),
    "opt": lambda: OPTConfig(**{**GPT, **OPT, **SIX}, max_position_embeddings=64, pad_token_id=1),
    "llama": lambda: LlamaConfig(**{**GPT, **GROUPED, **SIX}),
    "qwen3": lambda: Qwen3Config(**{**GPT, **GROUPED, **SIX}, tie_word_embeddings=True, use_sliding_window=True,
        sliding_window=4, max_window_layers=3),
    "smollm3": lambda: SmolLM3Config(**{**GPT, **GROUPED, **SIX}, pad_token_id=1),
    "gemma3": lambda: Gemma3TextConfig(**{**GPT, **GROUPED, **SIX}, sliding_window=4, layer_types=LOCAL * 2,
        rope_parameters=BASES, query_pre_attn_scalar=8),
    "t5": lambda: T5Config(**GPT, **T5, **DECODER),
    "flan_t5": lambda: T5Config(**GPT, **T5, **DECODER, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "mt5": lambda: MT5Config(**GPT, **T5, **DECODER),
    "umt5": lambda: UMT5Config(**GPT, **T5, **DECODER),
    "t5gemma": lambda: t5gemma_config(99, **SIX, layer_types=LOCAL * 2),
    "bart": lambda: BartConfig(**GPT, **BART, encoder_layers=1, decoder_layers=LAYERS, pad_token_id=1,
        decoder_start_token_id=2),
}  # fmt: skip
IDS = torch.arange(2, 34)[None]


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return move_vectors(auto_class.from_config(config).eval())


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def without(llm: PreTrainedModel, layers: list[int]) -> torch.Tensor:
    """The logits of an LLM whose other layers add nothing to the residual stream."""
    if llm.config.model_type == "bart":  # a norm after each layer changes what passes through it
        with skipping(llm, layers):
            return logits(llm)
    stack = llm.get_decoder()
    blocks = next(child for child in stack.children() if isinstance(child, torch.nn.ModuleList))
    for place, block in enumerate(blocks):
        if place not in layers:
            for module in block.modules():
                if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
                    torch.nn.init.zeros_(module.weight)
                    if module.bias is not None:
                        torch.nn.init.zeros_(module.bias)
    return logits(llm)


@pytest.mark.parametrize("family", CONFIGS)
def test_all_layers_are_the_llm(family):
    llm = build(family)
    torch.testing.assert_close(logits(cut(llm, LAYERS)), logits(llm))


@pytest.mark.parametrize("layers", [[0, 2, 5], [1, 4]])
@pytest.mark.parametrize("family", CONFIGS)
def test_chosen_layers_compute_as_in_the_llm(family, layers, tmp_path):
    llm = build(family)
    before = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    model = cut(llm, layers)
    same_bytes(dict(llm.state_dict()), before)
    assert model.config.cut_from_layers == layers
    assert not {tensor.data_ptr() for tensor in model.parameters()} & {
        tensor.data_ptr() for tensor in llm.parameters()
    }
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.cut_from_layers == layers
    assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(model), without(llm, layers), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "gpt2_scaled", "t5"])
def test_a_cut_model_generates_with_a_cache_as_without(family):
    model = cut(build(family), [1, 2, 5])
    outputs = [
        model.generate(IDS[:, :9], max_new_tokens=12, do_sample=False, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(*outputs)


def test_a_cut_model_can_be_cut():
    llm = build("gemma3")
    twice = cut(cut(llm, [0, 2, 4, 5]), [1, 3])
    assert torch.equal(logits(twice), logits(cut(llm, [2, 5])))
    assert twice.config.cut_from_layers == [1, 3]  # of the model that was cut


def test_a_number_of_layers_means_even_distances():
    config = LlamaConfig(**{**GPT, **GROUPED, "num_hidden_layers": 18, "hidden_size": 8, "intermediate_size": 8})
    llm = AutoModelForCausalLM.from_config(config)
    chosen = [cut(llm, number).config.cut_from_layers for number in (1, 2, 4, 6)]
    assert chosen == [[0], [0, 17], [0, 5, 11, 17], [0, 3, 6, 10, 13, 17]]


@torch.no_grad()
def loss_without(llm: PreTrainedModel, left_out: set[int], examples: list[tuple[list[int], int]]) -> float:
    """The loss of targets that pass by some layers, behind prompts that do not, in one pass for each example."""
    losses = []
    for ids, prompt in examples:

        def skip(module, args, kwargs, output, prompt=prompt):
            states = output[0] if isinstance(output, tuple) else output
            states[:, prompt:] = (args[0] if args else kwargs["hidden_states"])[:, prompt:]

        stack = find_layers(llm)[1]
        hooks = [stack[layer].register_forward_hook(skip, with_kwargs=True) for layer in left_out]
        predicted = llm(input_ids=torch.tensor([ids])).logits[0, prompt:-1]
        losses.append(torch.nn.functional.cross_entropy(predicted, torch.tensor(ids[prompt + 1 :]), reduction="none"))
        for hook in hooks:
            hook.remove()
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("family", ["gemma3", "gpt_neo", "llama"])  # layers of GPT-Neo return tuples
def test_data_chooses_the_layers_that_targets_need(family, tmp_path):
    llm, folder = build(family), tmp_path / "llm"
    llm.save_pretrained(folder)
    slm_tokenizer().save_pretrained(folder)
    rows = [{"prompt": f"out{row} out7 " * (row + 1), "output": f"out{3 * row} out{row} out9"} for row in range(4)]
    features = TextToText.from_pretrained(folder).features(
        [row["prompt"] for row in rows], [row["output"] for row in rows]
    )
    examples = [
        (ids, labels.count(-100)) for ids, labels in zip(features["input_ids"], features["labels"], strict=True)
    ]
    left_out: set[int] = set()
    while len(left_out) < LAYERS - 2:
        losses = {one: loss_without(llm, {*left_out, one}, examples) for one in {*range(LAYERS)} - left_out}
        left_out.add(min(losses, key=losses.__getitem__))
    told = []
    settings = CorpusSettings(target_column=["output"])
    data = write_pairs(tmp_path / "data.jsonl", rows)
    chosen = choose_layers(folder, data, 2, settings, progress=lambda *now: told.append(now))
    assert chosen == sorted({*range(LAYERS)} - left_out)
    assert told == [(done, 4) for done in range(5)]
    told_again = []
    progress = lambda *now: told_again.append(now)  # noqa: E731
    report = cut_checkpoint(folder, tmp_path / "slm", 2, data, settings, progress=progress)
    assert told_again == told
    assert report.title.startswith(f"Layers {chosen[0]}, {chosen[1]} of ")


@pytest.mark.parametrize("family", ["gemma3", "t5"])
def test_a_checkpoint_in_shards_and_half_precision_is_cut_with_its_tokenizer(family, tmp_path):
    llm = build(family).to(torch.bfloat16)
    llm.generation_config.max_new_tokens = 7
    llm.save_pretrained(tmp_path / "llm", max_shard_size="20KB")
    slm_tokenizer().save_pretrained(tmp_path / "llm")
    report = dict(cut_checkpoint(tmp_path / "llm", tmp_path / "slm", [0, 3]).rows)
    assert report["layers"] == f"2 of {LAYERS}"
    assert report["tokenizer"] == "copied"
    slm = type(llm).from_pretrained(tmp_path / "slm")
    assert slm.dtype == torch.bfloat16
    assert slm.generation_config.max_new_tokens == 7
    assert torch.equal(logits(slm), logits(cut(llm, [0, 3])))
    assert AutoTokenizer.from_pretrained(tmp_path / "slm").get_vocab() == slm_tokenizer().get_vocab()
    with pytest.raises(FileExistsError, match="add --overwrite"):
        cut_checkpoint(tmp_path / "llm", tmp_path / "slm", 2)
    before = weights_of(tmp_path / "slm")
    cut_checkpoint(tmp_path / "llm", tmp_path / "slm", [0, 3], overwrite=True)
    same_bytes(weights_of(tmp_path / "slm"), before)


@pytest.mark.parametrize("layers", [0, 7, -1, [], [6], [-1], [2, 1], [1, 1]], ids=str)
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match=r"`layers` is .*, but it must"):
        cut(build("gemma3"), layers)


def test_models_that_cannot_be_cut_are_refused_with_the_reason(tmp_path, monkeypatch):
    dense_first = DeepseekV3Config(
        **{**GPT, **ROTARY, "num_hidden_layers": 4}, first_k_dense_replace=2, n_routed_experts=4,
        moe_intermediate_size=8, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_group=1, topk_group=1,
        num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"A deepseek_v3 model cannot be cut: .*mlp"):
        cut(AutoModelForCausalLM.from_config(dense_first), [0, 3])
    composite = write_checkpoint("llm2slm", tmp_path / "composite")
    with pytest.raises(ValueError, match="is an LLM-to-SLM checkpoint"):
        cut_checkpoint(composite, tmp_path / "slm", 1)
    pairs = write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(ValueError, match="is no decoder-only model. Only the layers of such a model"):
        cut_checkpoint(write_checkpoint("llm", tmp_path / "t5"), tmp_path / "slm", 1, pairs)
    with pytest.raises(ValueError, match=r"but it is \[0, 3\]"):
        cut_checkpoint(composite, tmp_path / "slm", [0, 3], pairs)
    build("llama").save_pretrained(tmp_path / "llm")
    config = tmp_path / "llm" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    monkeypatch.setattr("modeling_llm2slm.conversion.cut.choose_layers", None)  # no choice precedes a refusal
    for data in (None, pairs):
        with pytest.raises(ValueError, match="is quantized"):
            cut_checkpoint(tmp_path / "llm", tmp_path / "slm", 1, data)
    assert not Path(tmp_path / "slm").exists()
