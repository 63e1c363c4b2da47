"""
Your first LLM-to-SLM model: build it, train it on sixteen examples, generate, save it and load it again.

    python examples/first_model.py

The script needs no network and takes less than a minute. Its LLM is the small T5 of the demo. The steps are the same
with pretrained models: replace `LLM` with a name on the Hub such as `"google-t5/t5-large"`, and `decoder_model=slm`
with `decoder_pretrained_model_name_or_path="openai-community/gpt2"`.
"""

import os
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in this folder

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from modeling_llm2slm import DataCollatorForLLM2SLM, LLM2SLMForConditionalGeneration, LLM2SLMProcessor


DEMO = Path(__file__).parent / "demo"
LLM = str(DEMO / "llm")


def main(output: str) -> None:
    """Run the tutorial and write to the folder `output`."""
    torch.set_num_threads(1)  # models this small gain nothing from more
    set_seed(0)

    # 1. Build. The SLM is a GPT-2 with random weights; the LLM's encoder comes pretrained and stays frozen.
    tokenizer = AutoTokenizer.from_pretrained(LLM)
    slm = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=128, n_layer=2, n_head=4, n_positions=128, initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model = LLM2SLMForConditionalGeneration.from_encoder_decoder_pretrained(
        LLM, decoder_model=slm, fusion="add", shared_tokenizer=True, encoder_dtype="float32"
    )
    processor = LLM2SLMProcessor(tokenizer, tokenizer)
    trainable = model.num_parameters(only_trainable=True)
    print(f"{trainable:,} of {model.num_parameters():,} parameters are trained: the projector and the SLM.")

    # 2. Train. The processor tokenizes prompts for the LLM and targets for the SLM; the collator pads them.
    examples = load_dataset("json", data_files=str(DEMO / "data" / "train.jsonl.gz"), split="train[:16]")
    features = [processor(text=one["prompt"], text_target=one["target"]) for one in examples]
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            f"{output}/checkpoints", max_steps=120, learning_rate=3e-3, per_device_train_batch_size=16, use_cpu=True,
            logging_steps=40, save_strategy="no", report_to="none",
        ),
        train_dataset=features,
        data_collator=DataCollatorForLLM2SLM(processor),
        processing_class=processor,
    )  # fmt: skip
    loss = trainer.train().training_loss
    print(f"Mean training loss: {loss:.2f}")

    # 3. Generate with transformers' own `generate()`. The model has learned these few examples by heart.
    prompts = examples["prompt"][:3]
    batch = processor(text=prompts, padding=True, return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=64)
    outputs = processor.batch_decode(tokens, skip_special_tokens=True)
    for prompt, text, target in zip(prompts, outputs, examples["target"][:3], strict=True):
        print(f"\nprompt  {prompt}\noutput  {text}\ntarget  {target}")

    # 4. Save and load. Any script that imports `modeling_llm2slm` can load the model with the Auto classes.
    model.save_pretrained(f"{output}/model")
    processor.save_pretrained(f"{output}/model")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(f"{output}/model")
    loaded_processor = AutoProcessor.from_pretrained(f"{output}/model")
    tokens = loaded.generate(**loaded_processor(text=prompts, padding=True, return_tensors="pt"), max_new_tokens=64)
    same = loaded_processor.batch_decode(tokens, skip_special_tokens=True) == outputs
    print(f"\nThe loaded model generates the same text: {same}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
