"""Build and train the two models of the demo: the SLM alone, and the same SLM behind the frozen LLM."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging, set_seed

from examples.demo import DATA, HERE, LLM
from modeling_llm2slm import LLM2SLMForConditionalGeneration, LLM2SLMProcessor
from modeling_llm2slm.data.atomic import atomic_write
from modeling_llm2slm.training.recipe import load_recipe
from modeling_llm2slm.training.run import train


def train_side_by_side(folders: dict[str, Path], threads: int) -> None:
    """
    Train models at the same time, each in a process of its own.

    Two processes with one thread each use two cores as well as one process with two threads would. On a busy machine
    they are several times faster: threads of one process wait for each other at each of many small operations.

    Args:
        folders: The folder of each model by its name, `"SLM alone"` or `"LLM-to-SLM"`.
        threads: CPU threads of each process.
    """
    with ProcessPoolExecutor(len(folders), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(train_model, name, folder, threads) for name, folder in folders.items()]
        for future in running:
            future.result()


def train_model(name: str, output: Path, threads: int) -> None:
    """Train one model, which starts with random weights, unless an interrupted run can be resumed."""
    quieten()
    torch.set_num_threads(threads)
    sys.stderr = Labelled(name)
    start = output.parent / "start" / output.name
    with atomic_write(start) as temporary:
        build(temporary, with_llm=name == "LLM-to-SLM")
    data = {"train_data": DATA["train"], "validation_data": DATA["validation"]}
    train(load_recipe(HERE / "slm.yaml", {"model": str(start), "output_dir": str(output), **data}))


def build(folder: Path, with_llm: bool) -> None:
    """Write an SLM with random weights, alone or behind the LLM. All models share one tokenizer."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(LLM)
    slm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(HERE / "gpt2.json"))
    model, processor = slm, tokenizer
    if with_llm:
        model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
            str(LLM),
            decoder_model=slm,
            fusion="add",
            shared_tokenizer=True,
            encoder_dtype="float32",
            # Outputs start as the LLM's do, so that the model can draft for it (`as_assistant_of`).
            decoder_start_token_id=AutoConfig.from_pretrained(LLM).decoder_start_token_id,
        )
        processor = LLM2SLMProcessor(tokenizer, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def quieten() -> None:
    """Keep warnings and progress bars of the libraries out of the output."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


class Labelled:
    """
    A standard error that starts each line of a process with a label. It is no terminal, so the progress of a training
    is written to it as lines.
    """

    def __init__(self, label: str):
        self.label = label
        self.stream = sys.stderr

    def write(self, text: str) -> int:
        """Write text that is one line."""
        self.stream.write(f"  {self.label}: {text}" if text.strip() else text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return False
