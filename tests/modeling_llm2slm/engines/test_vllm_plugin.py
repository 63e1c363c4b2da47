"""vLLM itself runs a whole checkpoint, with the tokens of `generate()`. `make test-vllm` runs this file."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, T5Config

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.conversion.cut import cut
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.modeling_llm2slm.engines.test_vllm import GREEDY, GROUPED, PROMPTS, write_model
from tests.support.common import apart, llm_tokenizer
from tests.support.families import LLM_VOCAB_SIZE


pytest.importorskip("vllm", reason="make test-vllm installs it in an environment of its own")

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def check_family(path: str) -> None:
    os.environ |= ENVIRONMENT
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    reference = TextToText.from_pretrained(path)
    expected = reference.generate_tokens(PROMPTS, **GREEDY)
    llm = LLM(path, dtype="float32", enforce_eager=True, max_model_len=128)
    greedy = SamplingParams(temperature=0, max_tokens=GREEDY["max_new_tokens"])

    def tokens(prompts: object) -> list[list[int]]:
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, greedy, use_tqdm=False)]

    assert len({tuple(row) for row in expected}) > 4  # outputs that depend on the prompt
    assert tokens(PROMPTS) == expected
    assert tokens(PROMPTS[2]) == expected[2:3]
    ids = reference.features(PROMPTS[:3])["input_ids"]
    assert tokens([{"prompt_token_ids": row} for row in ids]) == expected[:3]  # ids of the LLM
    named = [{"prompt": "", "multi_modal_data": {"prompt": prompt}} for prompt in PROMPTS[:3]]
    assert tokens(named) == expected[:3]
    texts = [one.outputs[0].text for one in llm.generate(PROMPTS[:3], greedy, use_tqdm=False)]
    assert texts == reference.generate(PROMPTS[:3], **GREEDY)
    # The chat template is the LLM's.
    conversation = [{"role": "user", "content": PROMPTS[4]}]
    (output,) = llm.chat(conversation, greedy, chat_template=CHAT, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected[4]
    # Samples of a request repeat with its seed.
    sampling = SamplingParams(n=3, seed=5, temperature=2.0, max_tokens=6)
    samples = [[list(one.token_ids) for one in llm.generate(PROMPTS[0], sampling)[0].outputs] for _ in range(2)]
    assert samples[0] == samples[1]
    assert len({tuple(row) for row in samples[0]}) > 1
    for prompt, message in {"": "The prompt is empty", "src1 " * 200: "longer than the maximum"}.items():
        with pytest.raises((ValueError, VLLMValidationError), match=message):
            tokens([prompt])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_greedy_tokens_are_those_of_generate(family: str, tmp_path: Path) -> None:
    apart(check_family, write_model(family, tmp_path / "model", "add" if family == "gpt2" else "replace"))


# Fusion "cache". The model of a family, whether its first token is the LLM's, and more of its config.
LAYERS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
SHARING: dict[str, tuple[bool, dict[str, Any]]] = {
    "llama": (True, {}),
    "qwen3": (False, {}),
    "gemma3_text": (True, {"sliding_window": 8, "layer_types": LAYERS}),
}
LONG = [[3 + (5 * row + 11 * step) % 90 for step in range(66)] for row in range(2)]


def write_cache_model(family: str, folder: Path) -> str:
    """Write a model whose SLM is made of layers 0, 2 and 3 of its LLM, with weights of its own."""
    torch.manual_seed(0)
    tokenizer, (llm_first_token, sizes) = llm_tokenizer(), SHARING[family]
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    sizes = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": False,
        **ids,
        **GROUPED,
        "num_hidden_layers": 4,
    } | sizes
    config = AutoConfig.for_model(family, **sizes)
    llm = AutoModelForCausalLM.from_config(config)
    for name, weight in llm.named_parameters():
        if weight.ndim > 1:
            weight.data.mul_(6)  # so that outputs depend on the prompt
        elif "post_" in name and family == "gemma3_text":
            weight.data.fill_(5)
    slm = cut(llm, [0, 2, 3])
    for weight in slm.parameters():
        weight.data.add_(0.1 * weight.data.abs().mean() * torch.randn_like(weight))
    parts = {"encoder_model": llm if llm_first_token else llm.model, "decoder_model": slm}
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        **parts, fusion="cache", shared_tokenizer=True, llm_first_token=llm_first_token
    )
    model.save_pretrained(folder)
    LLM2SLMProcessor(tokenizer, tokenizer).save_pretrained(folder)
    return str(folder)


def references(path: str) -> dict[str, Any]:
    """Return what `generate()` gives: short outputs, long ones, and the continuation of a conversation."""
    model = TextToText.from_pretrained(path)

    def of_ids(rows: list[list[int]], length: int) -> list[list[int]]:
        features = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        return model.write(model.read(features), max_new_tokens=length, min_new_tokens=length, do_sample=False)

    replies = of_ids(LONG, 40)
    more = [[*prompt, *reply, 5, 6, 7] for prompt, reply in zip(LONG, replies, strict=True)]
    return {
        "short": model.generate_tokens(PROMPTS, **GREEDY),
        "texts": model.generate(PROMPTS[:3], **GREEDY),
        "ids": model.features(PROMPTS)["input_ids"],
        "long": model.generate_tokens(PROMPTS[:8], max_new_tokens=60, min_new_tokens=60, do_sample=False),
        "replies": replies,
        "more": more,
        "after_more": of_ids(more, 10),
        "vocab_size": model.model.config.vocab_size,
    }


class CacheEngine:
    """
    vLLM with a model, the tokens of each step that LLM and SLM read, and the number of preemptions. Steps have at most
    24 tokens, so prompts are read in pieces while others decode, and KV caches have blocks for few requests.
    """

    def __init__(self, path: str, patch: pytest.MonkeyPatch):
        from vllm import LLM
        from vllm.v1.core.sched.scheduler import Scheduler

        from modeling_llm2slm.engines.vllm_cache import VLLMLLM2SLMCache

        self.steps: list[tuple[int, int]] = []
        self.preempted = 0
        forward, preempt = VLLMLLM2SLMCache.forward, Scheduler._preempt_request

        def counted_forward(model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            of_llm = int((input_ids >= model.size).sum())
            self.steps.append((of_llm, len(input_ids) - of_llm))
            return forward(model, input_ids, *args, **kwargs)

        def counted_preempt(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        patch.setattr(VLLMLLM2SLMCache, "forward", counted_forward)
        patch.setattr(Scheduler, "_preempt_request", counted_preempt)
        self.llm = LLM(
            path, dtype="float32", max_model_len=128, block_size=32, max_num_seqs=8, max_num_batched_tokens=24,
            num_gpu_blocks_override=22 if "gemma3" in path else 11,  # layers with a window have blocks of their own
            enforce_eager="qwen3" not in path,  # one family is compiled
        )  # fmt: skip

    def run(self, prompts: Any, length: int = 10, shortest: int = 0, **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        given = SamplingParams(**{"temperature": 0, "max_tokens": length, "min_tokens": shortest, **sampling})
        rows = [one if isinstance(one, str) else {"prompt_token_ids": one} for one in prompts]
        return self.llm.generate(rows, given, use_tqdm=False)

    def tokens(self, *args: Any) -> list[list[int]]:
        return tokens_of(self.run(*args))


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_cache_outputs(engine: CacheEngine, expected: dict[str, Any]) -> None:
    from vllm import SamplingParams

    assert len({tuple(row) for row in expected["short"]}) > 4  # outputs that depend on the prompt
    outputs = engine.run(PROMPTS)
    assert tokens_of(outputs) == expected["short"]
    assert [output.outputs[0].text for output in outputs[:3]] == expected["texts"]
    assert sum(llm > 0 and slm > 0 for llm, slm in engine.steps) > 5  # steps with tokens of both
    assert sum(llm == 0 for llm, slm in engine.steps) > 5  # steps of the SLM alone
    assert engine.tokens(expected["ids"][:3]) == expected["short"][:3]
    conversation = [{"role": "user", "content": PROMPTS[4]}]
    greedy = SamplingParams(temperature=0, max_tokens=10)
    assert (
        tokens_of(engine.llm.chat(conversation, greedy, chat_template=CHAT, use_tqdm=False)) == expected["short"][4:5]
    )
    # Requests that were preempted: the LLM does not read what the SLM has written.
    assert engine.tokens(PROMPTS[:8], 60, 60) == expected["long"]
    assert engine.preempted
    # Penalties and samples are vLLM's.
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5}
    (output,) = engine.run(PROMPTS[:1], 6, n=3, seed=5, temperature=2.0, logprobs=2, **penalties)
    samples = {tuple(sample.token_ids) for sample in output.outputs}
    assert len(samples) > 1
    assert max(map(max, samples)) < expected["vocab_size"]


def check_cache_prefixes(engine: CacheEngine, expected: dict[str, Any]) -> None:
    """Blocks of a prompt are found again, and blocks with tokens that the SLM wrote are not."""
    assert engine.tokens(LONG, 40, 40) == expected["replies"]
    for prompts, length, wanted in ((LONG, 40, expected["replies"]), (expected["more"], 10, expected["after_more"])):
        outputs = engine.run(prompts, length, length)
        assert tokens_of(outputs) == wanted
        assert [output.num_cached_tokens for output in outputs] == [64, 64]


def check_cache_engine(path: str, expected: dict[str, Any]) -> None:
    os.environ |= ENVIRONMENT
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.exceptions import VLLMValidationError

    with pytest.MonkeyPatch.context() as patch:
        engine = CacheEngine(path, patch)
        check_cache_outputs(engine, expected)
        check_cache_prefixes(engine, expected)
        with pytest.raises((ValueError, VLLMValidationError), match="maximum context length is 128"):
            engine.run(["src1 " * 200])
        with pytest.raises(ValueError, match="not in the LLM's vocabulary"):
            engine.run([[expected["vocab_size"]]])
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def check_cache(paths: list[str]) -> None:
    expected = [references(path) for path in paths]  # before vLLM changes how configs are loaded
    for path, each in zip(paths, expected, strict=True):
        check_cache_engine(path, each)


def test_fusion_cache_continues_the_llm(tmp_path: Path) -> None:
    apart(check_cache, [write_cache_model(family, tmp_path / family) for family in SHARING])


def test_models_that_vllm_does_not_serve_are_refused() -> None:
    from modeling_llm2slm.engines.vllm_plugin import CACHE_ARCHITECTURE, UpdateCacheModelConfig, VLLMLLM2SLMConfig

    t5 = T5Config(vocab_size=LLM_VOCAB_SIZE, d_model=32, d_kv=8, d_ff=37, num_layers=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="encoder-decoder SLM"):
        VLLMLLM2SLMConfig.from_dict(LLM2SLMConfig(encoder=t5, decoder=t5).to_dict())
    llm, slm = (LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=layers) for layers in (2, 1))
    cache = LLM2SLMConfig(encoder=llm, decoder=slm, fusion="cache", shared_tokenizer=True, decoder_layers=[1])
    config = VLLMLLM2SLMConfig.from_dict(cache.to_dict())
    assert config.architectures == [CACHE_ARCHITECTURE]
    assert config.get_text_config().vocab_size == 2 * config.vocab_size
    for name in ("speculative_config", "kv_transfer_config", "use_v2_model_runner"):
        given: dict[str, Any] = dict.fromkeys(("speculative_config", "kv_transfer_config", "use_v2_model_runner"))
        given |= {name: True, "parallel_config": SimpleNamespace(world_size=1)}
        with pytest.raises(ValueError, match='Fusion "cache" does not run in vLLM with'):
            UpdateCacheModelConfig.verify_and_update_config(SimpleNamespace(**given))
    served = VLLMLLM2SLMConfig.from_dict(LLM2SLMConfig(encoder=t5, decoder=llm).to_dict())
    assert not served.is_encoder_decoder
