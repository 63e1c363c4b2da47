"""AOTInductor: graphs that PyTorch compiles to machine code. A step costs little besides its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticLayer

from ..data.parsing import read_json
from ..inference.engine import engine
from ..inference.model import LLM2SLMForConditionalGeneration
from .exported import FIX, MANIFEST
from .graph_engine import FP32, INT8, GraphEngine


CAPACITY = 64  # keys and values are allocated for a multiple of this many tokens
SLIDING = "sliding_attention"
READER = "openvino"  # the engine that reads prompts in int8
EACH = ("inputs_embeds", "position_ids")  # inputs of a step that have a column for each token
# Kernels are compiled for one thread: more cost a small model more than they save. Matrix products use torch's.
OPTIONS = {"cpp.threads": 1}


class InductorEngine(GraphEngine):
    """
    AOTInductor on the CPU. Exporting compiles for this processor, which needs a C++ compiler and takes minutes;
    loading needs torch only. It has the smallest fixed cost of a step: choose it for small SLMs.

    With `"int8"` weights, OpenVINO reads the prompt in int8, which is most of the arithmetic. Steps stay in float32:
    the weights of a small SLM fit into the processor's caches.
    """

    name = "inductor"
    weights = {"fp32": FP32, "int8": INT8}
    benchmarked = ("fp32", "int8")
    files = (MANIFEST, "*.safetensors", "*.pt2", "*.xml", "*.bin")

    def quantizers(self, weights: str) -> tuple[str, ...]:
        return (READER, *super().quantizers(weights)) if weights == "int8" else ()

    def check_export(self, weights: str) -> None:
        super().check_export(weights)
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ImportError("Exporting for inductor needs a C++ compiler: install g++ or clang.") from error

    def run_options(self, model: LLM2SLMForConditionalGeneration, weights: str) -> dict[str, Any]:
        return _reader().run_options(model, weights) if weights == "int8" else {}

    def load_graphs(self, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
        graphs: dict[str, Any] = {}
        for name, component in manifest["components"].items():
            if not component["file"].endswith(".pt2"):
                _reader().check_installed()
                graphs |= _reader().load_graphs(path, {**manifest, "components": {name: component}})
                continue
            try:
                compiled = torch._inductor.aoti_load_package(str(path / component["file"]))
            except RuntimeError as error:
                raise OSError(f"{component['file']} is damaged, or was compiled for another machine. {FIX}") from error
            graphs[name] = InductorGraph(compiled.loader, component["inputs"], component["outputs"])
        graphs["step"].first = graphs.get("first")
        return graphs

    def constants(self, file: Path) -> Iterator[tuple[str, Any]]:
        # Those of machine code are part of it, and were checked in the checkpoint it was compiled from.
        return iter(()) if file.suffix == ".pt2" else _reader().constants(file)

    def exporter(self, weights: str, is_step: bool) -> tuple[Any, Any, Any]:
        raise NotImplementedError  # `_write_graphs` needs none

    def _write_graphs(self, model: Any, folder: Path, weights: str, graphs: dict[str, Any], progress: Any) -> None:
        slm = graphs["step"].slm
        if isinstance(model, LLM2SLMForConditionalGeneration) and model.encoder.fusion.fills_cache:
            raise ValueError(f'Inductor does not export `fusion="{model.config.fusion}"`. Use openvino.')
        if SLIDING in (getattr(slm.config, "layer_types", None) or ()):
            raise ValueError("The SLM has sliding-window layers, which inductor does not export. Use openvino.")
        if "cross" in graphs:
            graphs["step"] = BufferedCrossStep(slm, graphs["step"].cross.size)
        else:
            graphs |= {"first": FirstStep(slm), "step": BufferedStep(slm)}
        components: dict[str, Any] = {}
        if weights == "int8":
            if "prompt" not in graphs:
                raise ValueError("Inductor quantizes the LLM of an LLM-to-SLM model only. Use fp32, or openvino.")
            _reader()._write_graphs(model, folder, weights, {"prompt": graphs.pop("prompt")}, progress)
            components |= read_json(folder / MANIFEST)["components"]
        for name, graph in graphs.items():
            progress(f"compiling {name}")
            components[name] = _compile(graph.eval(), folder / f"{name}.pt2")
        self.write_manifest(folder, model, components)


def _reader() -> Any:
    return engine(READER)


@torch.no_grad()
def _compile(graph: Any, file: Path) -> dict[str, Any]:
    """Compile a module for all batch sizes and lengths; return its component of the manifest."""
    sample = graph.sample()
    outputs = graph(**sample)
    program = torch.export.export(graph, (), sample, dynamic_shapes={name: _vary(one) for name, one in sample.items()})
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=OPTIONS)
    return {"file": file.name, "inputs": list(sample), "outputs": list(outputs)}


def _vary(value: Any) -> Any:
    """Return the axes that vary: rows, lengths, and of keys and values `(B, heads, S, width)` rows and lengths."""
    if isinstance(value, list):
        return [_vary(one) for one in value]
    axes = {4: (0, 2), 1: ()}.get(value.dim(), (0, 1))
    return {axis: torch.export.Dim.AUTO for axis in axes if value.shape[axis] > 1}


class InductorGraph:
    """A compiled graph. Several threads may run it; they wait for one another."""

    def __init__(self, loader: Any, inputs: list[str], outputs: list[str]):
        self.loader = loader
        self.inputs = inputs
        self.outputs = outputs
        self.first: InductorGraph | None = None  # of the step of a decoder-only SLM: it reads the prompt

    @torch.no_grad()
    def run(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        tensors = tree_leaves([inputs[name] for name in self.inputs])
        values = self.loader.run([tensor.contiguous() for tensor in tensors])
        return dict(zip(self.outputs, values, strict=True))

    def new_state(self) -> InductorState:
        return InductorState(self)


class InductorState:
    """
    The keys and values of one generation, in buffers that a step writes to in place. They have space for more tokens,
    so that their shapes change once in many steps.
    """

    def __init__(self, step: InductorGraph):
        self._step = step
        self._keys: list[torch.Tensor] = []  # of each layer: (B, heads, S, width)
        self._values: list[torch.Tensor] = []
        self._mask = torch.zeros(0, 0)  # (B, S): of the prompt, and ones; for an encoder-decoder SLM not read
        self._length = 0

    def run(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
        if not self._keys and self._step.first is not None:
            return self._read_prompt(inputs)
        if not self._keys:
            crossed = [value for name, value in inputs.items() if name.startswith("cross_keys")]
            self._keys, self._values = ([one.new_zeros(one[:, :, :0].shape) for one in crossed] for _ in range(2))
        if rows is not None:
            self._continue(rows)
        logits = [self._read_one(inputs, index) for index in range(inputs["inputs_embeds"].shape[1])]
        return logits[-1]

    def _continue(self, rows: torch.Tensor) -> None:
        """Let each row continue another one. Of large buffers, only what was written is copied."""
        tensors = [*self._keys, *self._values]
        if len(rows) == len(tensors[0]):
            for tensor in tensors:
                written = tensor[:, :, : self._length]
                written.copy_(written.index_select(0, rows))
        else:
            tensors = [tensor.index_select(0, rows) for tensor in tensors]
            self._keys, self._values = tensors[: len(self._keys)], tensors[len(self._keys) :]
        self._mask = self._mask.index_select(0, rows) if self._mask.numel() else self._mask

    def _read_prompt(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        assert self._step.first is not None
        outputs = self._step.first.run(inputs)
        logits = outputs.pop("logits")
        tensors = list(outputs.values())
        self._keys, self._values = tensors[::2], tensors[1::2]
        self._mask, self._length = inputs["attention_mask"], inputs["attention_mask"].shape[1]
        return logits

    def _read_one(self, inputs: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if self._length == self._keys[0].shape[2]:
            self._grow()
        now: dict[str, Any] = {name: inputs[name][:, index : index + 1] for name in EACH if name in inputs}
        cross = [value for name, value in inputs.items() if name.startswith("cross")]
        now |= {"cross_keys": cross[::2], "cross_values": cross[1::2]}
        now["attention_mask"] = inputs["attention_mask"] if cross else self._mask
        now |= {"place": torch.tensor([self._length]), "keys": self._keys, "values": self._values}
        self._length += 1
        return self._step.run(now)["logits"]

    def _grow(self) -> None:
        more = CAPACITY * (1 + self._length // CAPACITY) - self._keys[0].shape[2]
        tensors = [nn.functional.pad(one, (0, 0, 0, more)) for one in (*self._keys, *self._values)]
        self._keys, self._values = tensors[: len(self._keys)], tensors[len(self._keys) :]
        self._mask = nn.functional.pad(self._mask, (0, more), value=1)


class FirstStep(nn.Module):
    """Reads `[P ; E(start)]` `(B, T, d_slm)` with a decoder-only SLM: logits, and keys and values of each layer."""

    def __init__(self, slm: Any):
        super().__init__()
        self.slm = slm

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        cache = DynamicCache()
        outputs = self.slm(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        named = {"logits": outputs.logits}
        for index, layer in enumerate(cache.layers):
            named |= {f"keys_{index}": layer.keys, f"values_{index}": layer.values}
        return named

    def sample(self) -> dict[str, Any]:
        embeds = torch.zeros(2, 7, self.slm.get_input_embeddings()(torch.tensor([[0]])).shape[-1])
        return {
            "inputs_embeds": embeds,
            "attention_mask": torch.ones(2, 7).long(),
            "position_ids": torch.arange(7).repeat(2, 1),
        }


class BufferedStep(nn.Module):
    """
    Reads one embedding `(B, 1, d_slm)` with a decoder-only SLM, and returns logits `(B, 1, vocabulary)`.

    It writes keys and values to `place` of buffers `(B, heads, S, width)`, and attends to no later place.
    """

    def __init__(self, slm: Any):
        super().__init__()
        self.slm = slm

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        place: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        outputs = self.slm(
            inputs_embeds=inputs_embeds, attention_mask=causal_mask(place, keys[0], attention_mask),
            position_ids=position_ids, past_key_values=buffers(place, keys, values), use_cache=True,
            logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        return {"logits": outputs.logits}

    @torch.no_grad()
    def sample(self) -> dict[str, Any]:
        first = FirstStep(self.slm)
        outputs = first(**first.sample())
        del outputs["logits"]
        tensors = [one.new_zeros(2, one.shape[1], CAPACITY, one.shape[3]) for one in outputs.values()]
        return {
            "inputs_embeds": first.sample()["inputs_embeds"][:, :1].clone(),
            "attention_mask": torch.ones(2, CAPACITY).long(),
            "position_ids": torch.full((2, 1), 7),
            "place": torch.tensor([7]),
            "keys": tensors[::2],
            "values": tensors[1::2],
        }


class BufferedCrossStep(nn.Module):
    """[`BufferedStep`] for an encoder-decoder SLM: `attention_mask` `(B, N)` is the prompt's."""

    def __init__(self, slm: Any, size: int):
        super().__init__()
        self.slm = slm
        self.size = size

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        place: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        cross_keys: list[torch.Tensor],
        cross_values: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        prompt = DynamicCache()
        for index, pair in enumerate(zip(cross_keys, cross_values, strict=True)):
            prompt.update(*pair, index)
        outputs = self.slm(
            decoder_inputs_embeds=inputs_embeds, decoder_attention_mask=causal_mask(place, keys[0]),
            # The model reads only the width of these: their keys and values are in the cache.
            encoder_outputs=(inputs_embeds.new_zeros(*attention_mask.shape, self.size),),
            attention_mask=attention_mask, past_key_values=EncoderDecoderCache(buffers(place, keys, values), prompt),
            use_cache=True, return_dict=True,
        )  # fmt: skip
        return {"logits": outputs.logits}

    @torch.no_grad()
    def sample(self) -> dict[str, Any]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        states, embeds = torch.zeros(2, 7, self.size), self.slm.get_input_embeddings()(torch.zeros(2, 1).long())
        self.slm.get_decoder()(
            inputs_embeds=embeds, encoder_hidden_states=states, past_key_values=cache, use_cache=True
        )
        layers = cache.cross_attention_cache.layers
        shape = (2, layers[0].keys.shape[1], CAPACITY, layers[0].keys.shape[3])
        return {
            "inputs_embeds": embeds,
            "attention_mask": torch.ones(2, 7).long(),
            "place": torch.tensor([7]),
            "keys": [torch.zeros(shape) for _ in layers],
            "values": [torch.zeros(shape) for _ in layers],
            "cross_keys": [layer.keys.contiguous() for layer in layers],
            "cross_values": [layer.values.contiguous() for layer in layers],
        }


def buffers(place: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> Cache:
    """Return a static cache of given tensors, which hold `place` tokens."""
    layers = []
    for layer_keys, layer_values in zip(keys, values, strict=True):
        layer = StaticLayer(layer_keys.shape[2])
        layer.keys, layer.values, layer.is_initialized = layer_keys, layer_values, True
        layer.device, layer.dtype = layer_keys.device, layer_keys.dtype
        layer.cumulative_length = place.clone()
        layers.append(layer)
    return Cache(layers=layers)


def causal_mask(place: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mask `(B, 1, 1, S)` to add to scores of attention, which hides what `mask` `(B, S)` hides."""
    seen = (torch.arange(keys.shape[2]) <= place)[None]
    seen = seen.expand(keys.shape[0], -1) if mask is None else seen & (mask != 0)
    return torch.where(seen, 0.0, torch.finfo(keys.dtype).min)[:, None, None]


__all__ = ["InductorEngine", "InductorGraph", "InductorState"]
