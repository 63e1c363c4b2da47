"""Import trained weights of other composite models, as far as they have a counterpart here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, EncoderDecoderConfig

from modeling_llm2slm.data.parsing import read_json
from modeling_llm2slm.files_llm2slm import open_weights, shape_of, weight_files
from modeling_llm2slm.inference.model import LLM2SLMForConditionalGeneration
from modeling_llm2slm.parts_llm2slm import llm_class, slm_class
from modeling_llm2slm.states.loading import check_finite, load, load_model, with_article

from .output import composite_config, converts, copy_processor, output_folder, size_of
from .parts import part_of_state
from .report import Report, composite_logits, groups, probe, slm_logits


CROSS_ATTENTION = (".crossattention.", ".ln_cross_attn.")
# Names that LLaVA and its descendants give to a projector of two layers.
KNOWN_NAMES = {
    "multi_modal_projector.linear_1": "projector.linear_1",
    "multi_modal_projector.linear_2": "projector.linear_2",
    "model.multi_modal_projector.linear_1": "projector.linear_1",
    "model.multi_modal_projector.linear_2": "projector.linear_2",
    "mm_projector.0": "projector.linear_1",
    "mm_projector.2": "projector.linear_2",
    "model.mm_projector.0": "projector.linear_1",
    "model.mm_projector.2": "projector.linear_2",
}


@converts
def import_encoder_decoder(
    checkpoint: str | Path, output: str | Path, *, fusion: str = "add", overwrite: bool = False
) -> Report:
    """
    Convert an `EncoderDecoderModel`: its encoder becomes the LLM, its decoder without cross-attention the SLM.

    The weights of cross-attention have no counterpart here, so the result has to be trained, with its new projector.

    Args:
        checkpoint: Folder of the `EncoderDecoderModel`, or its name on the Hub: a T5-family encoder, a GPT-2 decoder.
        output: The folder to write to.
        fusion: Fusion of the result, see [`LLM2SLMConfig`].
        overwrite: Replace an existing folder.

    Raises:
        OSError: If something cannot be read or written.
        ValueError: If the checkpoint is another kind of model.
    """
    config = load(AutoConfig, checkpoint)
    if not isinstance(config, EncoderDecoderConfig):
        raise ValueError(
            f"{checkpoint} is {with_article(config.model_type)} model, not an encoder-decoder of two models."
        )
    on_hub = not Path(checkpoint).is_dir()
    weights = open_weights(weight_files(checkpoint, on_hub))
    report, parts = Report(f"{checkpoint} becomes the LLM-to-SLM checkpoint {output}"), {}
    dropped = {name for name in weights if not name.startswith(("encoder.", "decoder."))}
    for part, find_class in (("encoder", llm_class), ("decoder", slm_class)):
        state = {name: tensor for name, tensor in weights.items() if name.startswith(f"{part}.")}
        crossing = {name for name in state if any(mark in name for mark in CROSS_ATTENTION)}
        dropped |= crossing
        state = {name.removeprefix(f"{part}."): state[name][...] for name in state.keys() - crossing}
        check_finite(state, checkpoint)
        part_config = getattr(config, part)
        part_config.add_cross_attention = False
        parts[f"{part}_model"] = taken = part_of_state(checkpoint, find_class(part_config), part_config, state)
        unused = state.keys() - taken.state_dict().keys()
        dropped |= {f"{part}.{name}" for name in unused}  # such as the decoder of a T5 that is the encoder here
        report.add(f"tensors of the {'LLM' if part == 'encoder' else 'SLM'} imported", len(state) - len(unused))
    report.add("not imported", groups(dropped, _group))
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(**parts, fusion=fusion)
    model.config.llm_source = model.config.slm_source = None  # neither part is a checkpoint of its own
    report.add("projector", "new: train the result")
    with output_folder(output, (checkpoint,), size_of(model.state_dict())) as folder:
        model.save_pretrained(folder, card={"name": Path(output).name})
        copy_processor(checkpoint, folder, report)
        written = load_model(LLM2SLMForConditionalGeneration, folder)
        prompt, probed = probe(config.encoder.vocab_size), probe(model.config.vocab_size)
        with torch.no_grad():
            llms = written.encoder.llm, parts["encoder_model"]
            hidden_states = [llm(input_ids=prompt).last_hidden_state for llm in llms]
        report.compare("hidden states of the LLM", hidden_states)
        logits = [slm_logits(slm, probed) for slm in (written.decoder, parts["decoder_model"])]
        report.compare("logits of the SLM", logits)
    return report


def _group(name: str) -> str:
    """Return the group of a tensor that is not imported."""
    mark = next((mark for mark in CROSS_ATTENTION if mark in name), None)
    return mark.strip(".") if mark else ".".join(name.split(".")[: 2 if name.startswith("encoder.") else 1])


@converts
def import_projector(
    projector: str | Path,
    into: str | Path,
    output: str | Path,
    *,
    mapping: str | Path | None = None,
    include_llm: bool = True,
    overwrite: bool = False,
) -> Report:
    """
    Replace the projector of an LLM-to-SLM checkpoint by one of two linear layers from another model.

    Args:
        projector: A safetensors file with its tensors; other tensors of the file are ignored.
        into: Folder of the LLM-to-SLM checkpoint, or its name on the Hub.
        output: The folder to write to.
        mapping:
            A JSON file that maps names in `projector` to names here: `projector.linear_1.weight`,
            `projector.linear_1.bias`, the same for `linear_2`, and `prompt_embedding.weight`; a name without
            `.weight` and `.bias` stands for both. Default: the names that LLaVA uses.
        include_llm: Whether the result contains the LLM.
        overwrite: Replace an existing folder.

    Raises:
        OSError: If something cannot be read or written.
        ValueError: If a name is unknown, or if a tensor is missing or has another shape.
    """
    composite_config(into)
    model = load_model(LLM2SLMForConditionalGeneration, into)
    names = KNOWN_NAMES if mapping is None else _read_mapping(mapping)
    tensors = open_weights([projector])
    found = _rename(tensors, names, complete=mapping is not None)
    width = model.config.llm_hidden_size
    if model.encoder.projector is not None:  # one from elsewhere reads hidden states as they are
        for name, default in (("projector.mean", torch.zeros(width)), ("projector.scale", torch.ones(width))):
            found.setdefault(name, tensors.get(name, default))
    report = Report(f"The projector of {projector} and the rest of {into} become {output}")
    _copy_into(model, found, projector)
    report.add("tensors imported", ", ".join(sorted(found)))
    report.add("not imported", "the activation: a projector here has ReLU, one of LLaVA has GELU")
    expected = composite_logits(model)
    named = None if include_llm else model.config.llm_source
    with output_folder(output, (projector, into, mapping), size_of(model.state_dict()), named) as folder:
        model.save_pretrained(folder, include_llm, card={"name": Path(output).name})
        copy_processor(into, folder, report)
        written = load_model(LLM2SLMForConditionalGeneration, folder)
        report.compare("outputs", (composite_logits(written), expected))
    return report


def _read_mapping(file: str | Path) -> dict[str, str]:
    try:
        names = read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no mapping {file}.") from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f'{file} is not a mapping of names such as {{"mm_projector.0": "projector.linear_1"}}.')
    return names


def _rename(tensors: dict[str, Any], names: dict[str, str], complete: bool) -> dict[str, Any]:
    """Return tensors under their names here. With `complete`, every name of the mapping must be in the file."""
    found = {}
    for theirs, ours in names.items():
        matches = [ending for ending in ("", ".weight", ".bias") if theirs + ending in tensors]
        if complete and not matches:
            raise ValueError(f"The file has no {theirs}; it has {', '.join(sorted(tensors)[:8])}.")
        found.update({ours + ending: tensors[theirs + ending] for ending in matches})
    return found


def _copy_into(model: Any, found: dict[str, Any], projector: str | Path) -> None:
    own = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    own = {name: tensor for name, tensor in own.items() if name.startswith(("projector.", "prompt_embedding."))}
    for name in found.keys() - own.keys():
        raise ValueError(f"The checkpoint has no {name}; it has {', '.join(own)}.")
    for name in own.keys() - found.keys():
        if name.startswith("projector."):
            raise ValueError(f"{projector} has no tensor for {name}. Map its names with --mapping.")
    for name, tensor in found.items():
        if shape_of(tensor) != tuple(own[name].shape):
            raise ValueError(
                f"{name} has shape {shape_of(tensor)} in {projector}, but {tuple(own[name].shape)} here: the "
                "projector belongs to models of other widths."
            )
    values = {name: tensor[...] for name, tensor in found.items()}
    check_finite(values, projector)
    with torch.no_grad():
        for name, tensor in values.items():
            own[name].copy_(tensor)
