"""Commands that generate text: `generate` and `serve`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import claimed, load_text_to_text, local_device, quiet_libraries
from .options import ModelArgument, is_given, load_module, refuse_given, with_settings
from .output import CAUSES, count_of, one_line, out, print_line, print_note, resumable
from .progress import counting


if TYPE_CHECKING:
    from modeling_llm2slm.inference.outputs import BlankOutputs
    from modeling_llm2slm.inference.text_to_text import TextToText
    from modeling_llm2slm.settings import (
        GenerateFileSettings,
        LoadSettings,
        PlaygroundSettings,
        RaySettings,
        ServeSettings,
    )

PANEL = "Generation"
commands = typer.Typer()


@commands.command(rich_help_panel=PANEL)
@with_settings
def generate(
    context: typer.Context,
    model: ModelArgument,
    settings: GenerateFileSettings,
    ray: RaySettings,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts. Default: standard input.")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="Read prompts from this file: lines of text, or .jsonl, .csv, .parquet; with --output also a folder "
            "of .parquet or .jsonl, or an address such as s3://bucket/prompts/."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write outputs to this file, one on each line; a .jsonl keeps all columns of --file."),
    ] = None,
) -> None:
    """
    Generate an output for each prompt, one on each line, shown while it is written.

    `llm2slm generate runs/model "A man sleeps." "Two dogs play."`

    `cat prompts.txt | llm2slm generate runs/model --num-beams 4 --batch-size 16 > outputs.txt`

    `llm2slm generate runs/model --file prompts.jsonl --output outputs.jsonl`

    With `--file` and `--output`, prompts of similar length share a batch, equal prompts are computed once (with
    `--sample`, encoded once), an interrupted run resumes, and `--ray` shares the work among machines. Otherwise the
    batch size is 1, unless it is given, and outputs are streamed.
    """
    if prompts and file:
        raise typer.BadParameter("Give prompts or --file, not both.")
    _refuse_options_without_effect(context, file, output)
    if file is not None and "://" not in file and not (Path(file).is_file() or (output and Path(file).is_dir())):
        raise load_module(CAUSES).no_file(file)
    if file is not None and output is not None:
        _generate_file(model, file, output, settings, ray)
        return
    with claimed(output, overwrite=settings.overwrite, inputs=(model,)):
        text_to_text = _load(model, settings)
        batch_size = settings.batch_size if is_given(context, "batch_size") else 1
        texts = islice(_prompts(prompts, file, settings), settings.limit)
        if output is not None:
            _write_outputs(text_to_text, texts, batch_size, output, settings.generate_kwargs())
        elif batch_size == 1 and settings.num_beams == 1:
            _stream(text_to_text, texts, settings.generate_kwargs())
        else:
            _print_batches(text_to_text, texts, batch_size, settings.generate_kwargs())


@commands.command(rich_help_panel=PANEL)
@with_settings
def serve(
    context: typer.Context,
    model: ModelArgument,
    settings: ServeSettings,
    loading: LoadSettings,
    page: PlaygroundSettings,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
) -> None:
    """
    Serve a model over HTTP with OpenAI's API; requests that arrive together share a batch.

    `llm2slm serve runs/model --port 8000`

    `curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "A man sleeps."}'`

    `llm2slm serve runs/model --playground --examples prompts.txt`

    The routes are /v1/completions, /v1/chat/completions (both also streamed), /v1/models, /health and /metrics; /docs
    describes them. Decoding is greedy unless a request has a temperature. SIGTERM finishes accepted requests, then
    exits. There is no authentication: put the server behind a proxy.
    """
    if not page.playground:
        refuse_given(context, ("llm", "examples"), "belongs to --playground")
    from modeling_llm2slm.serving.server import bind
    from modeling_llm2slm.serving.server import serve as serve_model

    settings = replace(settings, name=settings.name or Path(model).resolve().name)
    sock = bind(host, port)
    text_to_text = load_text_to_text(model, loading)
    address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    opened = f" Open {address}/playground/ in a browser." if page.playground else ""
    line = f"{settings.name} is served at {address}.{opened} Stop it with Ctrl-C."
    serve_model(text_to_text, settings, sock, lambda: print_line(line), page)


def _refuse_options_without_effect(context: typer.Context, file: str | None, output: Path | None) -> None:
    if file is None or output is None:
        options = ("batch_tokens", "column", "ray", "ray_workers", "ray_cpus", "ray_gpus")
        refuse_given(context, options, "belongs to --file with --output")
    elif not output.name.endswith((".jsonl", ".jsonl.gz")):
        refuse_given(context, ("column",), "needs an --output that ends in .jsonl or .jsonl.gz")
    if output is None:
        refuse_given(context, ("overwrite",), "belongs to --output")
    if file is None:
        refuse_given(context, ("prompt_column", "skip_bad_rows"), "belongs to --file")


@resumable
def _generate_file(model: str, file: str, output: Path, settings: GenerateFileSettings, ray: RaySettings) -> None:
    quiet_libraries(data=True)
    from modeling_llm2slm.inference.files import generate_file

    settings = replace(settings, device=local_device(settings.device))
    with counting("outputs") as count:
        report = generate_file(model, file, output, settings, ray=ray, progress=partial(count, "Generating"))
    repeated = f"{_were(report.duplicates, 'prompt')} repeated"
    kept = f"{_were(report.kept, 'output')} kept from an interrupted run"
    facts = [fact for count, fact in ((report.duplicates, repeated), (report.kept, kept)) if count]
    tokens, rate = count_of(report.tokens, "token"), f"{report.tokens_per_second:,.0f} tokens/s"
    facts.append(f"{tokens} took {report.seconds:.1f} s ({rate})")
    are = "is" if report.rows == 1 else "are"
    print_line(f"{count_of(report.rows, 'output')} {are} in {output}: {', '.join(facts)}.")


def _were(number: int, noun: str) -> str:
    return f"{count_of(number, noun)} {'was' if number == 1 else 'were'}"


def _load(model: str, settings: GenerateFileSettings) -> TextToText:
    quiet_libraries()
    from torch import manual_seed

    if settings.seed is not None:
        manual_seed(settings.seed)
    return load_text_to_text(model, settings, prompt_max_length=settings.prompt_max_length)


def _prompts(prompts: list[str] | None, file: str | None, settings: GenerateFileSettings) -> Iterator[str]:
    from modeling_llm2slm.data.text import check_text, from_command_line, without_end

    if prompts:
        yield from (from_command_line(prompt, f"Prompt {number}") for number, prompt in enumerate(prompts, 1))
    elif file is not None:
        quiet_libraries(data=True)
        from modeling_llm2slm.data.loading import load_prompts

        yield from load_prompts(file, settings)["prompt"]
    else:
        if sys.stdin.isatty():
            print_note("Type one prompt on each line; end with Ctrl-D.")
        for number, line in enumerate(_lines_of_stdin(), 1):
            text = line.removeprefix("\ufeff") if number == 1 else line  # a byte-order mark
            yield without_end(check_text(text, f"Standard input, line {number}"))


def _lines_of_stdin() -> Iterator[str]:
    try:
        yield from sys.stdin
    except OSError as error:
        raise OSError(error.errno, error.strerror, "Standard input") from error


def _write_outputs(
    text_to_text: TextToText, prompts: Iterator[str], batch_size: int, output: Path, options: dict[str, Any]
) -> None:
    from modeling_llm2slm.data.atomic import atomic_write
    from modeling_llm2slm.data.formats import open_file
    from modeling_llm2slm.inference.outputs import warn_of_blank_outputs

    outputs = text_to_text.generate(list(prompts), batch_size, **options)
    warn_of_blank_outputs(outputs)
    with (
        atomic_write(output) as temporary,
        open_file(temporary, "wt", encoding="utf-8", errors="backslashreplace") as written,
    ):
        written.writelines(f"{one_line(text)}\n" for text in outputs)


def _stream(text_to_text: TextToText, prompts: Iterator[str], options: dict[str, Any]) -> None:
    blank = _blank_outputs()
    for prompt in prompts:
        text = ""
        with closing(text_to_text.stream(prompt, **options)) as pieces:  # stops the model if nothing can be written
            for piece in pieces:
                out.file.write(one_line(piece))
                out.file.flush()
                text += piece
        out.file.write("\n")
        out.file.flush()
        blank.count([text])
    blank.warn()


def _print_batches(text_to_text: TextToText, prompts: Iterator[str], batch_size: int, options: dict[str, Any]) -> None:
    blank = _blank_outputs()
    while batch := list(islice(prompts, 16 * batch_size)):  # enough to batch prompts of similar length together
        outputs = text_to_text.generate(batch, batch_size, **options)
        out.file.writelines(one_line(text) + "\n" for text in outputs)
        out.file.flush()
        blank.count(outputs)
    blank.warn()


def _blank_outputs() -> BlankOutputs:
    from modeling_llm2slm.inference.outputs import BlankOutputs

    return BlankOutputs()
