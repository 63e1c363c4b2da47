"""Weights in blocks that share a scale, for ONNX Runtime's `MatMulNBits`: the fastest matrix products of one token."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers.base import ExportQuantizer


BLOCK = 128
INT8_ACTIVATIONS = 4  # the accuracy level of `MatMulNBits` that computes with int8 instead of floats


class BlockQuantizer(ExportQuantizer):
    """
    Quantizes the weights of matrix products to 4 or 8 bits, in blocks of 128. The output layer keeps 8 bits.

    Args:
        bits: Bits of a weight.
    """

    supported_formats = (ExportFormat.ONNX,)
    required_packages = ("onnx", "onnx_ir", "onnxruntime")

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: ExportFormat) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            onnx_ir.save(model, file, external_data="model.onnx.data")
            proto = onnx.load(file)
        nodes = list(_products(proto.graph))
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        if self.bits == 8:
            proto = _quantize(proto, 8, [])
        else:
            last = _output_layers(proto.graph)
            proto = _quantize(proto, 8, [node.name for node in nodes if node.name not in last])
            proto = _quantize(proto, self.bits, [])
        used = {name for node in proto.graph.node for name in node.input}
        kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        return onnx_ir.from_proto(proto)


def _quantize(proto: Any, bits: int, excluded: list[str]) -> Any:
    quantizer = MatMulNBitsQuantizer(
        proto, bits=bits, block_size=BLOCK, is_symmetric=bits == 8, accuracy_level=INT8_ACTIVATIONS,
        nodes_to_exclude=excluded,
    )  # fmt: skip
    quantizer.process()
    return quantizer.model.model


def _products(graph: Any) -> Iterator[NodeProto]:
    """Yield the nodes of a graph, with products by weights as `MatMul`, which alone are quantized."""
    weights = {tensor.name: tensor for tensor in graph.initializer}

    def transpose(name: str, new: str, axes: Any = None) -> str:
        array = np.ascontiguousarray(np.transpose(numpy_helper.to_array(weights[name]), axes))
        weights[new] = numpy_helper.from_array(array, new)
        graph.initializer.append(weights[new])
        return new

    for number, node in enumerate(graph.node):
        node.name = node.name or f"node_{number}"
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Transpose" and node.input[0] in weights:
            transpose(node.input[0], node.output[0], options.get("perm"))
        elif node.op_type == "Gemm" and node.input[1] in weights and not options.get("transA"):
            weight, (output,), bias = node.input[1], node.output, list(node.input[2:])
            if options.get("transB"):
                weight = transpose(weight, f"{weight}_transposed_for_{node.name}")
            product = f"{output}_product" if bias else output
            yield helper.make_node("MatMul", [node.input[0], weight], [product], name=f"{node.name}_product")
            if bias:
                yield helper.make_node("Add", [product, *bias], [output], name=f"{node.name}_bias")
        else:
            yield node


def _output_layers(graph: Any) -> set[str]:
    """Return the names of the products whose width is that of the logits."""
    logits = next(output for output in graph.output if output.name == "logits")
    size = logits.type.tensor_type.shape.dim[-1].dim_value
    widths = {tensor.name: tensor.dims[-1] for tensor in graph.initializer if tensor.dims}
    return {node.name for node in graph.node if node.op_type == "MatMul" and widths.get(node.input[1]) == size}


__all__ = ["BlockQuantizer"]
