"""OpenVINO: graphs compiled for the CPU, with keys and values inside the graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling_llm2slm import LLM2SLMForConditionalGeneration
from .graph_engine import BF16, FP32, INT4, INT8, GraphEngine


INT4_GROUP = 128


class OpenVINOEngine(GraphEngine):
    """OpenVINO. `"bf16"` weights are also computed in bfloat16."""

    name = "openvino"
    packages = ("openvino",)
    extra = "openvino"
    weights = {"fp32": FP32, "bf16": BF16, "int8": INT8, "int4": INT4}
    benchmarked = ("fp32", "bf16", "int8", "int4")

    def load_graphs(self, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
        import openvino

        # transformers' own runner has one configuration for all graphs, but each has a precision of its own.
        core, threads = openvino.Core(), {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
        options, components = manifest["llm2slm"]["options"], dict(manifest["components"])
        if "prompt" not in components and options["prompt"] != options["step"]:
            components["prompt"] = components["step"]  # one graph, compiled twice: prompts in bf16, steps not
        graphs = {}
        for name, component in components.items():
            file = path / component["file"]
            try:
                graphs[name] = OpenVINOGraph(core.compile_model(file, "CPU", threads | options[name]))
            except RuntimeError as error:  # several lines, the cause last
                raise OSError(f"{file.stem} is damaged: {str(error).strip().splitlines()[-1]}") from error
        return graphs

    def constants(self, file: Path) -> Iterator[tuple[str, Any]]:
        import numpy as np
        import openvino

        for node in openvino.Core().read_model(file).get_ops():
            if node.get_type_name() == "Constant" and node.get_element_type().is_real():
                yield node.get_friendly_name(), node.get_data(dtype=np.float32)

    def exporter(self, weights: str, is_step: bool) -> tuple[Any, Any, Any]:
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        return OpenVINOExporter(), OpenVINOConfig, _quantizer(weights, is_step)

    def run_options(self, model: LLM2SLMForConditionalGeneration, weights: str) -> dict[str, Any]:
        precision = "bf16" if weights == "bf16" else "f32"
        step = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(activation_group(model) if weights.startswith("int") else 0),
        }
        # A prompt has many activations, and between int8 matrices they lose nothing in bf16.
        prompt = step | ({"INFERENCE_PRECISION_HINT": "bf16"} if weights.startswith("int") else {})
        if weights == "int4":  # a group of activations larger than a group of weights takes a slower path
            step["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(gcd(activation_group(model), INT4_GROUP))
        return {"prompt": prompt, "cross": step, "step": step}


class OpenVINOGraph:
    """A compiled graph. Threads that run it wait for one another."""

    def __init__(self, compiled_model: Any):
        self.compiled_model = compiled_model
        self._request = compiled_model.create_infer_request()
        self._lock = threading.Lock()

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with self._lock:
            outputs = self._request.infer(_feed(inputs), share_inputs=True, share_outputs=False)
        return {port.any_name: torch.from_numpy(values) for port, values in outputs.items()}

    def new_state(self) -> OpenVINOState:
        return OpenVINOState(self.compiled_model)


class OpenVINOState:
    """A request of its own, in which the graph keeps keys and values from one run to the next."""

    def __init__(self, compiled_model: Any):
        self._request = compiled_model.create_infer_request()
        self._variables: dict[str, Any] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        """Set the keys and values `(B, heads, N, size)` of a layer, before the first run."""
        from openvino import Tensor

        for kind, tensor in (("keys", keys), ("values", values)):
            self._variable(layer, kind).state = Tensor(tensor.contiguous().numpy(), shared_memory=True)

    def hand_over(self, other: OpenVINOState) -> None:
        """Set the keys and values of another state of the same graph to those of this one, before its first run."""
        for layer in range(len(self._request.query_state()) // 2):
            for kind in ("keys", "values"):
                other._variable(layer, kind).state = self._variable(layer, kind).state

    def _variable(self, layer: int, kind: str) -> Any:
        if not self._variables:
            self._variables = {variable.name: variable for variable in self._request.query_state()}
        return next(found for name, found in self._variables.items() if name.endswith(f".{layer}.{kind}"))

    def run(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
        if rows is None:
            rows = torch.arange(len(inputs["inputs_embeds"]), dtype=torch.int32)
        feed = _feed({**inputs, "beam_idx": rows.int()})
        outputs = self._request.infer(feed, share_inputs=True, share_outputs=False)
        return torch.from_numpy(outputs["logits"])


def activation_group(model: nn.Module) -> int:
    """
    Return how many activations share a scale: the largest power of two up to 256 that divides the width of every
    matrix.
    """
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    return gcd(256, *widths, *(module.nx for module in model.modules() if isinstance(module, Conv1D)))


def _quantizer(weights: str, is_step: bool) -> Any:
    """Use int4 only in the step, which spends its time reading weights; a prompt spends it on int8 arithmetic."""
    if not weights.startswith("int"):
        return None
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

    if weights == "int8" or not is_step:
        return NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode.INT8_SYM))
    # Sensitive weights, the output layer first of all, stay in int8.
    return NNCFOpenVINOQuantizer(
        NNCFWeightCompressionConfig(
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=INT4_GROUP,
            backup_mode=nncf.BackupMode.INT8_SYM,
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        )
    )


def _feed(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
