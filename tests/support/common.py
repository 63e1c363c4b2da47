"""Tiny models for the tests, and a slow reference that shares no code with the model under test."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from tests.support import families
from tests.support.families import END, LLM_VOCAB_SIZE, PAD, SLM_VOCAB_SIZE


# Three prompts of unequal lengths, so a batch of them is padded; ids exist in both vocabularies.
PROMPTS = [[11, 52, 7, 93, 34, 60, 2, 1], [85, 29, 1], [5, 77, 41, 41, 66, 18, 90, 3, 27, 50, 12, 1]]

FUSIONS = {
    "replace": {"fusion": "replace"},
    "add": {"fusion": "add", "shared_tokenizer": False},
    "add_shared": {"fusion": "add", "shared_tokenizer": True},
}
CACHE = {"fusion": "cache", "shared_tokenizer": True, "decoder_layers": families.SHARED_LAYERS}
T5_VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "gated": {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
}


class Parts(NamedTuple):
    """A composite with copies of the two plain models it was made from."""

    model: LLM2SLMForConditionalGeneration
    llm: Any
    slm: Any


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes are those of a safetensors file, and not a copy of them."""
    address = tensor.untyped_storage().data_ptr()
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "safetensors" in line)
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return any(start <= address < end for start, end in spans)


def t5_config(variant: str = "tied", **overrides: Any) -> T5Config:
    values = {
        "vocab_size": LLM_VOCAB_SIZE,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "num_heads": 3,
        "pad_token_id": PAD,
        "eos_token_id": 1,
        "decoder_start_token_id": PAD,
    }
    return T5Config(**(values | T5_VARIANTS[variant] | overrides))


def gpt2_config(**overrides: Any) -> GPT2Config:
    values = {
        "vocab_size": SLM_VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": END,
        "eos_token_id": END,
        # A random tiny model with tied heads and small weights repeats one token, whatever the prompt.
        "tie_word_embeddings": False,
        "initializer_range": 0.35,
    }
    return GPT2Config(**(values | overrides))


def build_parts(fusion: str = "add", llm: str = "tied", seed: int = 2, **config: Any) -> Parts:
    """A new composite of its own, safe to change."""
    torch.manual_seed(seed)
    vocab_size = SLM_VOCAB_SIZE if fusion == "add_shared" else LLM_VOCAB_SIZE
    llm_model = T5EncoderModel(t5_config(llm, vocab_size=vocab_size)).eval()
    slm_model = GPT2LMHeadModel(gpt2_config()).eval()
    return compose(llm_model, slm_model, fusion, **config)


@functools.cache
def shared_family(slm: str, llm: str = "t5", fusion: str = "add") -> Parts:
    """One composite of two families for all tests that only read it."""
    slm_model = families.build_slm(slm)
    if fusion == "cache":
        parts = compose(families.build_whole(llm), slm_model, fusion)
    else:
        llm_model = families.build_llm(llm, SLM_VOCAB_SIZE if fusion == "add_shared" else LLM_VOCAB_SIZE)
        parts = compose(llm_model, slm_model, fusion, encoder_layer=families.LLMS[llm].layer)
    learn_by_heart(parts.model)
    return parts._replace(slm=copy.deepcopy(parts.model.decoder))


def build_family(slm: str, llm: str = "t5", fusion: str = "add") -> Parts:
    """A composite of two families of its own, safe to change: a copy, as learning by heart takes seconds."""
    return copy.deepcopy(shared_family(slm, llm, fusion))


def with_random_adapters(model: Any) -> Any:
    """Give all weights of a model's adapters random values: new adapters change nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or ".modules_to_save." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def learn_by_heart(model: Any, loss: float = 0.05, labels: torch.Tensor | None = None) -> None:
    """
    Train a tiny model to generate `labels` for each of `PROMPTS`, or random tokens of its own: a random tiny model
    with a tied head repeats one token, whatever the prompt.
    """
    generator = torch.Generator().manual_seed(0)
    if labels is None:
        labels = torch.stack([torch.randperm(END, generator=generator)[:12] for _ in PROMPTS])
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    batch = pad_prompts(PROMPTS)
    if isinstance(model, LLM2SLMForConditionalGeneration):
        if model.config.fusion == "cache":  # the first token is the LLM's
            labels[:, 0] = model.encode_prompt(**batch).first.argmax(-1)
        batch["llm_hidden_states"] = model.encode_llm(**batch)
    for _ in range(300):
        now = model(**batch, labels=labels).loss
        if now < loss:
            return
        now.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the targets were not learned: the loss is still {float(now.detach())}")


def compose(llm_model: Any, slm_model: Any, fusion: str, **config: Any) -> Parts:
    """A composite of two models, with copies of them."""
    plain = copy.deepcopy((llm_model, slm_model))
    values = {"shared_tokenizer": False} | FUSIONS.get(fusion, CACHE) | config
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder_model=llm_model, decoder_model=slm_model, **values
    )
    for linear in model.encoder.projector.linears if model.encoder.projector is not None else ():
        nn.init.normal_(linear.bias, std=0.1)  # new biases are zero, and a forgotten one would not be seen
        if not linear.weight.any():  # the last one of a shared tokenizer, likewise
            nn.init.normal_(linear.weight, std=0.1)
    return Parts(model, *plain)


def build_model(
    fusion: str = "add", llm: str = "tied", seed: int = 2, **config: Any
) -> LLM2SLMForConditionalGeneration:
    return build_parts(fusion, llm, seed, **config).model


@functools.cache
def shared_parts(fusion: str = "add") -> Parts:
    """One composite for all tests that only read it."""
    return build_parts(fusion, llm="gated" if fusion == "replace" else "tied")


def pad_prompts(prompts: Sequence[Sequence[int]], side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of prompts, padded on one side to the longest and `extra` more."""
    width = max(map(len, prompts)) + extra
    ids, masks = [], []
    for prompt in prompts:
        padding = width - len(prompt)
        before, after = (padding, 0) if side == "left" else (0, padding)
        ids.append([PAD] * before + list(prompt) + [PAD] * after)
        masks.append([0] * before + [1] * len(prompt) + [0] * after)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def pairwise(shift: int, paddings: Sequence[str], caches: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """
    Combinations of padding, cache, and whether states are passed: each value at least once, and over consecutive
    values of `shift`, five or more, each pair of them.
    """
    for index, padding in enumerate(paddings):
        yield padding, caches[(index + shift) % len(caches)], (index + shift // 2) % 2 == 1


def make_labels(rows: int = 3, length: int = 6, seed: int = 0) -> torch.Tensor:
    """Targets of unequal lengths that end with the end token, and -100 after it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, END, (rows, length), generator=generator)
    for row, kept in enumerate(range(length, length - 2 * rows, -2)):
        labels[row, max(kept, 2) - 1] = END
        labels[row, max(kept, 2) :] = -100
    return labels


@contextmanager
def count_calls(module: nn.Module) -> Iterator[list[Any]]:
    """A list that gets one entry per forward of `module`."""
    calls: list[Any] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


# The reference: plain sub-models, one prompt at a time, no padding, no cache.


@torch.no_grad()
def reference_states(parts: Parts, prompt: Sequence[int]) -> torch.Tensor:
    """H `(1, N, d_llm)` of one prompt by the whole LLM."""
    reader = parts.llm.get_encoder() if parts.llm.config.is_encoder_decoder else parts.llm
    outputs = reader(input_ids=torch.tensor([list(prompt)]), output_hidden_states=True)
    layer = parts.model.config.encoder_layer
    if isinstance(layer, list):
        return torch.cat([outputs.hidden_states[one] for one in layer], dim=-1)
    return outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]


@torch.no_grad()
def reference_prompt(parts: Parts, prompt: Sequence[int]) -> torch.Tensor:
    """P `(1, N, d_slm)` of one prompt by the formulas of the paper."""
    ids = torch.tensor([list(prompt)])
    projector = parts.model.encoder.projector
    standard = (reference_states(parts, prompt) - projector.mean) / projector.scale
    hidden = standard @ projector.linear_1.weight.T + projector.linear_1.bias
    embeds = hidden.clamp(min=0) @ projector.linear_2.weight.T + projector.linear_2.bias
    if parts.model.config.fusion == "replace":
        return embeds
    if parts.model.config.shared_tokenizer:
        return embeds + parts.slm.get_input_embeddings()(ids)
    return embeds + parts.llm.get_input_embeddings()(ids) @ parts.model.encoder.prompt_embedding.weight.T


@torch.no_grad()
def reference_logits(parts: Parts, prompt: Sequence[int], sequence: Sequence[int]) -> torch.Tensor:
    """Logits `(M + 1, vocabulary)` for each next token after the start token and `output`."""
    if parts.model.config.fusion == "cache":
        return reference_continuation(parts, prompt, sequence)
    embeds, tokens = reference_prompt(parts, prompt), torch.tensor([[END, *sequence]])
    if parts.slm.config.is_encoder_decoder:
        return parts.slm(inputs_embeds=embeds, decoder_input_ids=tokens, use_cache=False).logits[0]
    embeds = torch.cat([embeds, parts.slm.get_input_embeddings()(tokens)], dim=1)
    return parts.slm(inputs_embeds=embeds, use_cache=False).logits[0, len(prompt) :]


@torch.no_grad()
def reference_continuation(parts: Parts, prompt: Sequence[int], sequence: Sequence[int]) -> torch.Tensor:
    """The same for fusion "cache": the LLM's logits, then the SLM's after the LLM's own keys and values."""
    outputs, cache = (
        parts.llm(torch.tensor([list(prompt)]), use_cache=True, past_key_values=DynamicCache()),
        DynamicCache(),
    )
    for index, layer in enumerate(parts.model.config.decoder_layers):
        cache.update(*[getattr(outputs.past_key_values.layers[layer], name) for name in ("keys", "values")], index)
    first, tokens = outputs.logits[0, -1:], torch.tensor([list(sequence)])
    if not sequence:
        return first
    positions = torch.arange(len(prompt), len(prompt) + len(sequence))[None]
    logits = parts.slm(tokens, past_key_values=cache, position_ids=positions, use_cache=True).logits[0]
    return torch.cat([first, logits])


class Rows(nn.Module):
    """The encoder of the slow reference: "states" that tell which prompt a row is about, whatever becomes of rows."""

    main_input_name = "input_ids"

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=input_ids[..., None].float())


class SlowReference(PreTrainedModel, GenerationMixin):
    """
    Stock decoding loops over logits that are computed without cache and padding, one prompt at a time and each time
    from the start, by the plain sub-models: nothing of the model under test runs.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True  # the implementation that the config names

    def __init__(self, parts: Parts, prompts: Sequence[Sequence[int]]):
        super().__init__(copy.deepcopy(parts.model.config))
        self.parts, self.prompts = parts, prompts
        self.rows = Rows()
        self.anchor = nn.Parameter(torch.zeros(1))  # gives the model a dtype and a device
        self.generation_config = copy.deepcopy(parts.model.generation_config)
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def get_encoder(self, modality: str | None = None) -> Rows:
        return self.rows

    def get_output_embeddings(self) -> None:
        return None

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"decoder_input_ids": input_ids, "encoder_outputs": kwargs["encoder_outputs"]}

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        encoder_outputs: Any = None,
        return_dict: bool = True,
    ) -> Seq2SeqLMOutput:
        rows = encoder_outputs[0][:, 0, 0].long().tolist()
        keys = [(row, *tokens) for row, tokens in zip(rows, decoder_input_ids.tolist(), strict=True)]
        for key in keys:
            if key not in self.known:
                self.known[key] = reference_logits(self.parts, self.prompts[key[0]], key[2:])[-1:]
        return Seq2SeqLMOutput(logits=torch.stack([self.known[key] for key in keys]))

    def run(self, **kwargs: Any) -> Any:
        """`generate()` for all prompts."""
        rows = torch.arange(len(self.prompts))[:, None]
        return self.generate(rows, attention_mask=torch.ones_like(rows), use_cache=False, **kwargs)


def reference_greedy(parts: Parts, prompt: Sequence[int], length: int) -> tuple[list[int], torch.Tensor]:
    """The greedy output, end token included, and the logits `(M, vocabulary)` it was read from."""
    sequence: list[int] = []
    while len(sequence) < length and sequence[-1:] != [END]:
        sequence.append(int(reference_logits(parts, prompt, sequence)[-1].argmax()))
    return sequence, reference_logits(parts, prompt, sequence[:-1])


def reference_sample(parts: Parts, prompts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
    """Sampled outputs: logits one prompt at a time, one sample per step for all prompts, as `generate()` samples."""
    torch.manual_seed(seed)
    sequences: list[list[int]] = [[] for _ in prompts]
    for _ in range(length):
        logits = [reference_logits(parts, *row)[-1] for row in zip(prompts, sequences, strict=True)]
        sampled = torch.multinomial(torch.stack(logits).softmax(-1), 1)[:, 0].tolist()
        for sequence, token in zip(sequences, sampled, strict=True):
            sequence.append(END if sequence[-1:] == [END] else token)  # the end token pads, too
        if all(sequence[-1] == END for sequence in sequences):
            break
    return sequences


def reference_beams(parts: Parts, prompt: Sequence[int], length: int, beams: int) -> list[list[int]]:
    """Beam search for outputs of exactly `length` tokens, without an end token; the best first."""
    hypotheses: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(length):
        candidates = []
        for score, sequence in hypotheses:
            scores = reference_logits(parts, prompt, sequence)[-1].log_softmax(-1)
            scores[END] = -torch.inf
            top = scores.topk(beams)
            candidates += [
                (score + value, [*sequence, token])
                for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
        hypotheses = sorted(candidates, reverse=True)[:beams]
    return [sequence for _, sequence in hypotheses]


def stock_slm_generate(parts: Parts, prompts: Sequence[Sequence[int]], **kwargs: Any) -> Any:
    """Stock `generate()` of the bare GPT-2 on `[P; E(start)]`, each P computed alone, padded left."""
    start = parts.slm.transformer.wte.weight[torch.tensor([[END]])]
    rows = [torch.cat([reference_prompt(parts, prompt), start], dim=1) for prompt in prompts]
    width = max(row.shape[1] for row in rows)
    embeds = torch.cat([nn.functional.pad(row, (0, 0, width - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (width - row.shape[1]) + [1] * row.shape[1] for row in rows])
    return parts.slm.generate(inputs_embeds=embeds.detach(), attention_mask=mask, pad_token_id=END, **kwargs)


def strip_padding(sequences: torch.Tensor) -> list[list[int]]:
    """Rows of `generate()` as lists that end with the end token, without the start token before and padding after."""
    rows = []
    for row in sequences[:, 1:].tolist():
        rows.append(row[: row.index(END) + 1] if END in row else row)
    return rows


def check_outputs_vary(sequences: Sequence[Sequence[int]]) -> None:
    """Equal outputs prove something only if they vary and differ between prompts."""
    for sequence in sequences:
        assert len(sequence) >= 10
        assert len(set(sequence[:10])) >= 5, f"an output repeats itself: {sequence}"
    assert len({tuple(sequence[:10]) for sequence in sequences}) == len(sequences), "prompts share an output"


def same_tensors(first: Any, second: Any, path: str = "") -> None:
    """Assert that two state dictionaries have the same keys and bytes."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def tiny_tokenizer(
    words: Sequence[str], special: dict[str, str], end: str | None = None, special_last: bool = False
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; with `end`, that token is put after every text, as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = list(dict.fromkeys(special.values()))
    vocabulary = {token: i for i, token in enumerate([*words, *tokens] if special_last else [*tokens, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def llm_tokenizer() -> PreTrainedTokenizerFast:
    """As T5's: pad 0, end 1 after every text."""
    words = [f"src{i}" for i in range(LLM_VOCAB_SIZE - 3)]
    return tiny_tokenizer(words, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, end="</s>")


def slm_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: the last id starts and ends a text, none pads, and nothing is put around a text."""
    words = [f"out{i}" for i in range(SLM_VOCAB_SIZE - 2)]
    special = {"unk_token": "<unk>", "bos_token": "<end>", "eos_token": "<end>"}
    return tiny_tokenizer(words, special, special_last=True)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """
    Calls a function of a test module in a process of its own. Workers of a DataLoader are forks, and a test process
    with the threads of several engines does not always survive them.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, outcome = Path(folder, "call"), Path(folder, "outcome")
        call.write_bytes(pickle.dumps((function, args)))
        command = [sys.executable, "-m", "tests.support.common", call, outcome]
        subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
        found = pickle.loads(outcome.read_bytes())
    if isinstance(found, Exception):
        raise found
    return found


def _run_call(call: Path, outcome: Path) -> None:
    function, args = pickle.loads(call.read_bytes())
    try:
        found = function(*args)
    except Exception as error:
        found = error
    outcome.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    _run_call(*map(Path, sys.argv[1:]))
