"""Pruned vocabularies: the same tokens and logits for a corpus, and no loss for any other text."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    Gemma3TextConfig,
    GemmaTokenizer,
    GPT2Config,
    GPT2Tokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
    T5Tokenizer,
)

from modeling_llm2slm.conversion.prune_vocabulary import prune_vocabulary
from modeling_llm2slm.settings import PruneSettings
from tests.support.checkpoints import write_bart, write_checkpoint
from tests.support.families import BART, GROUPED, ROTARY, T5, move_vectors


ROOT = Path(__file__).resolve().parents[2]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
OUTSIDE = ["", "  two  spaces ", "Ω≈ç 漢字 😀\n\ttabs", "Zebra! Äpfel, naïve œuvre", "x" * 50, "<0x41>▁<unused1>"]
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
NAMED = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def sentences(start: int, count: int) -> list[dict[str, str]]:
    with gzip.open(ROOT / "examples" / "demo" / "data" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, start, start + count)]


TRAINING = [text for row in sentences(0, 600) for text in (row["prompt"], row["target"])] + ["日本語 ñ tokens 12 345"]
CORPUS = [*sentences(700, 6), {"prompt": "A café – never seen: 7 €", "target": "Ärger? <think>"}]


def fast(backend: Tokenizer, trainer: Any, **special: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(TRAINING, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(special or NAMED))


def byte_level(**options: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def gpt2() -> PreTrainedTokenizerBase:
    backend = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TRAINING, trainer)
    model = json.loads(backend.to_str())["model"]
    return GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def qwen() -> PreTrainedTokenizerBase:
    """Whole words before merges, added tokens after the vocabulary, and a template around every text."""
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer = fast(byte_level(ignore_merges=True), trainer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("<|im_start|>", special=True), AddedToken("<unused1>")])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = "{{ messages[0].content }}<|im_end|>"
    return tokenizer


def gemma() -> PreTrainedTokenizerBase:
    """All merges of every token, no words before them, bytes for unknown characters."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{number}>" for number in range(50))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=900, special_tokens=[*specials, *BYTES]))
    model = json.loads(backend.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    splits = [
        (token[:place], token[place:])
        for token in vocabulary
        for place in range(1, len(token))
        if token not in BYTES and {token[:place], token[place:]} <= vocabulary.keys()
    ]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=list(dict.fromkeys([*merges, *splits])))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def characters(prefix: str = "", suffix: str = "") -> PreTrainedTokenizerBase:
    """BPE that knows no bytes, with marks inside or at the end of words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix=prefix, end_of_word_suffix=suffix))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix=prefix, cleanup=False) if prefix else decoders.BPEDecoder(suffix)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, continuing_subword_prefix=prefix, end_of_word_suffix=suffix
    )
    tokenizer = fast(backend, trainer)
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 2))
    return tokenizer


def unigram(specials: list[str] = SPECIAL) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=[*specials], unk_token="<unk>")
    backend.train_from_iterator(TRAINING, trainer)
    return backend


def t5() -> PreTrainedTokenizerBase:
    pieces = json.loads(unigram(["<pad>", "</s>", "<unk>"]).to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in pieces], extra_ids=5)


def unigram_in_bytes() -> PreTrainedTokenizerBase:
    content = json.loads(unigram([*SPECIAL, *BYTES]).to_str())
    content["model"]["byte_fallback"] = True
    content["decoder"] = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ).__getstate__()
    content["decoder"] = json.loads(content["decoder"])
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in BYTES]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **NAMED)


IDS = {"pad_token_id": 0, "eos_token_id": 1}
OTHERS = {"bos_token_id": None, **IDS}
OPT: dict[str, Any] = {
    "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
# Tokenizer, config, padding rows of its embeddings.
KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], Callable[[int], Any], int]] = {
    "GPT-2": (gpt2, lambda size: GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64), 0),
    "Qwen3": (qwen, lambda size: Qwen3Config(vocab_size=size, **GROUPED, tie_word_embeddings=True), 11),
    "GPT-NeoX": (qwen, lambda size: GPTNeoXConfig(vocab_size=size, **ROTARY), 0),
    "Gemma 3": (
        gemma,
        lambda size: Gemma3TextConfig(vocab_size=size, **GROUPED, layer_types=["full_attention"] * 2, eos_token_id=1),
        64,
    ),
    "Llama": (unigram_in_bytes, lambda size: LlamaConfig(vocab_size=size, **GROUPED, **IDS), 3),
    "OPT": (
        lambda: characters(suffix="</w>"),
        lambda size: OPTConfig(vocab_size=size, **OPT, word_embed_proj_dim=16, **IDS), 0,
    ),
    "Phi": (gemma, lambda size: PhiConfig(vocab_size=size, **ROTARY, **OTHERS), 0),  # the head has a bias
    "T5": (t5, lambda size: T5Config(vocab_size=size, **T5, num_layers=1, decoder_start_token_id=0), 28),
    "FLAN-T5": (
        t5, lambda size: T5Config(vocab_size=size, **T5, num_layers=1, tie_word_embeddings=False,
        decoder_start_token_id=0), 0,
    ),
    "BART": (
        lambda: characters(prefix="##"),
        lambda size: BartConfig(vocab_size=size, **BART, encoder_layers=1, decoder_layers=1, **IDS,
        decoder_start_token_id=2, forced_eos_token_id=1), 5,
    ),
}  # fmt: skip


def write(kind: str, folder: Path) -> Path:
    make_tokenizer, make_config, more = KINDS[kind]
    tokenizer = make_tokenizer()
    config = make_config(len(tokenizer) + more)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    model = move_vectors(auto_class.from_config(config).eval())
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            buffer.normal_()
    model.generation_config.update(
        eos_token_id=[1, 400], bad_words_ids=[[70, 400], [90]], suppress_tokens=[80], sequence_bias=[[[400, 60], 5.0]]
    )
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"source": row["prompt"], "target": row["target"]}) + "\n" for row in CORPUS)
    return path


SETTINGS = PruneSettings(prompt_column="source")


def load(folder: Path) -> tuple[PreTrainedTokenizerBase, Any]:
    seq2seq = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder")
    auto_class = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return AutoTokenizer.from_pretrained(folder), auto_class.from_pretrained(folder)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    inputs = torch.tensor([ids])
    more = {"decoder_input_ids": inputs} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=inputs, **more).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_keeps_its_tokens_and_logits_and_other_texts_lose_nothing(kind, corpus, tmp_path):
    report = dict(prune_vocabulary(write(kind, tmp_path / "llm"), tmp_path / "pruned", [corpus], SETTINGS).rows)
    (before, llm), (after, pruned) = load(tmp_path / "llm"), load(tmp_path / "pruned")
    texts = [text for row in CORPUS for text in row.values()]
    assert report["texts with the same tokens"] == f"{len(texts)} of {len(texts)}"
    assert len(after) == pruned.config.vocab_size < 0.85 * len(before)
    assert pruned.get_input_embeddings().weight.shape[0] == len(after) < llm.config.vocab_size
    for text in texts:
        old, new = before(text)["input_ids"], after(text)["input_ids"]
        assert after.convert_ids_to_tokens(new) == before.convert_ids_to_tokens(old)
    kept = before.convert_tokens_to_ids(after.convert_ids_to_tokens(range(len(after))))
    assert kept == sorted(kept), "the order of ids"
    new = after(texts[-2])["input_ids"][:40]
    torch.testing.assert_close(logits(pruned, new), logits(llm, [kept[token] for token in new])[:, kept])
    for text in OUTSIDE:
        ids = after(text)["input_ids"]
        assert after.decode(ids) == before.decode(before(text)["input_ids"])
        assert not ids or max(ids) < len(after)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_in_configs_are_those_of_the_same_tokens(kind, corpus, tmp_path):
    prune_vocabulary(write(kind, tmp_path / "llm"), tmp_path / "pruned", [corpus], SETTINGS)
    (before, llm), (after, pruned) = load(tmp_path / "llm"), load(tmp_path / "pruned")

    def tokens(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [tokens(tokenizer, item) for item in value]
        return tokenizer.convert_ids_to_tokens(value) if isinstance(value, int) else value

    names = [name for name in llm.config.to_dict() if name.endswith("token_id")]
    assert [tokens(after, getattr(pruned.config, name)) for name in names] == [
        tokens(before, getattr(llm.config, name)) for name in names
    ]
    for name in ("eos_token_id", "bad_words_ids", "suppress_tokens", "sequence_bias", "decoder_start_token_id"):
        values = [getattr(model.generation_config, name) for model in (pruned, llm)]
        assert tokens(after, values[0]) == tokens(before, values[1]), name
    assert after.special_tokens_map == before.special_tokens_map
    assert after.chat_template == before.chat_template
    assert {*before.all_special_tokens, "<think>"} & before.get_vocab().keys() <= after.get_vocab().keys()
    assert not any("unused" in token for token in after.get_vocab())


def test_rare_tokens_are_written_in_others(corpus, tmp_path):
    llm = write("GPT-2", tmp_path / "llm")
    (tmp_path / "often.txt").write_text("the young woman\n" * 2)
    settings = PruneSettings(prompt_column="source", min_count=2)
    report = dict(prune_vocabulary(llm, tmp_path / "pruned", [corpus, tmp_path / "often.txt"], settings).rows)
    assert report["texts with the same tokens"] == f"2 of {2 * len(CORPUS) + 2}"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    whole = AutoTokenizer.from_pretrained(llm)
    assert tokenizer.tokenize("the young woman") == whole.tokenize("the young woman")
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for row in CORPUS for text in row.values())


def test_texts_come_from_lines_and_from_several_columns(tmp_path):
    llm = write("GPT-2", tmp_path / "llm")
    (tmp_path / "a.txt").write_text("A red gate.\n", encoding="utf-8")
    row = {"prompt": "the man", "target": "der Mann", "llm_output": "das Tor"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    corpus = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    settings = PruneSettings(target_column=["target", "llm_output"])
    report = dict(prune_vocabulary(llm, tmp_path / "pruned", corpus, settings).rows)
    assert report["texts with the same tokens"] == "5 of 5"  # a prompt for each target


def test_dtype_is_kept_and_an_output_is_replaced_only_on_request(corpus, tmp_path):
    llm = write("Gemma 3", tmp_path / "llm")
    AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16).save_pretrained(llm)
    prune_vocabulary(llm, tmp_path / "pruned", [corpus], SETTINGS)
    assert load(tmp_path / "pruned")[1].dtype == torch.bfloat16
    with pytest.raises(FileExistsError, match="add --overwrite"):
        prune_vocabulary(llm, tmp_path / "pruned", [corpus], SETTINGS)
    prune_vocabulary(llm, tmp_path / "pruned", [corpus], SETTINGS, overwrite=True)


def test_models_and_corpora_that_cannot_be_pruned_are_refused(corpus, tmp_path):
    def refused(error: type[Exception], match: str, llm: Any, *files: Any) -> None:
        with pytest.raises(error, match=match):
            prune_vocabulary(llm, tmp_path / "pruned", files, SETTINGS)
        assert not (tmp_path / "pruned").exists()

    composite = write_checkpoint("llm2slm", tmp_path / "composite")
    refused(ValueError, "is an LLM-to-SLM checkpoint", composite, corpus)
    refused(ValueError, "is a WordLevel tokenizer, which loses words", write_bart(tmp_path / "words"), corpus)
    llm = write("GPT-2", tmp_path / "llm")
    refused(ValueError, "`corpus` is empty", llm)
    refused(OSError, "no data file", llm, tmp_path / "missing.jsonl")
    (tmp_path / "other.jsonl").write_text('{"question": "?"}\n')
    refused(ValueError, "has no column 'source'", llm, tmp_path / "other.jsonl")
    shutil.copytree(llm, tmp_path / "quantized")
    config = tmp_path / "quantized" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    refused(ValueError, "is quantized", tmp_path / "quantized", corpus)
    for name in ("tokenizer.json", "vocab.json"):
        (llm / name).unlink(missing_ok=True)
    refused(OSError, "its tokenizer is empty", llm, corpus)
