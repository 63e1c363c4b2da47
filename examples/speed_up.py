"""
Speed up an LLM: train a small model on the LLM's own outputs, and compare both.

    python examples/speed_up.py

The LLM is the small T5 of the demo; the prompts are English sentences that it was trained to translate. No references
are needed. The script prints the command of each stage and writes to `runs/speed_up`. It takes about four minutes on
one CPU core, and an interrupted run resumes where it stopped. The command `llm2slm speedup` does the same.
"""

import os
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in this folder

import torch

from modeling_llm2slm.workflows.speedup import Speedup, SpeedupSettings


DEMO = Path(__file__).parent / "demo"


def main(output: str = "runs/speed_up", limit: int = 8000, epochs: float = 6) -> None:
    """
    Run all stages.

    Args:
        output: Folder for the stages' results; `model` in it is the trained model.
        limit: Number of prompts; 500 of them are held out for validation and 500 for the test, at most a tenth each.
        epochs: Number of epochs. More prompts and more epochs bring the model closer to the LLM.
    """
    torch.set_num_threads(1)  # models this small gain nothing from more
    settings = SpeedupSettings(
        llm=str(DEMO / "llm"),
        prompts=str(DEMO / "data" / "train.jsonl.gz"),
        slm=str(DEMO / "gpt2.json"),  # random weights; with a pretrained SLM, its name on the Hub
        limit=limit,
        num_beams=1,  # the LLM's outputs are greedy; beam search gives better targets and takes longer
        max_new_tokens=64,
        encoder_dtype="float32",
        # Recipe fields; a pretrained SLM needs a lower learning rate and fewer epochs.
        recipe={"num_train_epochs": epochs, "learning_rate": 3.0e-3, "learning_rate_mapping": {}, "bf16": False},
    )
    # distill: the LLM generates a target for each prompt. build: the SLM is put behind the LLM's encoder.
    # encode: the LLM's hidden states are computed once and stored. train: the SLM trains on them, without the LLM.
    # evaluate: both models generate for the held-out prompts.
    result = Speedup(settings, output).run(announce=lambda stage, command: print(f"\n{stage}: {command}"))

    print(f"\nAgreement with the LLM's outputs: {result['agreement']['bleu']:.1f} BLEU")
    print(f"Against the references: {result['scores']['bleu']:.1f} BLEU, the LLM {result['llm_scores']['bleu']:.1f}")
    print(
        f"Time per output: {result['speed']['ms_per_output']:.0f} ms, the LLM "
        f"{result['llm_speed']['ms_per_output']:.0f} ms ({result['speed_up']:.1f} times faster)"
    )
    print(f"The model is in {output}/model. Serve it: llm2slm serve {output}/model")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/speed_up")
