"""The layers of a model: find them, skip some, and choose those that its targets need most."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from modeling_llm2slm.configuration_llm2slm import quirks_of
from modeling_llm2slm.data.loading import load_examples
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import CorpusSettings


BATCH_SIZE = 16


@contextmanager
def skipping(llm: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Let a model pass hidden states unchanged through all layers but these."""

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    skipped = [layer for place, layer in enumerate(find_layers(llm)[1]) if place not in layers]
    hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in skipped]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def find_layers(llm: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the layers that write the output, with the name of their list."""
    holder, attribute = layer_setting(llm.config)
    number = getattr(holder, attribute, None)
    lists = {module for module in llm.get_decoder().modules() if isinstance(module, nn.ModuleList)}
    found = [(name, module) for name, module in llm.named_modules() if module in lists and len(module) == number]
    inner = [name for name, _ in found if any(name.startswith(f"{other}.") for other, _ in found)]
    outer = [(name, module) for name, module in found if name not in inner]
    if len(outer) != 1:
        raise ValueError(refusal(llm, f"its {number} layers are not in one list"))
    return outer[0]


def layer_setting(config: Any) -> tuple[Any, str]:
    """Return the config that describes the layers to cut, and its attribute for their number."""
    if not config.is_encoder_decoder:
        return config.get_text_config(), "num_hidden_layers"
    if isinstance(getattr(config, "decoder", None), PreTrainedConfig):  # T5Gemma
        return config.decoder, "num_hidden_layers"
    return config, quirks_of(config).decoder_layers or "decoder_layers"


def refusal(llm: PreTrainedModel, reason: str) -> str:
    return f"A {llm.config.model_type} model cannot be cut: {reason.removesuffix('.')}."


@torch.inference_mode()
def choose_layers(
    llm: str | Path,
    data: str | Path,
    number: int,
    settings: CorpusSettings = CorpusSettings(),  # noqa: B008 - immutable
    *,
    samples: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[int]:
    """
    Return the layers of a decoder-only LLM to keep in an SLM that continues the LLM's keys and values of the prompt
    (fusion `cache`).

    The search is greedy and trains nothing: of the layers that are left, it leaves out the one without which the
    targets lose least, until `number` are left. The loss is the mean cross entropy of a target's tokens but the first,
    which comes from the LLM. Prompts are read once, by all layers. With *n* layers, targets are read fewer than
    *n (n + 1) / 2* times.

    Args:
        llm: Folder of the LLM, or its name on the Hub.
        data: Prompts and targets, best the LLM's own outputs, see [`load_examples`].
        number: How many layers to keep.
        settings: Which rows to read, and the columns of prompts and targets.
        samples: Read this many examples, evenly spread over the data; those with longer targets, if there are enough.
        progress: Called with the number of layers left out so far, and of all to leave out.

    Raises:
        ValueError: If the LLM is an encoder-decoder, if it has no such number of layers, or if no target has a second
            token.
    """
    text_to_text = TextToText.from_pretrained(llm, prompt_max_length=settings.prompt_max_length)
    model = text_to_text.model
    if model.config.is_encoder_decoder or text_to_text.is_llm2slm:
        raise ValueError(
            f"{llm} is no decoder-only model. Only the layers of such a model are chosen by data: name the layers."
        )
    layers = list(range(len(find_layers(model)[1])))
    if not 1 <= number <= len(layers):
        raise ValueError(f"`layers` is {number}, but it must be 1 to {len(layers)}, or a list of layers.")
    batches = _read_prompts(text_to_text, data, settings, samples)
    returns_tuple, left_out = _returns_tuple(model, batches[0]), set[int]()
    while len(layers) - len(left_out) > number:
        progress(len(left_out), len(layers) - number)
        losses = {one: _loss(model, batches, {*left_out, one}, returns_tuple) for one in layers if one not in left_out}
        left_out.add(min(losses, key=losses.__getitem__))
    progress(len(left_out), len(layers) - number)
    return [layer for layer in layers if layer not in left_out]


def _read_prompts(
    text_to_text: TextToText, data: str | Path, settings: CorpusSettings, samples: int
) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return batches: the arguments that continue the prompts' keys and values with the targets, and the labels."""
    examples = load_examples(data, settings, settings.target_column or "target")
    chosen = range(0, len(examples), max(len(examples) // (8 * samples), 1))  # few targets may be long enough
    rows = examples[chosen]
    features = text_to_text.features(rows["prompt"], rows["target"])
    pairs = []
    for input_ids, labels in zip(features["input_ids"], features["labels"], strict=True):
        length = labels.count(-100)
        pairs.append((input_ids[:length], labels[length:]))
    long = [pair for pair in pairs if len(pair[1]) > 2] or [pair for pair in pairs if len(pair[1]) > 1]
    if not long:
        raise ValueError(f"{data} has no target of several tokens, which choose the layers. Name the layers.")
    spread = long[:: max(len(long) // samples, 1)][:samples]
    spread.sort(key=lambda pair: len(pair[1]))  # targets are read again and again
    return [
        _read_batch(text_to_text, spread[start : start + BATCH_SIZE]) for start in range(0, len(spread), BATCH_SIZE)
    ]


def _read_batch(
    text_to_text: TextToText, pairs: list[tuple[list[int], list[int]]]
) -> tuple[dict[str, Any], torch.Tensor]:
    pad = text_to_text.tokenizer.pad_token_id
    prompts = nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt) for prompt, _ in pairs], batch_first=True, padding_value=pad, padding_side="left"
    )
    targets = nn.utils.rnn.pad_sequence(
        [torch.tensor(target) for _, target in pairs], batch_first=True, padding_value=-100
    )
    lengths = torch.tensor([len(prompt) for prompt, _ in pairs])
    mask = (torch.arange(prompts.shape[1]) >= prompts.shape[1] - lengths[:, None]).long()
    mask = torch.cat([mask, (targets != -100).long()], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    size, cache = prompts.shape[1], DynamicCache()
    text_to_text.model(
        input_ids=prompts,
        attention_mask=mask[:, :size],
        position_ids=positions[:, :size],
        past_key_values=cache,
        logits_to_keep=1,
    )
    arguments = {
        "input_ids": targets[:, :-1].masked_fill(targets[:, :-1] == -100, pad),
        "attention_mask": mask[:, :-1],
        "position_ids": positions[:, size:-1],
        "past_key_values": cache,
    }
    return arguments, targets[:, 1:]


def _loss(
    model: Any, batches: list[tuple[dict[str, Any], torch.Tensor]], left_out: Collection[int], returns_tuple: bool
) -> float:
    total, count = 0.0, 0
    with _bypassing(model, left_out, returns_tuple):
        for arguments, labels in batches:
            logits = model(**arguments).logits
            for place, layer in enumerate(arguments["past_key_values"].layers):
                if place not in left_out:
                    layer.crop(-labels.shape[1])
            kept = labels != -100
            total += float(nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum"))
            count += int(kept.sum())
    return total / count


@contextmanager
def _bypassing(model: PreTrainedModel, left_out: Collection[int], returns_tuple: bool) -> Iterator[None]:
    """Let a decoder-only model pass hidden states by these layers, which then take no time, unlike in [`skipping`]."""

    def bypass(*args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        return (hidden_states,) if returns_tuple else hidden_states

    stack = [layer for place, layer in enumerate(find_layers(model)[1]) if place in left_out]
    for layer in stack:
        layer.forward = bypass
    try:
        yield
    finally:
        for layer in stack:
            del layer.forward


def _returns_tuple(model: PreTrainedModel, batch: tuple[dict[str, Any], torch.Tensor]) -> bool:
    """Return whether a layer returns its hidden states in a tuple, which its annotation may not say."""
    kinds: list[bool] = []
    hook = find_layers(model)[1][0].register_forward_hook(lambda *args: kinds.append(isinstance(args[-1], tuple)))
    _loss(model, [batch], (), False)
    hook.remove()
    return kinds[0]
