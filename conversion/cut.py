"""Cut a model: keep some of its layers, as an SLM that shares them with its LLM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_llm2slm.files_llm2slm import first_line
from modeling_llm2slm.inference.parts import count_parameters
from modeling_llm2slm.settings import CorpusSettings
from modeling_llm2slm.states.loading import load_model

from .layers import choose_layers, find_layers, layer_setting, refusal, skipping
from .output import converts, output_folder, size_of
from .parts import load_plain, plain_config, tokenizer_of
from .report import Report, probe, slm_logits


def cut(llm: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """
    Return a model of some layers of an LLM, with copies of its embeddings, norms and head.

    Each layer computes the same as in the LLM: layer types, and with them rotary bases and windows, are those of the
    chosen layers. The LLM does not change. An encoder-decoder LLM keeps its encoder whole; its decoder is cut.

    Args:
        llm: A decoder-only or encoder-decoder model.
        layers:
            The layers to keep, from 0, in ascending order; or their number, which keeps the first, the last and
            layers at even distances between them. The config of the result has them as `cut_from_layers`.

    Raises:
        ValueError: If there are no such layers, or if a model of this kind cannot be cut.
    """
    name, stack = find_layers(llm)
    layers = _choose(layers, len(stack))
    config = cut_config(llm.config, layers)
    state = _cut_state(llm, name, layers)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):  # GPT-2 divides by the number of the layer
        config.scale_attn_by_inverse_layer_idx = False
        for place, layer in enumerate(layers):
            for tensor in (state[f"{name}.{place}.attn.c_attn.{kind}"] for kind in ("weight", "bias")):
                tensor[..., : config.hidden_size] /= layer + 1  # the queries
    try:
        model, loading = type(llm).from_pretrained(
            None, config=config, state_dict=state, dtype=llm.dtype, output_loading_info=True
        )
    except Exception as error:  # shapes that depend on the place of a layer
        raise ValueError(refusal(llm, first_line(error))) from error
    wrong = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    if wrong:
        raise ValueError(refusal(llm, f"the config does not say which layers have {wrong[0]}"))
    if llm.can_generate():
        model.generation_config = copy.deepcopy(llm.generation_config)
    return model.train(llm.training)


@converts
def cut_checkpoint(
    llm: str | Path,
    output: str | Path,
    layers: int | Sequence[int],
    data: str | Path | None = None,
    settings: CorpusSettings = CorpusSettings(),  # noqa: B008 - immutable
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """
    Write a model of some layers of an LLM, with its tokenizer.

    Args:
        llm: Folder of a decoder-only or encoder-decoder model, or its name on the Hub.
        output: The folder to write to.
        layers: See [`cut`].
        data: Prompts and targets that choose the layers, whose number is `layers`, see [`choose_layers`].
        settings: Which rows of the data to read.
        overwrite: Replace an existing folder.
        progress: See [`choose_layers`].

    Raises:
        OSError: If something cannot be read or written.
        ValueError: See [`cut`] and [`choose_layers`]; or if the result differs from the LLM without its other layers.
    """
    if data is not None:
        if not isinstance(layers, int):
            raise ValueError(f"Data chooses the layers if `layers` is their number, but it is {list(layers)}.")
        plain_config(llm)  # refuses what cannot be cut before the choice, which takes minutes
        layers = choose_layers(llm, data, layers, settings, progress=progress)
    source = load_plain(llm)
    model = cut(source, layers)
    kept = model.config.cut_from_layers
    report = Report(f"Layers {', '.join(map(str, kept))} of {llm} become {output}")
    with output_folder(output, (llm,), size_of(model.state_dict())) as folder:
        model.save_pretrained(folder)
        tokenizer = tokenizer_of(llm)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        probed = probe(source.get_input_embeddings().weight.shape[0])
        with skipping(source, kept):
            expected = slm_logits(source, probed)
        written = load_model(type(model), folder)
        report.compare("logits", (slm_logits(written, probed), expected), 0.05 if model.dtype.itemsize < 4 else 1e-4)
        before, after = count_parameters(source), count_parameters(written)
        report.add("layers", f"{len(kept)} of {len(find_layers(source)[1])}")
        report.add("parameters", f"{after:,} of {before:,} ({after / before:.0%})")
        report.add("tokenizer", "none in the source" if tokenizer is None else "copied")
    return report


def _choose(layers: int | Sequence[int], number: int) -> list[int]:
    """Return the layers that are named, or as many as there are to be, at even distances."""
    if isinstance(layers, int):
        if not 1 <= layers <= number:
            raise ValueError(f"`layers` is {layers}, but it must be 1 to {number}, or a list of layers.")
        return [place * (number - 1) // max(layers - 1, 1) for place in range(layers)]
    chosen = list(layers)
    if not chosen or chosen != sorted({*chosen} & {*range(number)}):
        raise ValueError(f"`layers` is {chosen}, but it must name layers from 0 to {number - 1} in ascending order.")
    return chosen


def cut_config(config: PreTrainedConfig, layers: int | Sequence[int]) -> PreTrainedConfig:
    """
    Return the config of a model that is cut, see [`cut`]: the number of its layers, and the values of every list that
    has one for each layer.
    """
    holder, attribute = layer_setting(config)
    number = getattr(holder, attribute)
    layers = _choose(layers, number)
    values = config.to_dict()
    inner = next((values[name] for name in config.sub_configs if getattr(config, name, None) is holder), values)
    for name, value in inner.items():
        if (
            isinstance(value, list | tuple)
            and len(value) == number
            and "token" not in name
            and name != "architectures"
        ):
            inner[name] = [value[layer] for layer in layers]
    if "attention_types" in inner:  # GPT-Neo writes its list in a short form too
        inner["attention_types"] = [[inner["attention_layers"], 1]]
    inner[holder.attribute_map.get(attribute, attribute)] = len(layers)
    smaller = type(config).from_dict({**values, "cut_from_layers": layers})
    smaller._attn_implementation = config._attn_implementation
    return smaller


def _cut_state(llm: PreTrainedModel, name: str, layers: list[int]) -> dict[str, torch.Tensor]:
    """Return copies of the weights, with the new numbers of the layers that are kept."""
    state = {key: tensor for key, tensor in llm.state_dict().items() if key not in llm.all_tied_weights_keys}
    names = {layer: {key for key in state if key.startswith(f"{name}.{layer}.")} for layer in (0, *layers)}
    moved = {
        f"{name}.{place}.{key.removeprefix(f'{name}.{layer}.')}": state[key]
        for place, layer in enumerate(layers)
        for key in names[layer]
    }
    # The first layer of a T5 holds the relative positions of all.
    first = {key: state[key] for key in names[0] if key.endswith("relative_attention_bias.weight")}
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
    return {key: tensor.clone() for key, tensor in {**rest, **first, **moved}.items()}
