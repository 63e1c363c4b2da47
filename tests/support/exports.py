"""Tiny LLM-to-SLM models and their exports: each is exported once for all tests and workers."""

from __future__ import annotations

import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import DynamicCache, GPT2LMHeadModel, T5EncoderModel, T5ForConditionalGeneration

from modeling_llm2slm import ExportedLLM2SLM, LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.conversion.export import export
from modeling_llm2slm.engines import inductor
from modeling_llm2slm.engines.exported_llm import ExportedLLM
from modeling_llm2slm.engines.graph_engine import GraphEngine, describe, exported_model_class
from modeling_llm2slm.engines.graphs import embedding_table, graphs_of
from modeling_llm2slm.inference.engine import engine as engine_named
from modeling_llm2slm.inference.engine import is_installed
from tests.support import families
from tests.support.common import (
    LLM_VOCAB_SIZE,
    PROMPTS,
    SLM_VOCAB_SIZE,
    check_outputs_vary,
    compose,
    gpt2_config,
    learn_by_heart,
    llm_tokenizer,
    pad_prompts,
    slm_tokenizer,
    strip_padding,
    t5_config,
)


KINDS = (("gpt2", "add_shared"), ("t5", "replace"))
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
}


def needs(name: str) -> None:
    """Skip the test if the packages of an engine, or transformers' exported models, are missing."""
    for package in (*engine_named(name).packages, *engine_named(name).quantizers("int8")):
        if not is_installed(package):
            pytest.skip(f"needs {package}: pip install 'modeling-llm2slm[{engine_named(name).extra}]'")
    if importlib.util.find_spec("transformers.exporters.metadata") is None:
        pytest.skip("needs transformers 5.23, the first with exported models")


@functools.cache
def learned(slm: str, fusion: str) -> LLM2SLMForConditionalGeneration:
    """A model whose outputs for `PROMPTS` all differ and vary, of one layer on each side unless these are shared."""
    torch.manual_seed(0)
    if fusion.startswith("cache"):  # "cache_again": the SLM reads the last prompt token again
        first, llm = fusion == "cache", families.build_whole(slm)
        parts = compose(llm if first else llm.base_model, families.build_slm(slm), "cache", llm_first_token=first)
        learn_by_heart(parts.model)
        return parts.model.eval()
    vocab_size = SLM_VOCAB_SIZE if fusion == "add_shared" else LLM_VOCAB_SIZE
    llm = T5EncoderModel(t5_config(num_layers=1, vocab_size=vocab_size)).eval()
    small: dict[str, Any] = {
        "gpt2": lambda: GPT2LMHeadModel(gpt2_config(n_layer=1)),
        "t5": lambda: T5ForConditionalGeneration(families.SLMS["t5"].config(num_decoder_layers=1)),
    }
    model = compose(llm, small.get(slm, lambda: families.build_slm(slm))().eval(), fusion).model
    learn_by_heart(model)
    return model.eval()


def checkpoint(slm: str, fusion: str, folder: Path) -> Path:
    """Write `learned` to disk, with a processor."""
    learned(slm, fusion).save_pretrained(folder)
    shared = fusion == "add_shared" or fusion.startswith("cache")
    tokenizers = (slm_tokenizer() if shared else llm_tokenizer(), slm_tokenizer())
    LLM2SLMProcessor(*tokenizers).save_pretrained(folder)
    return folder


def exported_folder(
    tmp_path_factory: Any, slm: str, fusion: str, weights: str = "fp32", engine: str = "openvino"
) -> Path:
    """The folder of an exported model, not to be changed."""
    shared = tmp_path_factory.getbasetemp().parent if _in_worker() else tmp_path_factory.getbasetemp()
    folder = shared / f"{engine}-{slm}-{fusion}-{weights}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            source = checkpoint(slm, fusion, tmp_path_factory.mktemp("source"))
            export(source, folder, engine=engine, weights=weights)
    return folder


class EagerGraph:
    """A graph that is computed by PyTorch, without tracing, as an engine would."""

    def __init__(self, module: Any):
        self.module = module.eval()

    @torch.no_grad()
    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.module(**inputs)

    def new_state(self) -> EagerState:
        return EagerState(self.module)


class EagerState:
    """The keys and values of one generation."""

    def __init__(self, module: Any):
        self.module, self.cache = module, DynamicCache()

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        self.cache.update(keys, values, layer)

    def hand_over(self, other: EagerState) -> None:
        other.cache = self.cache

    @torch.no_grad()
    def run(self, inputs: dict[str, torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
        if rows is not None:
            self.cache.batch_select_indices(rows)
        return self.module(**inputs, past_key_values=self.cache)["logits"]


def eager(model: Any) -> Any:
    """Return a model as exported, with graphs that PyTorch computes."""
    graphs = {name: EagerGraph(module) for name, module in graphs_of(model).items()}
    is_llm2slm = "prompt" in graphs
    table = embedding_table(model.decoder if is_llm2slm else model, torch.float32)
    details = {"engine": "eager", **describe(model, "fp32")}
    kind: Any = ExportedLLM2SLM if is_llm2slm else ExportedLLM
    return kind(model.config, model.generation_config, graphs, table, details)


def reuse_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports take the graphs of an exported folder: tracing them again takes seconds."""
    components = exported_model_class().from_pretrained(folder).components

    def component(self: GraphEngine, graph: Any, sample: Any, weights: str, is_step: bool) -> Any:
        return components["step" if is_step else "prompt"]

    monkeypatch.setattr(GraphEngine, "component", component)


class Pair:
    """A model on PyTorch, and its export."""

    def __init__(self, model: LLM2SLMForConditionalGeneration, exported: ExportedLLM2SLM):
        self.model, self.exported = model, exported

    def outputs(self, **kwargs: Any) -> list[Any]:
        """Generate with both, from the same seed."""
        both = []
        for model in (self.model, self.exported):
            torch.manual_seed(0)
            both.append(model.generate(**{"max_new_tokens": 12, **kwargs}))
        return both


def pair_of(tmp_path_factory: Any, slm: str, fusion: str, engine: str = "openvino") -> Pair:
    """Load a model on PyTorch and on an engine."""
    needs(engine)
    folder = exported_folder(tmp_path_factory, slm, fusion, engine=engine)
    return Pair(learned(slm, fusion), ExportedLLM2SLM.from_pretrained(folder))


class Uncompiled:
    """Runs a module with the flat inputs of a compiled one."""

    def __init__(self, graph: Any):
        self.graph = graph
        self.loader = self
        self.spec = tree_flatten(list(graph.sample().values()))[1]

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs = tree_unflatten(tensors, self.spec)
        return list(self.graph(**dict(zip(self.graph.sample(), inputs, strict=True))).values())


def uncompiled_pair(folder: Path, slm: str, fusion: str, weights: str = "fp32") -> Pair:
    """Export a model for the engine inductor, but run its graphs without compiling them, which takes minutes."""
    graphs: dict[str, Any] = {}

    @torch.no_grad()
    def keep(graph: Any, file: Path) -> dict[str, Any]:
        graphs[file.name] = graph
        return {"file": file.name, "inputs": list(graph.sample()), "outputs": list(graph(**graph.sample()))}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "_compile", keep)
        patch.setattr(torch._inductor, "aoti_load_package", lambda path: Uncompiled(graphs[Path(path).name]))
        export(checkpoint(slm, fusion, folder / "source"), folder / "fast", engine="inductor", weights=weights)
        return Pair(learned(slm, fusion), ExportedLLM2SLM.from_pretrained(folder / "fast"))


def check_strategies(pair: Pair) -> None:
    """Check that all generation strategies give the tokens of PyTorch."""
    for side in ("right", "left"):
        batch = pad_prompts(PROMPTS, side, extra=2)
        for name, strategy in STRATEGIES.items():
            expected, found = pair.outputs(**batch, **strategy)
            assert torch.equal(expected, found), (side, name)
    check_outputs_vary(strip_padding(pair.outputs(**batch)[1]))


def check_continuation(pair: Pair) -> None:
    """Check that an output continues from the cache of an earlier call."""
    batch = pad_prompts(PROMPTS)
    whole = pair.outputs(**batch, max_new_tokens=10)[1]
    first = pair.exported.generate(**batch, max_new_tokens=4, return_dict_in_generate=True)
    continued = pair.exported.generate(
        **batch, decoder_input_ids=first.sequences, past_key_values=first.past_key_values, max_new_tokens=6
    )
    assert torch.equal(continued, whole)
    with pytest.raises(ValueError, match="not cached yet"):
        pair.exported.generate(**batch, past_key_values=first.past_key_values, max_new_tokens=6)


def check_threads(pair: Pair) -> None:
    """Check that threads that generate at once get their own outputs."""
    batches = [{"input_ids": torch.tensor([prompt])} for prompt in PROMPTS] * 4
    expected = [pair.exported.generate(**batch, max_new_tokens=12).tolist() for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: pair.exported.generate(**batch, max_new_tokens=12).tolist(), batches))
    assert found == expected


def check_prompt_lengths(pair: Pair) -> None:
    """Check a prompt of one token, and one longer than the sliding window of the tiny models."""
    for prompt in (PROMPTS[0][:1], [3 + number for number in range(20)]):
        assert torch.equal(*pair.outputs(input_ids=torch.tensor([prompt]), num_beams=2))


def _in_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ
