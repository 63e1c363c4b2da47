"""ONNX Runtime: graphs that take keys and values as inputs and return longer ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .graph_engine import FP32, INT4, INT8, GraphEngine, exported_model_class
from .graphs import PromptGraph


PAST = "input.past_key_values.layers"


class ONNXEngine(GraphEngine):
    """ONNX Runtime on the CPU, which does not compute in bfloat16."""

    name = "onnx"
    packages = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnx"
    weights = {"fp32": FP32, "int8": INT8, "int4": INT4}
    benchmarked = ("fp32", "int8", "int4")

    def quantizers(self, weights: str) -> tuple[str, ...]:
        return ()  # ONNX Runtime has its own

    def load_graphs(self, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
        exported_model = exported_model_class()
        from onnxruntime import SessionOptions

        session_options = SessionOptions()
        session_options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait in a loop would hold up those of torch, and of the other graphs.
        session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        exported = exported_model.from_pretrained(path, device="cpu", session_options=session_options)
        config = AutoConfig.from_pretrained(path)
        window = getattr(getattr(config, "decoder", config), "sliding_window", None)
        return {name: ONNXGraph(runner, window) for name, runner in exported.runners.items()}

    def constants(self, file: Path) -> Iterator[tuple[str, Any]]:
        import onnx

        for tensor in onnx.load(str(file), load_external_data=False).graph.initializer:
            values = onnx.numpy_helper.to_array(tensor, str(file.parent))
            if values.dtype.kind == "f":
                yield tensor.name, values

    def component(self, graph: Any, sample: dict[str, Any], weights: str, is_step: bool) -> Any:
        # Activations of decoder-only LLMs have outliers, and one scale for all of them would lose the others.
        if isinstance(graph, PromptGraph) and type(graph.encoder.llm.config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return super().component(graph, sample, "int8" if weights == "int4" else weights, is_step=True)
        return super().component(graph, sample, weights, is_step)

    def exporter(self, weights: str, is_step: bool) -> tuple[Any, Any, Any]:
        from transformers.exporters import OnnxConfig, OnnxExporter

        return OnnxExporter(), OnnxConfig, _quantizer(weights, is_step)


class ONNXGraph:
    """
    A session of ONNX Runtime. Several threads may run it at once.

    Args:
        runner: transformers' runner of the graph.
        window: The sliding window of the model, which its step takes as an input.
    """

    def __init__(self, runner: Any, window: int | None = None):
        self.runner = runner
        self.window = window

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.runner(**inputs)

    def new_state(self) -> ONNXState:
        return ONNXState(self.runner.session, self.window)


class ONNXState:
    """The keys and values of one generation, which stay in ONNX Runtime from one run to the next."""

    def __init__(self, session: Any, window: int | None):
        self._session = session
        self._window = window
        self._inputs = {spec.name: spec for spec in session.get_inputs()}
        self._past_inputs = [spec for name, spec in self._inputs.items() if name.startswith(PAST)]
        self._outputs = [spec.name for spec in session.get_outputs()]
        self._past: dict[str, Any] = {}  # by the names of inputs

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        """Set the keys and values `(B, heads, N, size)` of a layer, before the first run."""
        for kind, tensor in (("keys", keys), ("values", values)):
            self._past[f"{PAST}.{layer}.{kind}"] = _value(tensor.numpy())

    def run(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
        if rows is not None:
            for name, value in self._past.items():
                if value.shape():
                    self._past[name] = _value(value.numpy()[rows.numpy()])
        if len(self._past) < len(self._past_inputs):
            self._begin(len(inputs["inputs_embeds"]))
        given = {name: _value(tensor.numpy()) for name, tensor in inputs.items() if name in self._inputs}
        values = self._session.run_with_ort_values(self._outputs, {**given, **self._past})
        found = dict(zip(self._outputs, values, strict=True))
        logits = torch.from_numpy(found.pop("logits").numpy())
        self._past |= {f"in{name.removeprefix('out')}": value for name, value in found.items()}
        return logits

    def _begin(self, rows: int) -> None:
        """Add keys and values of length 0 where none are set, in the shapes that the graph was traced with."""
        for spec in self._past_inputs:
            if spec.name not in self._past:
                is_window = not spec.shape
                shape = () if is_window else (rows, spec.shape[1], 0, spec.shape[3])
                array = np.full(shape, self._window if is_window else 0, dtype=np.int64 if is_window else np.float32)
                self._past[spec.name] = _value(array)


def _value(array: np.ndarray) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array) if array.ndim else array)


def _quantizer(weights: str, is_step: bool) -> Any:
    """
    Return the quantizer: blocks of weights in the step, which reads them for one token; ONNX Runtime's own int8, with
    larger matrix products, for prompts.
    """
    if not weights.startswith("int"):
        return None
    if is_step:
        from .onnx_blocks import BlockQuantizer

        return BlockQuantizer(int(weights.removeprefix("int")))
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
