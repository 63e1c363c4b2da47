"""The runtimes of exported models: each computes graphs, and keeps what one answer has read in a state of its own."""

from __future__ import annotations

import json
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


NEEDS = "5.23"  # the first transformers with transformers.exporters.ExportedModel
MANIFEST = "export.json"  # transformers' own; what this package adds to it is under "llm2slm"
PACKAGES = {"openvino": ("openvino", "nncf"), "onnx": ("onnxruntime", "onnxscript")}


def is_exported(path: str | Path) -> bool:
    """Whether a folder is what `llm2slm export` wrote."""
    file = Path(path) / MANIFEST
    return file.is_file() and "llm2slm" in json.loads(file.read_text(encoding="utf-8"))


def exported_model_class(runtime: str) -> Any:
    """
    Transformers' class of exported models.

    Raises:
        ValueError: If there is no such runtime.
        ImportError: If transformers is too old for it, or its packages are not installed.
    """
    if runtime not in PACKAGES:
        raise ValueError(f"There is no runtime {runtime!r}. Choose one of: {', '.join(PACKAGES)}.")
    for package in PACKAGES[runtime]:
        try:
            version(package)
        except PackageNotFoundError as error:
            raise ImportError(f"{package} is not installed. Try: pip install 'modeling-llm2slm[{runtime}]'") from error
    try:
        from transformers.exporters import ExportedModel
    except ImportError as error:
        raise ImportError(
            f"Exported models need transformers {NEEDS} or newer, and {version('transformers')} is installed. "
            f"Try: pip install 'transformers>={NEEDS}'"
        ) from error
    return ExportedModel


def load_graphs(path: Path, details: dict[str, Any]) -> dict[str, Any]:
    """The graphs in a folder by name, ready to run on `torch.get_num_threads()` threads."""
    runtime = details["runtime"]
    exported_model = exported_model_class(runtime)
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, **details["options"]}
    runners = exported_model.from_pretrained(path, device="cpu", config=config).runners
    return {name: OpenVINOGraph(runner.compiled_model) for name, runner in runners.items()}


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
            rows = torch.arange(len(inputs["inputs_embeds"]))
        outputs = self._request.infer(
            _feed({**inputs, "beam_idx": rows.int()}), share_inputs=True, share_outputs=False
        )
        return torch.from_numpy(outputs["logits"])


def _feed(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
