"""llama.cpp: an SLM, or a decoder-only model alone, as a GGUF file. Its steps cost least where weights are int8."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.parsing import read_json
from ..inference.engine import Contestant, engine
from ..inference.model import LLM2SLMForConditionalGeneration
from .exported import MANIFEST
from .gguf import SLIDING, check_family, interleave, write_gguf
from .graph_engine import FP32, INT8, GraphEngine
from .llama_cpp_calls import KINDS, Context, Model, api
from .llama_cpp_t5 import T5_CONTESTANT


READER = "openvino"  # the engine that reads prompts for an LLM-to-SLM model
GGUF = "step.gguf"
FORMATS = {"fp32": "F32", "int8": "Q8_0"}  # of matrices
KEY_KINDS: dict[str, Any] = {"fp32": np.dtype(np.float32), "int8": np.dtype(np.float16)}  # of keys and values
AHEAD = 128  # places for more tokens of each output
STATE = 0xAF143CD8  # the first bytes of a state of llama.cpp


class LlamaCppEngine(GraphEngine):
    """
    llama.cpp on the CPU computes the SLM; OpenVINO reads the prompt for an LLM-to-SLM model. `"int8"` weights are
    llama.cpp's Q8_0, with a scale for 32 weights.
    """

    name = "llamacpp"
    packages = ("llama-cpp-python", "gguf")
    extra = "llama-cpp"
    weights = {"fp32": FP32, "int8": INT8}
    benchmarked = ("fp32", "int8")
    files = (MANIFEST, "*.safetensors", "*.gguf", "*.xml", "*.bin")

    def quantizers(self, weights: str) -> tuple[str, ...]:
        return (READER, *super().quantizers(weights))

    def run_options(self, model: LLM2SLMForConditionalGeneration, weights: str) -> dict[str, Any]:
        has_prompt = isinstance(model, LLM2SLMForConditionalGeneration)
        return _reader().run_options(model, weights) if has_prompt else {}

    def load_graphs(self, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
        components = dict(manifest["components"])
        step = components.pop("step")
        kind = KEY_KINDS[manifest["llm2slm"]["weights"]]
        graphs: dict[str, Any] = {
            "step": LlamaCppGraph(path / step["file"], kind, step["caches"], step["interleaved"])
        }
        if components:
            _reader().check_installed()
            graphs |= _reader().load_graphs(path, {**manifest, "components": components})
        return graphs

    def constants(self, file: Path) -> Iterator[tuple[str, Any]]:
        if file.suffix != ".gguf":
            yield from _reader().constants(file)
            return
        import gguf

        for tensor in gguf.GGUFReader(file).tensors:
            yield tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def exporter(self, weights: str, is_step: bool) -> tuple[Any, Any, Any]:
        raise NotImplementedError  # `_write_graphs` needs none

    def contestants(self) -> dict[str, Contestant]:
        own = {name: one for name, one in super().contestants().items() if one.model == "llm2slm"}
        return {**own, f"llm-{self.name}-int8": T5_CONTESTANT}

    def _write_graphs(self, model: Any, folder: Path, weights: str, graphs: dict[str, Any], progress: Any) -> None:
        if "cross" in graphs:
            raise ValueError("llama.cpp computes decoder-only SLMs here, and not an encoder-decoder. Use openvino.")
        slm = graphs.pop("step").slm
        check_family(slm)
        components: dict[str, Any] = {}
        if graphs:
            _reader()._write_graphs(model, folder, weights, graphs, progress)
            components |= read_json(folder / MANIFEST)["components"]
        progress("writing step")
        write_gguf(slm, folder / GGUF, FORMATS[weights])
        components["step"] = {
            "file": GGUF, "caches": _caches(slm.config), "interleaved": slm.config.model_type == "llama"
        }  # fmt: skip
        self.write_manifest(folder, model, components)


def _reader() -> Any:
    return engine(READER)


def _caches(config: Any) -> list[list[int]]:
    """Return the layers of each of llama.cpp's caches: with sliding windows, it has one without and one with them."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full, sliding = ([index for index, kind in enumerate(kinds) if (kind == SLIDING) == wanted] for wanted in (0, 1))
    return [full, sliding] if sliding else [full]


class LlamaCppGraph:
    """
    A decoder-only model of a GGUF file. Several threads may run it: each state has a context of its own.

    Args:
        file: The GGUF file.
        kind: dtype of keys and values.
        caches: The layers of each cache of llama.cpp.
        interleaved: Whether the two halves of a key take turns in llama.cpp.

    Raises:
        OSError: If llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, kind: np.dtype, caches: list[list[int]], interleaved: bool):
        self.kind, self.caches, self.interleaved = kind, caches, interleaved
        self.model = Model(file)
        self.threads = torch.get_num_threads()
        self.unused: list[Context] = []  # to make one takes milliseconds

    def new_state(self) -> LlamaCppState:
        return LlamaCppState(self)

    def context(self, rows: int, places: int) -> Context:
        """Return an empty context for as many outputs, and tokens in all of them."""
        try:
            context = self.unused.pop()
        except IndexError:
            return Context(self.model, rows, places, self.threads, self.kind)
        if context.rows < rows or context.places < places:
            return Context(self.model, rows, places, self.threads, self.kind)
        api().llama_memory_clear(context.memory, False)
        return context


class LlamaCppState:
    """The keys and values of one generation. Each row is a sequence of llama.cpp, and padding is left out."""

    def __init__(self, graph: LlamaCppGraph):
        self._graph = graph
        self._context: Context | None = None
        self._handed: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of each layer, of the prompt
        self._sequences: list[int] = []  # of each row
        self._length = 0  # tokens of the longest row
        self._places = 0  # an upper bound of those that are taken

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        """Set the keys and values `(B, heads, N, size)` of a layer, before the first run."""
        assert layer == len(self._handed)
        self._handed.append((interleave(keys) if self._graph.interleaved else keys, values))

    def run(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
        embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"] != 0
        new = embeds.shape[1]
        mask = mask.expand(len(embeds), -1)
        if self._context is None:
            self._begin(mask, new, rows)
        elif rows is not None and (len(rows) != len(self._sequences) or bool((rows.diff() != 1).any())):
            self._continue(rows.tolist())
        self._reserve(len(self._sequences), len(embeds) * new)
        self._length += new
        self._places += len(embeds) * new
        return self._compute(embeds, mask[:, -new:], inputs["position_ids"])

    def _begin(self, mask: torch.Tensor, new: int, rows: torch.Tensor | None) -> None:
        count, before = len(mask), mask.shape[1] - new
        self._sequences = list(range(count))
        self._length, self._places = before, count * before
        self._context = self._graph.context(count, count * (before + new + AHEAD))
        if not self._handed:
            return
        handed = [part if rows is None else part[rows] for pair in self._handed for part in pair]
        parts = [part.transpose(1, 2).flatten(2).numpy().astype(self._graph.kind) for part in handed]
        for row, seen in enumerate(mask[:, :before].numpy()):
            if seen.any():
                self._write(row, packed_state([part[row][seen] for part in parts], self._graph.caches))
        self._handed = []

    def _write(self, sequence: int, state: bytes) -> None:
        assert self._context is not None
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        read = api().llama_state_seq_set_data(self._context.pointer, buffer, len(state), sequence)
        if read != len(state):
            raise RuntimeError(
                f"llama-cpp-python {api().__version__} stores keys and values in a way that this package does not "
                "know. Try: pip install 'llama-cpp-python==0.3.36'"
            )

    def _continue(self, rows: list[int]) -> None:
        """Let each row continue another one. Sequences share the places of what they have in common."""
        self._reserve(len(rows), 0)
        assert self._context is not None
        before, sequences, memory = self._sequences, list[int](), self._context.memory
        for row in set(range(len(before))) - set(rows):
            api().llama_memory_seq_rm(memory, before[row], -1, -1)
        kept = {before[row] for row in rows}
        free = (sequence for sequence in range(self._context.rows) if sequence not in kept)
        for row in rows:
            sequence = before[row]
            if sequence in sequences:  # another row continues it already
                sequence = next(free)
                api().llama_memory_seq_cp(memory, before[row], sequence, -1, -1)
            sequences.append(sequence)
        self._sequences = sequences

    def _reserve(self, rows: int, places: int) -> None:
        """Take a larger context, if this one has too few rows or places for more tokens."""
        old = self._context
        assert old is not None
        if rows <= old.rows and self._places + places <= old.places:
            return
        count = len(self._sequences)
        self._context = self._graph.context(rows, max(rows, count) * (self._length + AHEAD) + places)
        for row, sequence in enumerate(self._sequences):
            size = api().llama_state_seq_get_size(old.pointer, sequence)
            buffer = (ctypes.c_uint8 * size)()
            api().llama_state_seq_get_data(old.pointer, buffer, size, sequence)
            self._write(row, bytes(buffer))
        self._sequences, self._places = list(range(count)), count * self._length
        self._graph.unused.append(old)

    def _compute(self, embeds: torch.Tensor, seen: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read the embeddings that are `seen`; return the logits `(B, 1, vocabulary)` after the last of each row."""
        assert self._context is not None
        counts = seen.sum(1).numpy()
        places, most = positions.expand(seen.shape)[seen].int().numpy(), self._graph.model.positions
        if most is not None and places.max() >= most:  # llama.cpp would end the process
            raise ValueError(f"The model has only {most} positions. Shorten the prompt, or lower `max_new_tokens`.")
        logits = self._context.run(
            api().llama_decode,
            counts.cumsum() - 1,
            embd=embeds[seen].numpy(),
            pos=places,
            sequence=np.repeat(self._sequences, counts),
        )
        return torch.from_numpy(logits)[:, None]

    def __del__(self) -> None:
        if self._context is not None:
            self._graph.unused.append(self._context)


def packed_state(parts: list[np.ndarray], caches: list[list[int]]) -> bytes:
    """
    Return what llama.cpp reads as the state of a sequence (`llama_state_seq_set_data`).

    Args:
        parts: Keys and values of each layer, in turns: `(tokens, heads * size)`.
        caches: The layers of each cache.
    """
    count = len(parts[0])
    tokens = np.zeros((count, 3), dtype=np.int32)  # position, number of sequences, sequence
    tokens[:, 0], tokens[:, 1] = np.arange(count), 1
    pieces: list[Any] = [_words(STATE, 0)]
    for layers in caches:
        pieces += [_words(1, count), tokens, _words(1, len(layers))]  # one stream; values are transposed
        for keys in (parts[2 * layer] for layer in layers):
            pieces += [_words(KINDS[keys.dtype]), np.uint64(keys[0].nbytes), keys]
        for values in (parts[2 * layer + 1] for layer in layers):
            pieces += [_words(KINDS[values.dtype], values.itemsize, values.shape[1]), values.T]
    return b"".join(piece.tobytes() for piece in pieces)


def _words(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint32)


__all__ = ["LlamaCppEngine", "LlamaCppGraph", "LlamaCppState"]
