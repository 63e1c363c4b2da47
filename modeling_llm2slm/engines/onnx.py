"""ONNX Runtime: graphs that take keys and values as inputs and return longer ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .graph_engine import FP32, INT4, INT8, GraphEngine, exported_model_class, int4_weights


class ONNXEngine(GraphEngine):
    """ONNX Runtime on the CPU, which does not compute in bfloat16."""

    name = "onnx"
    packages = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnx"
    weights = {"fp32": FP32, "int8": INT8, "int4": INT4}
    benchmarked = ("fp32", "int8")

    def load_graphs(self, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
        exported_model = exported_model_class()
        from onnxruntime import SessionOptions

        session_options = SessionOptions()
        session_options.intra_op_num_threads = torch.get_num_threads()
        exported = exported_model.from_pretrained(path, device="cpu", session_options=session_options)
        return {name: ONNXGraph(runner) for name, runner in exported.runners.items()}

    def constants(self, file: Path) -> Iterator[tuple[str, Any]]:
        import onnx

        for tensor in onnx.load(str(file), load_external_data=False).graph.initializer:
            values = onnx.numpy_helper.to_array(tensor, str(file.parent))
            if values.dtype.kind == "f":
                yield tensor.name, values

    def exporter(self, weights: str, is_step: bool) -> tuple[Any, Any, Any]:
        from transformers.exporters import OnnxConfig, OnnxExporter

        return OnnxExporter(), OnnxConfig, _quantizer(weights, is_step)


class ONNXGraph:
    """A session of ONNX Runtime. Several threads may run it at once."""

    def __init__(self, runner: Any):
        self.runner = runner

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.runner(**inputs)

    def new_state(self) -> ONNXState:
        return ONNXState(self.runner)


class ONNXState:
    """The keys and values of one generation."""

    def __init__(self, runner: Any):
        self._runner = runner
        self._cache: DynamicCache | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        """Set the keys and values `(B, heads, N, size)` of a layer, before the first run."""
        self._cache = self._cache or DynamicCache()
        self._cache.update(keys, values, layer)

    def run(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
        if self._cache is None:
            self._cache = self._empty(len(inputs["inputs_embeds"]))
        elif rows is not None:
            self._cache.batch_select_indices(rows)
        outputs = self._runner(**inputs, past_key_values=self._cache)
        self._cache = outputs["past_key_values"]
        return outputs["logits"]

    def _empty(self, rows: int) -> DynamicCache:
        """Return keys and values of length 0, in the shapes that the graph was traced with."""
        inputs = self._runner.session.get_inputs()
        shapes = [spec.shape for spec in inputs if spec.name.endswith((".keys", ".values"))]
        tensors = [torch.zeros(rows, heads, 0, width) for _, heads, _, width in shapes]
        return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))


def _quantizer(weights: str, is_step: bool) -> Any:
    """Return the quantizer: ONNX Runtime's own for int8; NNCF for int4 (`MatMulNBits`), in the step only."""
    if not weights.startswith("int"):
        return None
    from transformers.exporters import NNCFOnnxQuantizer, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    if weights == "int8" or not is_step:
        return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    return NNCFOnnxQuantizer(int4_weights())
