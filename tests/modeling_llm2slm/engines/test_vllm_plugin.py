"""vLLM itself runs a whole checkpoint, with the tokens of `generate()`. `make test-vllm` runs this file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import LlamaConfig, T5Config

from modeling_llm2slm import LLM2SLMConfig
from modeling_llm2slm.inference.text_to_text import TextToText
from tests.modeling_llm2slm.engines.test_vllm import GREEDY, PROMPTS, write_model
from tests.support.common import apart
from tests.support.families import LLM_VOCAB_SIZE


pytest.importorskip("vllm", reason="make test-vllm installs it in an environment of its own")

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def check_family(path: str) -> None:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
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


def test_models_that_vllm_does_not_serve_are_refused() -> None:
    from modeling_llm2slm.engines.vllm_plugin import VLLMLLM2SLMConfig

    t5 = T5Config(vocab_size=LLM_VOCAB_SIZE, d_model=32, d_kv=8, d_ff=37, num_layers=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="encoder-decoder SLM"):
        VLLMLLM2SLMConfig.from_dict(LLM2SLMConfig(encoder=t5, decoder=t5).to_dict())
    llm, slm = (LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=layers) for layers in (2, 1))
    cache = LLM2SLMConfig(encoder=llm, decoder=slm, fusion="cache", shared_tokenizer=True, decoder_layers=[1])
    with pytest.raises(ValueError, match="fusion='cache'"):
        VLLMLLM2SLMConfig.from_dict(cache.to_dict())
    served = VLLMLLM2SLMConfig.from_dict(LLM2SLMConfig(encoder=t5, decoder=llm).to_dict())
    assert not served.is_encoder_decoder
