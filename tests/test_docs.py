"""The README and the documentation site: commands parse, code runs, links and messages exist, pages stay short."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

import llm2slm


ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# What a fence may need that this machine lacks: `<!-- needs: gpu -->` in the line before it.
NEEDS = {
    "gpu": "several devices",
    "hub": "an account on the Hub",
    "input": "files that only some users have",
    "network": "a package index",
    "port": "a port of its own",
    "time": "minutes to hours",
}
EXAMPLES = [
    ("A man is sleeping.", "Ein Mann schläft."),
    ("Two dogs are playing.", "Zwei Hunde spielen."),
    ("A woman reads a book.", "Eine Frau liest ein Buch."),
    ("The dog sees the man.", "Der Hund sieht den Mann."),
]


class Fence(NamedTuple):
    """A block of code on a page, the marker before it and what it prints."""

    page: Path
    line: int
    language: str
    needs: str | None
    text: str
    output: str | None


def fences(page: Path) -> list[Fence]:
    """Return the fences of a page; a `text` fence after Python code is what that code prints."""
    pattern = r"^(?:<!-- needs: ([^\n]+) -->\n)?```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?"
    text = page.read_text(encoding="utf-8")
    return [
        Fence(page, text[: found.start()].count("\n") + 1, found[2], found[1], found[3], found[4])
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


ALL = [fence for page in PAGES for fence in fences(page)]
CODE = [fence for fence in ALL if fence.language in ("bash", "python")]
RUNNABLE = list(dict.fromkeys(fence.page for fence in CODE if fence.needs is None))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def lines(fence: Fence) -> Iterator[list[str]]:
    """Yield the words of each command of a shell fence, without comments."""
    for line in fence.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def commands(fence: Fence) -> Iterator[list[str]]:
    """Yield the arguments of each call of `llm2slm` in a shell fence, also behind a launcher or in a pipe."""
    for words in lines(fence):
        while "llm2slm" in words:
            before, words = words[: words.index("llm2slm")], words[words.index("llm2slm") + 1 :]
            if before[-1:] == ["--model"]:  # the model of lm-eval
                continue
            ends = [words.index(end) for end in ("|", ">", "&", "&&") if end in words]
            yield words[: min(ends, default=len(words))]


def parse(arguments: Sequence[str]) -> None:
    """Parse arguments with the real command line, without running the command."""
    command: Any = typer.main.get_command(llm2slm.app)
    words = llm2slm._with_bare_ray(list(arguments))
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command = command.commands[words.pop(0)]
    command.make_context("llm2slm", words)


@pytest.mark.parametrize("fence", CODE, ids=lambda fence: f"{name(fence.page)}:{fence.line}")
def test_fence_is_run_or_marked_with_what_it_needs(fence: Fence) -> None:
    assert fence.needs is None or fence.needs in NEEDS


@pytest.mark.parametrize("fence", CODE, ids=lambda fence: f"{name(fence.page)}:{fence.line}")
def test_fence_parses(fence: Fence) -> None:
    if fence.language == "python":
        compile(fence.text, name(fence.page), "exec")
        return
    for arguments in commands(fence):
        try:
            parse(arguments)
        except Exception as error:
            raise AssertionError(f"llm2slm {shlex.join(arguments)}: {error}") from error


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name: tiny models under real names, data and a recipe."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
    from modeling_llm2slm.inference.text_to_text import TextToText

    folder = tmp_path_factory.mktemp("workspace")
    llm, gpt2, t5 = (
        str(folder / name) for name in ("google-t5/t5-large", "openai-community/gpt2", "google-t5/t5-small")
    )
    shutil.copytree(ROOT / "examples/demo/llm", llm)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    end = tokenizer.eos_token_id
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    slm = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, n_embd=128, n_layer=2, n_head=4, n_positions=256))
    small = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_heads=4,
            num_layers=1,
            num_decoder_layers=1,
            decoder_start_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    )
    for model, path in ((slm, gpt2), (small, t5)):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(llm, gpt2, decoder_start_token_id=end)
    model.generation_config.max_new_tokens = 16
    for start in ("runs/start", "runs/model"):
        model.save_pretrained(folder / start)
        LLM2SLMProcessor.from_encoder_decoder_pretrained(llm, gpt2).save_pretrained(folder / start)
    assert TextToText.from_pretrained(folder / "runs/model").generate([EXAMPLES[0][0]])

    rows = [json.dumps({"prompt": prompt, "target": target}) + "\n" for prompt, target in EXAMPLES]
    for file in ("train.jsonl", "validation.jsonl", "test.jsonl", "prompts.jsonl"):
        (folder / file).write_text("".join(rows * (2 if file == "train.jsonl" else 1)), encoding="utf-8")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt, _ in EXAMPLES) * 3, encoding="utf-8")
    recipe = {"model": "runs/start", "output_dir": "runs/trained", "num_train_epochs": 1, "bf16": False}
    data = {"train_data": "train.jsonl", "validation_data": "validation.jsonl", "per_device_train_batch_size": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | data), encoding="utf-8")
    (folder / "configuration").symlink_to(ROOT / "configuration")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_page_runs_from_top_to_bottom(
    page: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workspace, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, Any] = {"__name__": "page"}
    for fence in fences(page):
        if fence.language == "yaml" and (file := re.match(r"# (\S+\.yaml)\n", fence.text)):
            Path(file[1]).write_text(fence.text, encoding="utf-8")
        elif fence.needs is None and fence.language == "python":
            printed = StringIO()
            with redirect_stdout(printed):
                exec(compile(fence.text, f"{name(page)}:{fence.line}", "exec"), names)
            assert fence.output is None or printed.getvalue() == fence.output
        elif fence.needs is None and fence.language == "bash":
            run_shell(fence)


def run_shell(fence: Fence) -> None:
    """Run a shell fence: calls of `llm2slm` in this process, which has imported everything; all else in a shell."""
    if any({"|", ">", "&"} & set(words) or words[0] != "llm2slm" for words in lines(fence)):
        subprocess.run(["bash", "-euo", "pipefail", "-c", fence.text], check=True)
        return
    for arguments in commands(fence):
        try:
            llm2slm.main(arguments)
        except SystemExit as stopped:
            if stopped.code:
                raise AssertionError(f"llm2slm {shlex.join(arguments)} failed") from stopped


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_links_exist(page: Path) -> None:
    targets = re.findall(
        r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    )
    broken = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES[2:], ids=name)
def test_page_is_short_and_in_the_navigation(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) < 150
    assert f": {page.relative_to(DOCS).as_posix()}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_readme_has_at_most_1400_words() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1400


def test_every_result_is_the_source_of_a_figure() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [file.name for file in (DOCS / "results").iterdir() if f"results/{file.name})" not in text] == []


def messages() -> set[str]:
    """Return every text in the code, with … for what is filled in."""
    found = set()
    for folder in ("modeling_llm2slm", "conversion", "llm2slm"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.add("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_headings_of_the_error_page_are_messages_of_the_code() -> None:
    pages = [(DOCS / "reference" / name).read_text(encoding="utf-8") for name in ("errors.md", "errors-commands.md")]
    text = "\n".join(page.partition("## Other symptoms")[0] for page in pages)
    headings = [part for heading in re.findall(r"^### (.+)$", text, re.MULTILINE) for part in heading.split(" / ")]
    everything = "\n".join(messages())
    patterns = {heading: ".*".join(map(re.escape, heading.split("…"))) for heading in headings}
    assert [heading for heading, pattern in patterns.items() if not re.search(pattern, everything)] == []


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    reference = tmp_path / "reference"
    assert "--prompt-column" in (reference / "commands/encode/index.html").read_text(encoding="utf-8")
    assert "learning_rate_mapping" in (reference / "recipe/index.html").read_text(encoding="utf-8")
    assert "DistillSettings" in (reference / "settings/index.html").read_text(encoding="utf-8")
