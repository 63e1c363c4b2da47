"""Commands that measure before and after training: `evaluate`, `plan` and `benchmark`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .loading import claimed, load_text_to_text, quiet_libraries
from .options import ModelArgument, OverwriteFile, ResultFile, with_settings
from .output import count_of, number_table, one_line, out, print_line, resumable, size
from .progress import duration, steps


if TYPE_CHECKING:
    from modeling_llm2slm.settings import BenchmarkSettings, EvaluateSettings, LoadSettings, PlanSettings

PANEL = "Evaluation"
commands = typer.Typer()


@commands.command(rich_help_panel=PANEL)
@with_settings
def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Argument(help="A .jsonl, .json, .csv, .parquet or .txt file, or a data set's name.")],
    settings: EvaluateSettings,
    loading: LoadSettings,
    output: ResultFile = None,
    against: Annotated[str | None, typer.Option(help="Compare with this LLM; references are not needed then.")] = None,
    overwrite: OverwriteFile = False,
) -> None:
    """
    Score a model's outputs: BLEU and chrF (sacrebleu), ROUGE, exact match, and time per output.

    `llm2slm evaluate runs/model test.jsonl --num-beams 4 --output metrics.json`

    With `--against`, measure how far the model agrees with the LLM:

    `llm2slm evaluate runs/model prompts.txt --against google-t5/t5-large`
    """
    with claimed(output, overwrite=overwrite, inputs=(model, data, against)):
        text_to_text = load_text_to_text(model, loading, prompt_max_length=settings.prompt_max_length)
        quiet_libraries(data=True)
        of_hub = not Path(data).expanduser().is_file()
        about = {"model": model, **({"data": data, "split": settings.split} if of_hub else {"data": Path(data).name})}
        if against is not None:
            from modeling_llm2slm.evaluation.agreement import compare

            on_same_device = replace(loading, quantize=None)
            llm = load_text_to_text(against, on_same_device, prompt_max_length=settings.prompt_max_length)
            comparison = compare(text_to_text, llm, data, settings)
            _write_and_show({**about, "against": against, **comparison}, output, print_comparison)
            return
        from modeling_llm2slm.evaluation.evaluate import evaluate as evaluate_model

        _write_and_show({**about, **evaluate_model(text_to_text, data, settings)}, output, _print_scores)


@commands.command(rich_help_panel="Training")
@with_settings
def plan(
    llm: Annotated[str, typer.Option(help="The whole LLM: a folder, or a name on the Hub.")],
    data: Annotated[str, typer.Option(help="Your prompts: a file, or a data set on the Hub.")],
    settings: PlanSettings,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="Try this preset, llm2slm config .json, or cut of a decoder-only LLM (cut:4); repeatable."),
    ] = None,
    slm_tokenizer: Annotated[
        list[str] | None, typer.Option(help="PRESET=FOLDER, if the SLM's tokenizer cannot be downloaded; repeatable.")
    ] = None,
    output: ResultFile = None,
    overwrite: OverwriteFile = False,
) -> None:
    """
    Estimate the speed-up and the cost of LLM-to-SLM on this machine, before any training.

    `llm2slm plan --llm google-t5/t5-large --data prompts.txt`

    The LLM generates outputs for some of your prompts; then small models with random weights generate as many tokens.
    """
    tokenizers = dict(_preset_and_folder(entry) for entry in slm_tokenizer or [])
    quiet_libraries(data=True)
    from modeling_llm2slm.workflows.plan import plan_within_limit

    with claimed(output, overwrite=overwrite, inputs=(llm, data, *(preset or ()), *tokenizers.values())):
        with steps("Planning") as progress:
            result = plan_within_limit(
                llm, data, settings, presets=preset or None, slm_tokenizers=tokenizers, progress=progress
            )
        _write_and_show({"llm": llm, "data": Path(data).name, **result}, output, _print_plan)


@commands.command(rich_help_panel=PANEL)
@with_settings
@resumable
def benchmark(
    settings: BenchmarkSettings,
    sweep: Annotated[Path | None, typer.Argument(help="A YAML file of cells. Default: the installed one.")] = None,
    output: Annotated[Path, typer.Option(help="The JSON file of results; an interrupted run resumes from it.")] = Path(
        "runs/benchmark/benchmark.json"
    ),
    work: Annotated[Path, typer.Option(help="The folder for models with random weights, which are kept.")] = Path(
        "runs/benchmark"
    ),
    llm: Annotated[
        str | None, typer.Option(help="The LLM with its decoder, to time given checkpoints instead of presets.")
    ] = None,
    llm2slm: Annotated[str | None, typer.Option(help="The LLM-to-SLM checkpoint that is built on --llm.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write plots to this folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace plots.")] = False,
) -> None:
    """
    Time the LLM, the SLM and LLM-to-SLM in turns, on every engine that is installed.

    `llm2slm benchmark --plots runs/plots`

    `llm2slm benchmark --llm google-t5/t5-large --llm2slm runs/model`
    """
    if (llm is None) != (llm2slm is None):
        raise typer.BadParameter("--llm and --llm2slm belong together.")
    quiet_libraries()
    from modeling_llm2slm.benchmark.benchmark import Benchmark
    from modeling_llm2slm.benchmark.cells import Cell, load_sweep
    from modeling_llm2slm.benchmark.plots import PLOTS, plot
    from modeling_llm2slm.data.output_paths import check_output
    from modeling_llm2slm.inference.engine import BenchmarkModels

    if plots is not None:
        from modeling_llm2slm.benchmark.plots import check_installed

        for name in PLOTS:
            check_output(plots / name, overwrite=overwrite)
        check_installed()
    default = Path(str(files("modeling_llm2slm.configuration"))) / "benchmark.yaml"
    models = BenchmarkModels(work / "given", llm, llm2slm) if llm is not None and llm2slm is not None else None
    cells = [Cell()] if models is not None and sweep is None else load_sweep(sweep or default)
    with steps("Benchmark") as progress:
        result = Benchmark(cells, output, work, settings, models, progress).run()
    _print_benchmark(result, [cell.key for cell in cells])
    print_line(f"All results are in {output}.")
    if plots is not None:
        for file in plot(result, plots):
            print_line(f"Plotted {file}.")


def _write_and_show(result: dict[str, Any], output: Path | None, show: Callable[[dict[str, Any]], None]) -> None:
    """Write a result and show it; it is shown even if it cannot be written, as it took long."""
    from modeling_llm2slm.data.records import write_json

    try:
        if output is not None:
            write_json(output, result)
    finally:
        show(result)


def _preset_and_folder(entry: str) -> tuple[str, str]:
    preset, _, folder = entry.partition("=")
    if not folder:
        raise typer.BadParameter("--slm-tokenizer takes PRESET=FOLDER.")
    return preset, folder


def _print_scores(result: dict[str, Any]) -> None:
    table = number_table("measure", "value", title=f"{count_of(result['examples'], 'example')} of {result['data']}")
    for name, value in {**result["scores"], **result["speed"]}.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    out.print(table)
    for name, signature in result["signatures"].items():
        print_line(f"{name}: {signature}")


def print_comparison(result: dict[str, Any]) -> None:
    """Print how far a model agrees with its LLM, how fast both are, and the outputs that differ most."""
    title = f"{count_of(result['prompts'], 'prompt')} of {result['data']}"
    table = number_table("measure", "model", "LLM", "agreement", title=title)
    for name, agreement in result["agreement"].items():
        scores = [result[key].get(name) for key in ("scores", "llm_scores")]
        table.add_row(name, *(f"{score:.2f}" if score is not None else "" for score in scores), f"{agreement:.2f}")
    for name, value in result["speed"].items():
        table.add_row(name, f"{value:.2f}", f"{result['llm_speed'][name]:.2f}", "")
    out.print(table)
    if result["speed_up"] is not None:
        print_line(f"The model generates {result['speed_up']:.2f} times as fast as the LLM.{_lengths(result)}")
    for row in result["worst"]:
        print_line(f"\nchrF {row['chrf']:.1f}, row {row['row']}", style="bold")
        for name, text in (("prompt", row["prompt"]), ("model", row["output"]), ("LLM", row["llm_output"])):
            print_line(f"  {name:7} {one_line(text)}")


def _lengths(result: dict[str, Any]) -> str:
    """Return a sentence with the mean lengths of both models' outputs if they differ by more than a fifth."""
    own, of_llm = (result[name]["tokens_per_output"] for name in ("speed", "llm_speed"))
    if abs(own - of_llm) <= max(own, of_llm) / 5:
        return ""
    return (
        f" The outputs have {own:.1f} tokens, the LLM's {of_llm:.1f}: the speed-up compares outputs of different "
        "lengths."
    )


def _print_plan(result: dict[str, Any]) -> None:
    candidates = result["candidates"]
    table = number_table("", *(candidate["name"] for candidate in candidates))
    for name, value in _plan_rows(result).items():
        table.add_row(name, *map(value, candidates))
    out.print(table)
    if any(row["tokens_assumed"] for row in candidates):
        print_line("* assumed to be as many as the LLM's: the SLM's tokenizer was not found (--slm-tokenizer).")
    for row in candidates:
        if row["slm_config"]:
            print_line(
                f"{row['name']} is a GPT-2 as wide as the LLM, with a quarter of its decoder layers and random "
                "weights. --output stores its slm_config, for build --slm."
            )
    threads = count_of(result["threads"], "thread")
    print_line(
        f"{count_of(result['prompts'], 'prompt')} of {result['prompt_tokens']:.1f} tokens; their hidden states take "
        f"{size(result['store_bytes'])}. Measured on {result['device']}, {threads}, batch size 1."
    )
    used, limit = size(result["memory_used"]), size(result["memory_limit"])
    print_line(f"The measurement took {used} of memory; its limit was {limit} (--memory).")
    print_line(result["recommendation"], style="bold")


def _plan_rows(result: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], str]]:
    epochs = f"{result['epochs']:g} epoch" + ("s" if result["epochs"] != 1 else "")
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "speed-up per output": lambda row: f"{row['speed_up']:.2f}",
        "ms per output, LLM": lambda row: f"{row['llm_ms_per_output']:.0f}",
        "ms per output, LLM-to-SLM": lambda row: f"{row['ms_per_output']:.0f}",
        "tokens per output, LLM": lambda row: f"{result['output_tokens']:.1f}",
        "tokens per output, SLM": lambda row: f"{row['output_tokens']:.1f}" + ("*" if row["tokens_assumed"] else ""),
        "parameters that decode": lambda row: f"{row['slm_parameters'] / 1e6:.0f}M",
        "memory to generate": lambda row: size(row["inference_bytes"]),
        "memory to train": lambda row: size(row["training_bytes"]),
        "time to distill, once": lambda row: duration(3600 * row["distill_hours"]),
        "time to encode, once": lambda row: duration(3600 * row["encode_hours"]),
        f"time to train {epochs}": lambda row: duration(3600 * row["train_hours"]),
    }
    if any(row["timed_batch_size"] < result["batch_size"] for row in result["candidates"]):
        rows["batch size of the timed step"] = lambda row: str(row["timed_batch_size"])
    if any(row["too_long"] for row in result["candidates"]):
        rows["prompts that are too long"] = lambda row: f"{row['too_long']:,}"
    return rows


def _print_benchmark(result: dict[str, Any], keys: list[str]) -> None:
    for preset in dict.fromkeys(result["cells"][key]["preset"] or "given" for key in keys):
        table = number_table("", "load, s", "memory", title=preset)
        for name, cost in result["contestants"][preset].items():
            table.add_row(name, f"{cost['load_seconds']:.1f}", size(cost["peak_bytes"]))
        out.print(table)
    for key in keys:
        cell = result["cells"][key]
        out.print(_cell_table(key, cell))
        stages = ", ".join(f"{name} {value:.0f} ms" for name, value in cell["stages_ms"].items())
        reading = f"weights are read at {cell['gigabytes_per_second']:.1f} GB/s"
        print_line(f"{stages}; {reading}." if stages else f"{reading}.".capitalize())
        if "speedup" in (best := cell.get("best", {})):
            print_line(f"{best['llm2slm']} is {best['speedup']:.2f} times as fast as {best['llm']}, the LLM's best.")


def _cell_table(key: str, cell: dict[str, Any]) -> Table:
    noise = f", disturbed: other processes used {cell['others_busy']:.1f} processors" if cell["noisy"] else ""
    headers = ("", "s", "x LLM", "first, ms", "token, ms", "floor, ms", "tokens/s")
    table = number_table(*headers, title=f"{key}{noise}")
    llm = cell["results"].get("llm")
    for name, row in cell["results"].items():
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{llm['seconds'] / row['seconds']:.2f}" if llm else "",
            f"{row['first_token_ms']:.0f}",
            f"{row['ms_per_token']:.1f}",
            f"{row['floor_ms_per_token']:.1f}" if "floor_ms_per_token" in row else "",
            f"{row['tokens_per_second']:.1f}",
        )
    return table
