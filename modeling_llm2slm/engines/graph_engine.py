"""The base class of engines that run graphs: it loads, exports and benchmarks them."""

from __future__ import annotations

import json
import logging
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from ..inference.engine import BenchmarkModels, Contestant, Engine, LoadOptions, Progress, WeightFormat
from ..inference.model import LLM2SLMForConditionalGeneration
from ..inference.parts import composite_parts, count_parameters, decoding_modules, part_of
from ..states.loading import check_finite, load, one_sentence
from .exported import (
    EMBEDDINGS,
    FIX,
    MANIFEST,
    ExportedLLM2SLM,
    ExportedTextToText,
    GraphModel,
    graph_size,
    is_exported,
    read_manifest,
    supported_defaults,
)
from .exported_llm import ExportedLLM, ExportedLLMTextToText
from .graphs import dynamic_shapes, embedding_table, graphs_of
from .llm_graphs import ExportableLLM


NEEDS = "5.23"  # the first transformers with transformers.exporters.ExportedModel
FP32, BF16 = WeightFormat(bytes=4, tolerance=1e-3), WeightFormat(bytes=2, tolerance=0.05)
INT8, INT4 = WeightFormat(bytes=1, tolerance=0.1), WeightFormat(bytes=0.7, tolerance=0.5)


class GraphEngine(Engine):
    """
    An engine that runs the graphs of exported models. Its name is the `export_format` of transformers' exporters.

    `"int8"` weights have one scale per row, or per group of 128, and activations are quantized while the graph runs.
    `"int4"` weights have one scale per group of 128; the graph that reads prompts keeps int8.

    Attributes:
        benchmarked: The weights that [`~Engine.contestants`] offers.
    """

    files: ClassVar[tuple[str, ...]] = (MANIFEST, EMBEDDINGS, "*.xml", "*.bin", "*.onnx", "*.data")
    benchmarked: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def load_graphs(self, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """
        Load the graphs that a manifest lists, on `torch.get_num_threads()` threads.

        Returns:
            Graphs by name. `graph.run(inputs)` maps tensors by name to tensors by name. `graph.new_state()` returns a
            state that holds the keys and values of one generation: `state.run(inputs, rows)` returns the logits after
            more tokens, where `rows` is the row of the state that each row of the inputs continues (`None`: the same).
            Before the first run, `state.update(keys, values, layer)` sets what a layer of fusion "cache" begins with.
        """

    @abstractmethod
    def constants(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield the floating-point constants of a graph, each with its name, as arrays."""

    @abstractmethod
    def exporter(self, weights: str, is_step: bool) -> tuple[Any, Any, Any]:
        """Return transformers' exporter, its config class, and the quantizer of a graph (`None` for floats)."""

    def run_options(self, model: LLM2SLMForConditionalGeneration, weights: str) -> dict[str, Any]:
        """Return the options of `load_graphs` that depend on the model. The manifest stores them."""
        return {}

    def can_load(self, path: str | Path) -> bool:
        return is_exported(path) and read_manifest(path)["export_format"] == self.name

    def load(self, path: str | Path, options: LoadOptions) -> ExportedTextToText | ExportedLLMTextToText:
        if not self.can_load(path):
            raise ValueError(
                f"{path} is not exported for {self.name}. Export it first: `llm2slm export --engine {self.name}`."
            )
        if options.quantize is not None:
            raise ValueError(f"{path} is an exported model: export it with the weights that you want.")
        if torch.device(options.device or "cpu").type != "cpu":
            raise ValueError(f"{path} is an exported model and runs on the CPU, not on {options.device}.")
        if options.states is not None or options.dtype not in (None, "float32", torch.float32):
            raise ValueError(f"{path} is an exported model: its LLM and its dtype cannot be changed.")
        self.check_installed()
        with one_sentence(path):
            model: Any = exported_class(path).from_pretrained(path)
        if not options.allow_nonfinite:
            self._check_finite(Path(path), model)
        processor = load(AutoProcessor, path)
        kind = ExportedLLMTextToText if isinstance(model, ExportedLLM) else ExportedTextToText
        return kind(model, processor, options.prompt_max_length, options.target_max_length)

    def _check_finite(self, path: Path, model: GraphModel) -> None:
        check_finite({EMBEDDINGS: model._embeddings}, path)
        for component in read_manifest(path)["components"].values():
            for name, values in self.constants(path / component["file"]):
                low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
                # A single infinity fills masks; no weight is a single number.
                if math.isnan(low) or (values.size > 1 and math.isinf(high - low)):
                    raise OSError(
                        f"{path} is damaged: {name} in {component['file']} holds values that are not finite. {FIX}"
                    )

    def quantizers(self, weights: str) -> tuple[str, ...]:
        """Return the packages that exporting with these weights needs besides `self.packages`."""
        return ("nncf",) if weights.startswith("int") else ()

    def check_export(self, weights: str) -> None:
        super().check_export(weights)
        self.check_installed(*self.quantizers(weights))
        exported_model_class()

    def export(self, model: Any, folder: Path, weights: str, progress: Progress = lambda stage: None) -> GraphModel:
        self._write(model, folder, weights, progress)
        progress("loading the result")
        return exported_class(folder).from_pretrained(folder)

    def output_logits(self, model: Any, prompt: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        cache, logits = model.new_cache(), []  # a graph returns the logits of the last token only
        if isinstance(model, ExportedLLM):
            model(input_ids=prompt, past_key_values=cache)
            logits = [model(input_ids=token, past_key_values=cache).logits for token in output.split(1, dim=1)]
            return torch.cat(logits, dim=1)
        for token in output.split(1, dim=1):
            logits.append(model(input_ids=prompt, decoder_input_ids=token, past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    def _write(self, model: Any, folder: Path, weights: str, progress: Progress) -> None:
        details = {**describe(model, weights), "options": self.run_options(model, weights)}
        graphs = model.graphs() if isinstance(model, ExportableLLM) else graphs_of(model)
        table = embedding_table(_writer(model), torch.float32 if weights == "fp32" else torch.bfloat16)
        save_file({"weight": table}, folder / EMBEDDINGS)
        self._write_graphs(model, folder, weights, graphs, progress)
        manifest = json.dumps({**read_manifest(folder), "llm2slm": details}, indent=2)
        (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")

    def _write_graphs(
        self, model: Any, folder: Path, weights: str, graphs: dict[str, Any], progress: Progress
    ) -> None:
        """Write the graphs, both configs, and a manifest with the keys `export_format` and `components`."""
        samples = {name: graph.eval().sample() for name, graph in graphs.items()}
        if weights == "bf16":
            model.to(torch.bfloat16)
        components = {}
        with quiet_exporters():
            for name, graph in graphs.items():
                progress(f"exporting {name}")
                components[name] = self.component(graph, samples[name], weights, is_step=name == "step")
        progress("writing")
        defaults = supported_defaults(model.generation_config)
        exported_model_class()(components, self.name, model.config, defaults).save_pretrained(folder)

    def write_manifest(self, folder: Path, model: Any, components: dict[str, Any]) -> None:
        """Write a manifest of components that transformers' exporters did not make, and both configs."""
        manifest = json.dumps({"export_format": self.name, "components": components})
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        model.config.save_pretrained(folder)
        supported_defaults(model.generation_config).save_pretrained(folder)

    def component(self, graph: Any, sample: dict[str, Any], weights: str, is_step: bool) -> Any:
        """Trace a module with sample inputs to a component of transformers' exported model."""
        exporter, config_class, quantizer = self.exporter(weights, is_step)
        config = config_class(dynamic_shapes=dynamic_shapes(sample), quantizer=quantizer)
        with torch.no_grad():
            return exporter.export(graph, sample, config).components["model"]

    def contestants(self) -> dict[str, Contestant]:
        return {
            f"{model}-{self.name}-{weights}": self._contestant(model, weights)
            for model in ("llm", "llm2slm")
            for weights in self.benchmarked
        }

    def _contestant(self, model: Literal["llm", "llm2slm"], weights: str) -> Contestant:
        return Contestant(
            # It always runs on the CPU.
            load=lambda models, folder, device: ExportedLLM2SLM.from_pretrained(folder),
            make=partial(self._make, weights=weights, exports=model),
            model=model,
            step_bytes=partial(graph_size, name="step"),
            packages=(*self.packages, *self.quantizers(weights)),
        )

    def _make(self, models: BenchmarkModels, folder: Path, weights: str, exports: str) -> None:
        self.check_export(weights)
        if exports == "llm":
            llm = AutoModelForSeq2SeqLM.from_pretrained(models.llm, dtype=torch.float32)
            model: Any = ExportableLLM(llm).float().eval()
        else:
            model = LLM2SLMForConditionalGeneration.from_pretrained(models.llm2slm, dtype=torch.float32).float().eval()
        self._write(model, folder, weights, lambda stage: None)


def exported_model_class() -> Any:
    """Return transformers' class of exported models, which writes them; `ImportError` if transformers is too old."""
    try:
        from transformers.exporters import ExportedModel
    except ImportError as error:
        raise ImportError(
            f"This needs transformers {NEEDS} or newer, and {version('transformers')} is installed. "
            f"Try: pip install 'transformers>={NEEDS}'"
        ) from error
    return ExportedModel


def exported_class(path: str | Path) -> type[GraphModel]:
    """Return the class of an exported model: without a graph that reads prompts, it is a decoder-only one."""
    return ExportedLLM2SLM if "prompt" in read_manifest(path)["components"] else ExportedLLM


def describe(model: Any, weights: str) -> dict[str, Any]:
    """Return the weights and parameter counts of an exported model."""
    parts = composite_parts(model) if hasattr(model, "encoder") else [part_of("model", _writer(model))]
    return {
        "weights": weights,
        "parameters": {part.name: part.parameters for part in parts},
        "decode": count_parameters(*decoding_modules(_writer(model))),
    }


def _writer(model: Any) -> Any:
    """Return the model that writes outputs: the SLM of an LLM-to-SLM model, or a decoder-only model itself."""
    return model.decoder if isinstance(model, LLM2SLMForConditionalGeneration | ExportableLLM) else model


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence notes on versions and shapes, which this package takes care of, and tables of quantized layers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)
