"""A composite becomes graphs of a runtime that answers faster than PyTorch."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.pytorch_utils import Conv1D

from modeling_llm2slm import LLM2SLMForConditionalGeneration
from modeling_llm2slm.engines.exported import EMBEDDINGS, ExportedLLM2SLM, supported_defaults
from modeling_llm2slm.engines.graphs import MANIFEST, check_packages, exported_model_class, read_manifest
from modeling_llm2slm.inference.text_to_text import composite_parts, count_parameters, decoding_modules, load_model
from modeling_llm2slm.parts_llm2slm import reading_arguments

from .output import composite_config, copy_processor, output_folder, size_of
from .report import Report, check_finite, probe


# Bytes of a weight, and how far answers may be from PyTorch's, as a part of the largest logit.
WEIGHTS = {"fp32": (4, 1e-3), "bf16": (2, 0.05), "int8": (1, 0.1), "int4": (0.7, 0.5)}
INT4_GROUP = 128


class PromptGraph(nn.Module):
    """Prompts `(B, N)`, padded right, to what the SLM reads `(B, N, d_slm)`."""

    def __init__(self, model: LLM2SLMForConditionalGeneration):
        super().__init__()
        self.encoder = model.get_encoder()
        # CODEPATH: an encoder-decoder SLM (T5-small) reads the prompt with an encoder of its own.
        self.slm_encoder = model.decoder.get_encoder() if model.config.decoder.is_encoder_decoder else None

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        llm = self.encoder.llm
        outputs = llm(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **reading_arguments(llm))
        if inputs_embeds is None:  # else the fusion reads the SLM's embedding table, which is in no graph
            inputs_embeds = self.encoder.embed_tokens(input_ids)
        prompt = self.encoder.fusion.combine(self.encoder, outputs.last_hidden_state, inputs_embeds)
        if self.slm_encoder is not None:
            prompt = self.slm_encoder(inputs_embeds=prompt, attention_mask=attention_mask).last_hidden_state
        return {"last_hidden_state": prompt}

    def sample(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": torch.full((2, 7), 2), "attention_mask": torch.ones(2, 7).long()}
        # CODEPATH: a fusion that reads the SLM's embedding table.
        if self.encoder.fusion.table == "slm":
            inputs["inputs_embeds"] = torch.zeros(2, 7, self.encoder.config.prompt_size)
        return inputs


class StepGraph(nn.Module):
    """What a decoder-only SLM reads next `(B, M, d_slm)` to the logits `(B, 1, vocabulary)` of what follows."""

    def __init__(self, model: LLM2SLMForConditionalGeneration):
        super().__init__()
        self.slm = model.decoder

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: DynamicCache,
    ) -> dict[str, Any]:
        outputs = self.slm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        return {"logits": outputs.logits, "past_key_values": outputs.past_key_values}

    @torch.no_grad()
    def sample(self) -> dict[str, Any]:
        past, new = 4, 3
        embeds = torch.zeros(2, past + new, self.slm.get_input_embeddings()(torch.tensor([[0]])).shape[-1])
        cache = DynamicCache(config=self.slm.config)
        self.slm(inputs_embeds=embeds[:, :past], past_key_values=cache, use_cache=True)
        return {
            "inputs_embeds": embeds[:, past:].clone(),
            "attention_mask": torch.ones(2, past + new).long(),
            "position_ids": torch.arange(past, past + new).repeat(2, 1),
            "past_key_values": cache,
        }


class CrossGraph(nn.Module):
    """The prompt as an encoder-decoder SLM's encoder read it to the keys and values that each step attends to."""

    def __init__(self, model: LLM2SLMForConditionalGeneration):
        super().__init__()
        self.slm = model.decoder
        self.size = model.config.prompt_size

    def forward(self, last_hidden_state: torch.Tensor) -> dict[str, torch.Tensor]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # What a token makes of them is not asked for, and falls out of the graph.
        token = last_hidden_state[:, :1]
        self.slm.get_decoder()(
            inputs_embeds=token, encoder_hidden_states=last_hidden_state, past_key_values=cache, use_cache=True
        )
        return {
            f"{name}_{index}": tensor
            for index, layer in enumerate(cache.cross_attention_cache.layers)
            for name, tensor in (("cross_keys", layer.keys), ("cross_values", layer.values))
        }

    def sample(self) -> dict[str, Any]:
        return {"last_hidden_state": torch.zeros(2, 7, self.size)}


class CrossStepGraph(nn.Module):
    """As [`StepGraph`], of an encoder-decoder SLM: `attention_mask` `(B, N)` is the prompt's."""

    def __init__(self, model: LLM2SLMForConditionalGeneration):
        super().__init__()
        self.slm = model.decoder
        self.cross = CrossGraph(model)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: DynamicCache,
        **cross: torch.Tensor,
    ) -> dict[str, Any]:
        prompt = DynamicCache()
        for index in range(len(cross) // 2):
            prompt.update(cross[f"cross_keys_{index}"], cross[f"cross_values_{index}"], index)
        cache = EncoderDecoderCache(past_key_values, prompt)
        # Only the width of the prompt's states is looked at: their keys and values are in the cache.
        states = inputs_embeds.new_zeros(*attention_mask.shape, self.cross.size)
        outputs = self.slm(
            decoder_inputs_embeds=inputs_embeds,
            encoder_outputs=(states,),
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return {"logits": outputs.logits[:, -1:], "past_key_values": past_key_values}

    @torch.no_grad()
    def sample(self) -> dict[str, Any]:
        past, new = 4, 3
        cross = self.cross.sample()["last_hidden_state"]
        embeds = torch.zeros(2, past + new, self.slm.get_input_embeddings()(torch.tensor([[0]])).shape[-1])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.slm.get_decoder()(
            inputs_embeds=embeds[:, :past], encoder_hidden_states=cross, past_key_values=cache, use_cache=True
        )
        return {
            "inputs_embeds": embeds[:, past:].clone(),
            "attention_mask": torch.ones(cross.shape[:2]).long(),
            "past_key_values": cache.self_attention_cache,
            **self.cross(cross),
        }


def graphs_of(model: LLM2SLMForConditionalGeneration) -> dict[str, Any]:
    """The modules that become graphs, by name."""
    # CODEPATH: encoder-decoder SLMs (T5-small) against decoder-only ones (GPT-2).
    if model.config.decoder.is_encoder_decoder:
        return {"prompt": PromptGraph(model), "cross": CrossGraph(model), "step": CrossStepGraph(model)}
    return {"prompt": PromptGraph(model), "step": StepGraph(model)}


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    runtime: str = "openvino",
    weights: str = "fp32",
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """
    Write graphs that a runtime computes, with all that they need to answer.

    Args:
        checkpoint: Folder or repository of a composite.
        output: The folder to write to.
        runtime: `"openvino"` or `"onnx"`.
        weights: What matrices are stored in: `"fp32"`, `"bf16"` (OpenVINO alone; computed in it, too), `"int8"` (one
            scale per row, activations quantized as they come), `"int4"` (the SLM's blocks in groups of 128; the rest
            int8).
        overwrite: Replace what is there.
        progress: Told what is being done.

    Raises:
        ImportError: If the runtime is not installed.
        OSError: If something cannot be read or written.
        ValueError: If the result does not answer as the checkpoint does.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"There are no weights {weights!r}. Choose one of: {', '.join(WEIGHTS)}.")
    if runtime == "onnx" and weights == "bf16":
        raise ValueError("ONNX Runtime has no bf16 on a CPU. Choose fp32, int8 or int4, or --runtime openvino.")
    check_packages(runtime, *(("nncf",) if weights.startswith("int") else ()))
    exported_model = exported_model_class()
    composite_config(checkpoint)
    progress("loading")
    model = load_model(LLM2SLMForConditionalGeneration, checkpoint, dtype=torch.float32)
    model.float().eval()  # an LLM with a dtype of its own keeps that in a load
    state = model.state_dict()
    check_finite(state)
    expected = output_logits(model)
    report = Report(f"{checkpoint} becomes {output} for {runtime}, weights in {weights}")
    size, tolerance = WEIGHTS[weights]
    needed = int(size_of(state) / 4 * size)
    with output_folder(output, overwrite, needed) as folder:
        folder.mkdir()
        details = describe(model, weights)
        graphs = {name: (graph.eval(), graph.sample()) for name, graph in graphs_of(model).items()}
        save_file({"weight": embeddings_of(model.decoder, weights)}, folder / EMBEDDINGS)
        if weights == "bf16":
            model.to(torch.bfloat16)
        components = {}
        with quiet_exporters():
            for name, (graph, sample) in graphs.items():
                progress(f"exporting {name}")
                components[name] = component(graph, sample, runtime, weights, is_step=name == "step")
        progress("writing")
        defaults = supported_defaults(model.generation_config)
        exported_model(components, runtime, model.config, defaults).save_pretrained(folder)
        manifest = json.dumps({**read_manifest(folder), "llm2slm": details}, indent=2)
        (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        copy_processor(checkpoint, folder, report)
        del components
        progress("comparing")
        written = ExportedLLM2SLM.from_pretrained(folder)
        report.compare("answers", (output_logits(written), expected), tolerance)
        report.add("bytes", sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    return report


def component(graph: Any, sample: dict[str, Any], runtime: str, weights: str, is_step: bool) -> Any:
    """A module, and a sample of its inputs, as a component of an exported model."""
    from transformers.exporters import OnnxConfig, OnnxExporter, OpenVINOConfig, OpenVINOExporter

    if runtime == "onnx":
        exporter, config_class, quantizer = OnnxExporter(), OnnxConfig, onnx_quantizer(weights, is_step)
    else:
        exporter, config_class, quantizer = OpenVINOExporter(), OpenVINOConfig, openvino_quantizer(weights, is_step)
    config = config_class(dynamic_shapes=dynamic_shapes(sample), quantizer=quantizer)
    with torch.no_grad():
        return exporter.export(graph, sample, config).components["model"]


def dynamic_shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Which axes of a graph's inputs vary: rows, and lengths. To name them spares finding out about all others."""
    from transformers.exporters.utils import get_leaf_tensors

    def vary(tensor: torch.Tensor) -> dict[int, Any]:
        axes = (0, 2) if tensor.dim() == 4 else (0, 1)  # keys and values are (B, heads, N, width)
        return {axis: torch.export.Dim.AUTO for axis in axes if axis < tensor.dim()}

    return {
        name: vary(value)
        if isinstance(value, torch.Tensor)
        else [vary(tensor) for tensor in get_leaf_tensors(value).values()]
        for name, value in inputs.items()
    }


def openvino_quantizer(weights: str, is_step: bool) -> Any:
    """int4 only in the step, whose time is that of reading weights; a prompt's is that of arithmetic in int8."""
    if not weights.startswith("int"):
        return None
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

    if weights == "int8" or not is_step:
        return NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode.INT8_SYM))
    return NNCFOpenVINOQuantizer(int4_weights())


def onnx_quantizer(weights: str, is_step: bool) -> Any:
    """As [`openvino_quantizer`], with what ONNX Runtime computes: int8 by its own tools, int4 as `MatMulNBits`."""
    if not weights.startswith("int"):
        return None
    from transformers.exporters import NNCFOnnxQuantizer, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    if weights == "int8" or not is_step:
        return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    return NNCFOnnxQuantizer(int4_weights())


def int4_weights() -> Any:
    """int4 in groups; what is sensitive, the head first of all, in int8."""
    import nncf
    from transformers.exporters import NNCFWeightCompressionConfig

    return NNCFWeightCompressionConfig(
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=INT4_GROUP,
        backup_mode=nncf.BackupMode.INT8_SYM,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        ),
    )


def describe(model: LLM2SLMForConditionalGeneration, weights: str) -> dict[str, Any]:
    """What `export.json` says beside what transformers writes: how the graphs are to be run, and what they are of."""
    precision = "bf16" if weights == "bf16" else "f32"
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(activation_group(model) if weights.startswith("int") else 0),
    }
    # Between matrices in int8 a prompt's activations lose nothing in bf16, and there are many of them.
    prompt = options | ({"INFERENCE_PRECISION_HINT": "bf16"} if weights.startswith("int") else {})
    if weights == "int4":  # a group of activations that is larger than one of weights takes a slower path
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(gcd(activation_group(model), INT4_GROUP))
    parts = {part.name: part.parameters for part in composite_parts(model)}
    decode = count_parameters(*decoding_modules(model.decoder))
    return {
        "weights": weights,
        "options": {"prompt": prompt, "cross": options, "step": options},
        "parameters": parts,
        "decode": decode,
    }


def activation_group(model: nn.Module) -> int:
    """So many activations share a scale: the largest power of two up to 256 that divides the rows of all matrices."""
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    return gcd(256, *widths, *(module.nx for module in model.modules() if isinstance(module, Conv1D)))


def embeddings_of(slm: Any, weights: str) -> torch.Tensor:
    """What the SLM's embedding gives for each token `(vocabulary, d_slm)`, with a scale that it may have (Gemma)."""
    embedding = slm.get_input_embeddings()
    with torch.no_grad():
        table = embedding(torch.arange(embedding.num_embeddings))
    return table.to(torch.float32 if weights == "fp32" else torch.bfloat16).contiguous()


@torch.no_grad()
def output_logits(model: Any) -> torch.Tensor:
    """What a composite, exported or not, says after each token of an answer to a probe, `(1, M, vocabulary)`."""
    config = model.config
    prompt, answer = probe(config.encoder.vocab_size), probe(config.vocab_size)
    if not isinstance(model, ExportedLLM2SLM):
        return model(input_ids=prompt, decoder_input_ids=answer).logits
    cache, logits = model.new_cache(), []
    for token in answer.split(1, dim=1):
        logits.append(model(input_ids=prompt, decoder_input_ids=token, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Without notes on versions and shapes, which are ours to look after, and tables of what was quantized."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)
