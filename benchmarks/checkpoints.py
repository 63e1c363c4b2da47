"""
Measure checkpoints: size of a lean one, memory and time to load, cost of the fingerprint, memory of `compose`.

    python -m benchmarks.checkpoints --output docs/results/checkpoints.json
    python -m benchmarks.checkpoints compose --output docs/results/compose.json

The first command writes an LLM, an SLM and a full and a lean LLM-to-SLM checkpoint with the sizes of a preset (about
5 GB for t5-large_gpt2) to a temporary folder, the second an encoder-decoder LLM and two LLM-to-SLM checkpoints (about
20 GB for t5-3b_gpt2), all with random float32 weights. Each load has its own process. RssAnon is read every
millisecond, and the memory of the imports is subtracted. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import in_a_process, peak_memory


PRESETS = {"sizes": "t5-large_gpt2", "compose": "t5-3b_gpt2"}
ROUNDS = 7


def load(folder: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint; return its memory, its median time and the share of the fingerprint."""
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils import logging

    import modeling_llm2slm  # noqa: F401 - registers the model
    from modeling_llm2slm import checkpoint_llm2slm

    logging.disable_progress_bar()
    taken: list[float] = []
    check = checkpoint_llm2slm._check_fingerprint

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        check(*args)
        taken.append(time.perf_counter() - start)

    vars(checkpoint_llm2slm)["_check_fingerprint"] = timed
    with peak_memory() as memory:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, **kwargs)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    taken.clear()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        AutoModelForSeq2SeqLM.from_pretrained(folder, **kwargs)
        seconds.append(time.perf_counter() - start)
    checking = statistics.median(taken) if taken else 0.0
    return {
        "weights, bytes": weights,
        "peak anonymous memory, of the weights": round(memory["anonymous"] / weights, 3),
        "load, ms": round(1000 * statistics.median(seconds), 1),
        "check of the fingerprint, ms": round(1000 * checking, 1),
        "check of the fingerprint, of the load": round(checking / statistics.median(seconds), 4),
    }


def compose(llm: str, slm: str, output: str, dtype: str | None) -> dict[str, Any]:
    """Compose in this process and report its memory."""
    from transformers.utils import logging

    from modeling_llm2slm.conversion.compose import compose as convert

    logging.disable_progress_bar()
    start = time.perf_counter()
    with peak_memory() as memory:
        report = convert(llm, slm, output, encoder_dtype=dtype)
    sizes = {name: memory[name] for name in ("anonymous", "anonymous with imports")}
    sizes["resident with mapped files"] = memory["resident with imports"]
    rows = {what: result for what, result in report.rows if what != "processor"}  # the random models have no processor
    return {"peak memory, bytes": sizes, "seconds": round(time.perf_counter() - start, 1), "report": rows}


def write_random(model_class: Any, config: Any, folder: Path, shard: int = 10**9) -> int:
    """Write random weights of a model shard by shard; return their bytes."""
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = model_class(config)
    folder.mkdir(parents=True)
    config.architectures = [model_class.__name__]
    config.dtype = "float32"
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    total = number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        file = f"model-{number:05}-of-99999.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        tensors.clear()

    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        tensors[name] = torch.ones(tensor.shape) if tensor.ndim == 1 else torch.randn(tensor.shape).mul_(0.02)
        total += tensors[name].nbytes
        if sum(one.nbytes for one in tensors.values()) > shard:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def measure_sizes(preset: str) -> dict[str, Any]:
    """Return the sizes of a full and a lean checkpoint, and how they load."""
    from transformers import GPT2LMHeadModel, T5EncoderModel

    from modeling_llm2slm import LLM2SLMConfig, LLM2SLMForConditionalGeneration

    config = LLM2SLMConfig.from_pretrained(Path(__file__).parent.parent / "configuration" / f"{preset}.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random(T5EncoderModel, config.encoder, folder / "llm")
        write_random(GPT2LMHeadModel, config.decoder, folder / "slm")
        model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(f"{folder}/llm", f"{folder}/slm")
        model.save_pretrained(folder / "full")
        model.save_pretrained(folder / "lean", include_llm=False)
        sizes = {kind: sum(file.stat().st_size for file in (folder / kind).iterdir()) for kind in ("full", "lean")}
        results: dict[str, Any] = {"preset": preset, "bytes": sizes, "lean of full": sizes["lean"] / sizes["full"]}
        for kind in ("full", "lean"):
            results[kind] = in_a_process("benchmarks.checkpoints", "load", str(folder / kind), {})
        results["full, dtype=bfloat16"] = in_a_process(
            "benchmarks.checkpoints", "load", str(folder / "full"), {"dtype": "bfloat16"}
        )
        results["lean, dtype=bfloat16"] = in_a_process(
            "benchmarks.checkpoints", "load", str(folder / "lean"), {"dtype": "bfloat16"}
        )
    return results


def measure_compose(preset: str) -> dict[str, Any]:
    """Return the memory of composing an LLM and an SLM, with the LLM in float32 and in bfloat16."""
    from transformers import GPT2LMHeadModel, T5ForConditionalGeneration

    from modeling_llm2slm import LLM2SLMConfig

    config = LLM2SLMConfig.from_pretrained(Path(__file__).parent.parent / "configuration" / f"{preset}.json")
    results: dict[str, Any] = {"preset": preset}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.encoder.is_encoder_decoder = True
        results["LLM, bytes"] = write_random(T5ForConditionalGeneration, config.encoder, folder / "llm")
        results["SLM, bytes"] = write_random(GPT2LMHeadModel, config.decoder, folder / "slm")
        for dtype in (None, "bfloat16"):
            output = folder / f"composite-{dtype}"
            results[f"encoder_dtype={dtype}"] = in_a_process(
                "benchmarks.checkpoints", "compose", str(folder / "llm"), str(folder / "slm"), str(output), dtype
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=PRESETS, default="sizes")
    parser.add_argument("--preset", help="default: t5-large_gpt2, and t5-3b_gpt2 for compose")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        function, *arguments = json.loads(args.call)
        print(json.dumps(load(*arguments) if function == "load" else compose(*arguments)))
        return
    measure = measure_sizes if args.what == "sizes" else measure_compose
    report = measure(args.preset or PRESETS[args.what])
    print(json.dumps(report, indent=2))
    if args.output:
        from modeling_llm2slm.data.records import write_json

        write_json(args.output, report)


if __name__ == "__main__":
    main()
