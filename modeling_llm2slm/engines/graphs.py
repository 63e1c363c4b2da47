"""The runtimes of exported models: each computes graphs, and keeps what one answer has read in a state of its own."""

from __future__ import annotations

import json
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache


NEEDS = "5.23"  # the first transformers with transformers.exporters.ExportedModel
MANIFEST = "export.json"  # transformers' own; what this package adds to it is under "llm2slm"
PACKAGES = {"openvino": ("openvino",), "onnx": ("onnx", "onnxruntime", "onnxscript")}


def is_exported(path: str | Path) -> bool:
    """Whether a folder is what `llm2slm export` wrote."""
    return (Path(path) / MANIFEST).is_file() and "llm2slm" in read_manifest(path)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What `export.json` says; `OSError` if it is no JSON."""
    file = Path(path) / MANIFEST
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{file} is damaged: {error}") from error


def graph_size(path: str | Path, name: str) -> int:
    """Bytes of a graph of an exported model, with its weights, which may lie in a file beside it."""
    graph = Path(path) / read_manifest(path)["components"][name]["file"]
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.stem}.*"))


def check_packages(runtime: str, *packages: str) -> None:
    """Raise `ValueError` if there is no such runtime, and `ImportError` if what it needs is not installed."""
    if runtime not in PACKAGES:
        raise ValueError(f"There is no runtime {runtime!r}. Choose one of: {', '.join(PACKAGES)}.")
    for package in (*PACKAGES[runtime], *packages):
        try:
            version(package)
        except PackageNotFoundError as error:
            raise ImportError(f"{package} is not installed. Try: pip install 'modeling-llm2slm[{runtime}]'") from error


def exported_model_class() -> Any:
    """
    Transformers' class of exported models, which writes all of them and runs those of ONNX Runtime.

    Raises:
        ImportError: If transformers is too old to have it.
    """
    try:
        from transformers.exporters import ExportedModel
    except ImportError as error:
        raise ImportError(
            f"This needs transformers {NEEDS} or newer, and {version('transformers')} is installed. "
            f"Try: pip install 'transformers>={NEEDS}'"
        ) from error
    return ExportedModel


def load_graphs(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The graphs in a folder by name, as its manifest lists them, on `torch.get_num_threads()` threads."""
    runtime = manifest["export_format"]
    check_packages(runtime)
    return (_load_openvino if runtime == "openvino" else _load_onnx)(path, manifest)


def _load_openvino(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    import openvino

    # Not by transformers' runner, which has one configuration for all graphs: each has a precision of its own.
    core, threads = openvino.Core(), {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    options = manifest["llm2slm"]["options"]
    graphs = {}
    for name, component in manifest["components"].items():
        file = path / component["file"]
        try:
            graphs[name] = OpenVINOGraph(core.compile_model(file, "CPU", threads | options[name]))
        except RuntimeError as error:  # of several lines, the cause last
            raise OSError(f"{file.stem} is damaged: {str(error).strip().splitlines()[-1]}") from error
    return graphs


def _load_onnx(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    exported_model = exported_model_class()
    from onnxruntime import SessionOptions

    session_options = SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    exported = exported_model.from_pretrained(path, device="cpu", session_options=session_options)
    return {name: ONNXGraph(runner) for name, runner in exported.runners.items()}


class OpenVINOGraph:
    """A compiled graph. Threads that run it wait for one another."""

    def __init__(self, compiled_model: Any):
        self._model = compiled_model
        self._request = compiled_model.create_infer_request()
        self._lock = threading.Lock()

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All outputs by name, for inputs by name."""
        with self._lock:
            outputs = self._request.infer(_feed(inputs), share_inputs=True, share_outputs=False)
        return {port.any_name: torch.from_numpy(values) for port, values in outputs.items()}

    def new_state(self) -> OpenVINOState:
        return OpenVINOState(self._model)


class OpenVINOState:
    """A request of its own, in which the graph keeps keys and values from one run to the next."""

    def __init__(self, compiled_model: Any):
        self._request = compiled_model.create_infer_request()

    def run(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
        """
        The graph's logits, after reading more.

        Args:
            inputs: By name, rows first.
            rows: Which row of the state each row of the inputs goes on from; None: the same.
        """
        if rows is None:
            rows = torch.arange(len(inputs["inputs_embeds"]), dtype=torch.int32)
        feed = _feed({**inputs, "beam_idx": rows.int()})
        outputs = self._request.infer(feed, share_inputs=True, share_outputs=False)
        return torch.from_numpy(outputs["logits"])


class ONNXGraph:
    """A session of ONNX Runtime, which threads may run at once."""

    def __init__(self, runner: Any):
        self._runner = runner

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All outputs by name, for inputs by name."""
        return self._runner(**inputs)

    def new_state(self) -> ONNXState:
        return ONNXState(self._runner)


class ONNXState:
    """Keys and values, which go into the graph and come out longer."""

    def __init__(self, runner: Any):
        self._runner = runner
        self._cache: DynamicCache | None = None

    def run(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
        """As of [`OpenVINOState`]."""
        if self._cache is None:
            self._cache = self._empty(len(inputs["inputs_embeds"]))
        elif rows is not None:
            self._cache.batch_select_indices(rows)
        outputs = self._runner(**inputs, past_key_values=self._cache)
        self._cache = outputs["past_key_values"]
        return outputs["logits"]

    def _empty(self, rows: int) -> DynamicCache:
        """No keys and values, in the shapes that the graph was traced with."""
        inputs = self._runner.session.get_inputs()
        shapes = [spec.shape for spec in inputs if spec.name.endswith((".keys", ".values"))]
        tensors = [torch.zeros(rows, heads, 0, width) for _, heads, _, width in shapes]
        return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))


def _feed(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
