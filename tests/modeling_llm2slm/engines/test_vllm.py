"""vLLM gives the tokens of `generate()`, alone and in mixed batches. `make test-vllm` runs this file."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, T5Config

from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.inference.engine import LoadOptions, engine
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import GenerateFileSettings
from tests.support.checkpoints import write_checkpoint
from tests.support.common import LLM_VOCAB_SIZE, SLM_VOCAB_SIZE, apart, llm_tokenizer, slm_tokenizer
from tests.support.serving import byte_tokenizer, serving


pytest.importorskip("vllm", reason="make test-vllm installs it in an environment of its own")

END = SLM_VOCAB_SIZE - 1
# Attention heads of width 64: vLLM has no narrower ones on a CPU.
SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
GROUPED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 64}
SLMS = {
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "llama": GROUPED,
    "qwen3": GROUPED,
    "opt": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 128},
    "gemma3_text": {**GROUPED, "sliding_window": 8},
}
PROMPTS = [" ".join(f"src{(7 * row + step) % 90}" for step in range(1 + row % 9)) for row in range(32)]
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


def write_model(family: str, folder: Path, fusion: str = "add", tokenizer: Any = None) -> str:
    torch.manual_seed(0)
    tokenizer = tokenizer or slm_tokenizer()
    end = tokenizer.eos_token_id
    llm = T5Config(
        vocab_size=LLM_VOCAB_SIZE, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    slm = AutoConfig.for_model(family, vocab_size=end + 1, **ids, **SLMS[family])
    model = LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=llm, decoder=slm, fusion=fusion))
    for weight in model.decoder.parameters():
        if weight.ndim > 1:
            weight.data.mul_(6)  # so that outputs depend on the prompt
    model.save_pretrained(folder)
    LLM2SLMProcessor(llm_tokenizer(), tokenizer).save_pretrained(folder)
    return str(folder)


def check_family(path: str) -> None:
    model, reference = engine("vllm").load(path, LoadOptions()), TextToText.from_pretrained(path)
    expected = reference.generate_tokens(PROMPTS, **GREEDY)
    assert len({tuple(tokens) for tokens in expected}) > 4  # outputs that depend on the prompt
    assert model.generate_tokens(PROMPTS, **GREEDY) == expected
    assert model.generate_tokens(PROMPTS, batch_size=3, **GREEDY) == expected
    assert [model.generate_tokens([prompt], **GREEDY)[0] for prompt in PROMPTS[:3]] == expected[:3]
    assert not model.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("family", SLMS)
def test_greedy_tokens_are_those_of_generate(family: str, tmp_path: Path) -> None:
    apart(check_family, write_model(family, tmp_path / "model", "add" if family == "gpt2" else "replace"))


def check_options(path: str) -> None:
    model, reference = engine("vllm").load(path, LoadOptions()), TextToText.from_pretrained(path)
    text = reference.generate(PROMPTS[:1], **GREEDY)[0]
    pieces = list(model.stream(PROMPTS[0], **GREEDY))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    stream = model.stream(PROMPTS[0], **GREEDY)
    next(stream)
    stream.close()
    assert not model.llm_engine.has_unfinished_requests()
    # Sampling repeats with a seed, gives each prompt its own samples, and differs from greedy decoding.
    sampled = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 10}
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(model.generate_tokens(PROMPTS[:4], **sampled))
    assert outputs[0] == outputs[1]
    assert outputs[0] != model.generate_tokens(PROMPTS[:4], **GREEDY)
    inputs = model.read(model.features(PROMPTS[:2]))
    rows = model.write(inputs, num_return_sequences=3, **sampled)
    assert len(rows) == 6
    assert len({tuple(row) for row in rows}) > 2
    for options in ({"repetition_penalty": 1.7}, {"min_new_tokens": 6}):
        wanted = reference.generate_tokens(PROMPTS, **GREEDY, **options)
        assert model.generate_tokens(PROMPTS, **GREEDY, **options) == wanted
    stop = text.split()[1]
    stopped = model.generate(PROMPTS[:1], **GREEDY, stop_strings=stop)[0]
    assert text.startswith(stopped)
    assert stop in stopped.split()[-1]
    assert stop not in " ".join(stopped.split()[:-1])
    check_requests(model, reference)
    # The end token of the generation config ends an output.
    first = model.generate_tokens(PROMPTS[:1], **GREEDY)[0]
    model.model.generation_config.eos_token_id = [END, first[2]]
    assert model.write(model.read(model.features(PROMPTS[:1])), **GREEDY) == [first[: first.index(first[2]) + 1]]


def run(model: Any, steps: int = sys.maxsize) -> dict[tuple[str, int], Any]:
    """Step until all requests are finished, or some steps; return the last of each output."""
    found: dict[tuple[str, int], Any] = {}
    while model.unfinished and steps:
        found |= {(one.request, one.sample): one for one in model.step()}
        steps -= 1
    return found


def check_requests(model: Any, reference: Any) -> None:
    """Requests at any time, with settings of their own."""
    ids = model.features(PROMPTS)["input_ids"]
    expected = reference.generate_tokens(PROMPTS, **GREEDY)
    read, made = [], weakref.WeakSet()
    rows_of = model.rows

    def rows(inputs: Any) -> list[torch.Tensor]:
        found = rows_of(inputs)
        read.append(len(found))
        made.update(found)
        return found

    model.rows = rows
    greedy = model.sampling(max_new_tokens=10, logprobs=2)
    requests = [model.add(row, greedy) for row in [*ids, *ids]]
    wrong = model.add([5] * 500, greedy)  # more than the SLM's positions
    found = run(model, steps=3)
    requests += [model.add(row, greedy) for row in ids[:5]]  # equal prompts run
    dropped = [model.add(row, greedy) for row in ids[:2]]
    model.abort(dropped)
    found |= run(model)
    assert [list(found[request, 0].tokens) for request in requests] == [*expected, *expected, *expected[:5]]
    assert isinstance(found[wrong, 0].error, ValueError)
    assert not {request for request, _ in found} & {*dropped}
    distinct = len({tuple(row) for row in ids})
    assert distinct <= sum(read) <= distinct + 1  # each prompt once, in few batches
    assert len(read) <= 4
    # The log-probability of each token is that of generate().
    scores = reference.model.generate(
        **reference.read(reference.features(PROMPTS[:1])), **GREEDY, output_logits=True, return_dict_in_generate=True
    ).logits
    for step, token in enumerate(expected[0]):
        logprob = found[requests[0], 0].logprobs[step][token].logprob
        assert logprob == pytest.approx(float(scores[step][0].log_softmax(-1)[token]), abs=1e-3)
    # Nothing holds on to the tensors of finished requests, not even vLLM.
    del found
    gc.collect()
    assert not made
    model.rows = rows_of
    # Several samples of a request repeat with its seed, whatever else runs.
    sampled = model.sampling(7, max_new_tokens=10, do_sample=True, temperature=2.0, num_return_sequences=3, top_k=0)
    model.add(ids[0], sampled)
    alone = [list(one.tokens) for _, one in sorted(run(model).items())]
    mixed = [model.add(ids[0], sampled), *(model.add(row, greedy) for row in ids)]
    found = run(model)
    assert [list(found[mixed[0], index].tokens) for index in range(3)] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3
    # vLLM's own settings, the defaults of generate(), and what is refused.
    first = expected[0][0]
    model.add(ids[0], model.sampling(max_new_tokens=1, logit_bias={first: -100}))
    (one,) = run(model).values()
    assert one.tokens[0] != first
    assert model.sampling(do_sample=True).top_k == 50
    assert model.sampling(max_length=5).max_tokens == 4
    assert model.sampling(presence_penalty=0.5, frequency_penalty=0.25).frequency_penalty == 0.25
    for name, value in {"num_beams": 4, "penalty_alpha": 0.5, "no_repeat_ngram_size": 2}.items():
        with pytest.raises(ValueError, match=f"{name}=.*: take the engine pytorch"):
            model.sampling(**{name: value})
    assert model.sampling(num_beams=1, no_repeat_ngram_size=0).temperature == 0
    with pytest.raises(ValueError, match="temperature must be in"):
        model.sampling(do_sample=True, temperature=3.0)


def test_streams_samples_and_ends(tmp_path: Path) -> None:
    apart(check_options, write_model("gpt2", tmp_path / "model"))


def check_guided(path: str) -> None:
    model = engine("vllm").load(path, LoadOptions())
    ids = model.features(PROMPTS[:4])["input_ids"]
    for structure, pattern in (({"choice": ["ja", "weit"]}, "ja|weit"), ({"regex": "[ab]{3}"}, "[ab]{3}")):
        guided = model.sampling(max_new_tokens=10, structured_outputs=structure)
        for row in ids:
            model.add(row, guided)
        tokens = [list(one.tokens) for one in run(model).values()]
        for text in model.tokenizer.batch_decode(tokens, skip_special_tokens=True):
            assert re.fullmatch(pattern, text)


def test_outputs_are_guided(tmp_path: Path) -> None:
    apart(check_guided, write_model("gpt2", tmp_path / "model", tokenizer=byte_tokenizer()))


def check_file(path: str, folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for name, engine_name in (("vllm", "vllm"), ("pytorch", None)):
        settings = GenerateFileSettings(engine=engine_name, max_new_tokens=10, batch_size=5)
        generate_file(path, folder / "prompts.txt", folder / name, settings)
    assert (folder / "vllm").read_text() == (folder / "pytorch").read_text()


def test_a_file_of_prompts_gets_the_same_outputs(tmp_path: Path) -> None:
    apart(check_file, write_model("gpt2", tmp_path / "model"), tmp_path)


def check_server(path: str) -> None:
    model, reference = engine("vllm").load(path, LoadOptions()), TextToText.from_pretrained(path)
    expected = reference.generate(PROMPTS, **GREEDY)
    with serving(model, max_batch=32) as client, ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda prompt: client.text(prompt=prompt, max_tokens=10), PROMPTS))
        assert texts == expected
        pieces = [
            event["choices"][0]["text"] for event in client.events(prompt=PROMPTS[0], max_tokens=10, stream=True)
        ]
        assert "".join(pieces) == expected[0]
        sampled = {"prompt": PROMPTS[1], "max_tokens": 10, "temperature": 1.5, "seed": 7}
        assert client.text(**sampled) == client.text(**sampled)


def test_the_server_generates_for_many_clients(tmp_path: Path) -> None:
    apart(check_server, write_model("gpt2", tmp_path / "model"))


def test_models_that_vllm_does_not_serve_are_refused(tmp_path: Path) -> None:
    t5 = T5Config(vocab_size=LLM_VOCAB_SIZE, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    t5.decoder_start_token_id = 0
    LLM2SLMForConditionalGeneration(LLM2SLMConfig(encoder=t5, decoder=t5)).save_pretrained(tmp_path / "t5")
    LLM2SLMProcessor(llm_tokenizer(), llm_tokenizer()).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="encoder-decoder SLM, which vLLM does not serve. Take the engine pytorch"):
        engine("vllm").load(tmp_path / "t5", LoadOptions())
    with pytest.raises(ValueError, match="not an LLM-to-SLM model: serve it with vLLM itself"):
        engine("vllm").load(write_checkpoint("slm", tmp_path), LoadOptions())
    with pytest.raises(ValueError, match="does not quantize"):
        engine("vllm").load(tmp_path / "t5", LoadOptions(quantize="int8"))
