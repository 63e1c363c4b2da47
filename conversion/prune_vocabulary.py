"""Prune the vocabulary of a model: keep the tokens that a corpus uses, in the tokenizer and in the embeddings."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_llm2slm.data.formats import file_format_of
from modeling_llm2slm.data.loading import load_examples, load_prompts
from modeling_llm2slm.inference.parts import count_parameters
from modeling_llm2slm.settings import PruneSettings
from modeling_llm2slm.states.loading import load, load_model

from .output import output_folder
from .parts import load_plain, tokenizer_of
from .report import Report, slm_logits
from .vocabulary import needed_tokens, prune_backend, read_backend


BATCH = 1000  # texts
SAMPLE = (8, 32)  # texts whose logits are compared, and tokens of each
DROPPED = 1000  # dropped tokens whose text is encoded and decoded
# Names of settings that hold token ids, alone or in lists.
TOKEN_IDS = re.compile(r"token_(id|ids|index)$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$|^sequence_bias$")


def prune_vocabulary(
    llm: str | Path,
    output: str | Path,
    corpus: Sequence[str | Path],
    settings: PruneSettings = PruneSettings(),  # noqa: B008 - immutable
    *,
    overwrite: bool = False,
) -> Report:
    """
    Keep the tokens that a corpus uses, and what any other text needs to be encoded without loss.

    Kept are the tokens of the corpus, the pieces that they are made of, all bytes (or single characters, where the
    tokenizer knows no bytes), and all special and added tokens. Token ids become consecutive, in their former order.
    The result encodes the corpus to the same tokens and gives them the same logits, so greedy outputs change only
    where a dropped token was the likeliest.

    Args:
        llm: Folder of a decoder-only or encoder-decoder model, or its name on the Hub.
        output: The folder to write to.
        corpus: Files or data sets on the Hub, as [`load_examples`] reads them. Lines of a `.txt` file are texts.
        settings: Columns and rows of the corpus, and how often a token must occur.
        overwrite: Replace an existing folder.

    Raises:
        OSError: If something cannot be read or written.
        ValueError:
            If the tokenizer or the model cannot be pruned, if the corpus cannot be read, or if the result differs
            from its source.
    """
    if not corpus:
        raise ValueError("`corpus` is empty: name the files whose tokens are kept.")
    model = load_plain(llm)
    tokenizer = tokenizer_of(llm)
    if tokenizer is None:
        raise OSError(f"{llm} has no tokenizer: save it into the folder of the model.")
    content = read_backend(tokenizer, llm)
    report = Report(f"{llm} with fewer tokens becomes {output}")
    with output_folder(output, overwrite) as folder:
        counts, sample = _count(tokenizer, _read(corpus, settings))
        report.add("tokens of the corpus", f"{counts.total():,}, {len(counts):,} different")
        rows, before = model.get_input_embeddings().weight.shape[0], count_parameters(model)
        used = {token for token, count in counts.items() if count >= settings.min_count}
        special = {*tokenizer("", "")["input_ids"], *tokenizer.all_special_ids}
        special |= {token for config in _configs(model) for token in _ids_in(config) if 0 <= token < rows}
        ids = {token: number for number, token in enumerate(sorted(needed_tokens(content, used | special)))}
        kept = [token for token in ids if token < rows]  # a tokenizer may have tokens without a row
        sample = [[token for token in tokens if token in ids and token < rows] for tokens in sample] or [
            kept[: SAMPLE[1]]
        ]
        logits = [slm_logits(model, torch.tensor([tokens]))[..., kept] for tokens in sample]
        embeddings = [table[kept] for table in _embeddings(model)]
        _prune_model(model, kept, ids)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        pruned_content = json.dumps(prune_backend(content, ids), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(pruned_content, encoding="utf-8")

        written = load_model(type(model), folder)
        after = count_parameters(written)
        report.add("rows of the vocabulary", f"{len(kept):,} of {rows:,}")
        report.add("parameters", f"{after:,} of {before:,} ({after / before:.0%})")
        pruned = load(AutoTokenizer, folder)
        _compare_vocabulary(tokenizer, pruned, ids)
        report.add("texts with the same tokens", _compare_corpus(tokenizer, pruned, ids, _read(corpus, settings)))
        report.add("dropped tokens written in others", _compare_dropped(tokenizer, pruned, ids))
        if not all(map(torch.equal, _embeddings(written), embeddings)):
            raise ValueError("The embeddings changed in the conversion; nothing was written.")
        outputs = [slm_logits(written, torch.tensor([[ids[token] for token in tokens]])) for tokens in sample]
        pair = [torch.cat([each.flatten() for each in side]) for side in (outputs, logits)]
        report.compare("logits of kept tokens", pair, 0.05 if model.dtype.itemsize < 4 else 1e-4)
    return report


def _read(corpus: Sequence[str | Path], settings: PruneSettings) -> Iterator[list[str]]:
    """Yield the prompts and targets of a corpus in batches."""
    for source in corpus:
        if file_format_of(Path(source)) == "text":
            examples = load_prompts(source, settings)
        else:
            examples = load_examples(source, settings, settings.target_column or "target")
        for batch in examples.iter(BATCH):
            yield [text for column in batch.values() for text in column]


def _count(tokenizer: PreTrainedTokenizerBase, corpus: Iterator[list[str]]) -> tuple[Counter[int], list[list[int]]]:
    """Return how often a corpus has each token, and the tokens of its first texts."""
    counts: Counter[int] = Counter()
    sample: list[list[int]] = []
    for texts in corpus:
        encoded = tokenizer(texts, verbose=False)["input_ids"]
        counts.update(token for tokens in encoded for token in tokens)
        sample += [tokens[: SAMPLE[1]] for tokens in encoded if tokens][: SAMPLE[0] - len(sample)]
    return counts, sample


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig | GenerationConfig]:
    """Return the config with those of its parts, and the generation config."""
    configs: list[Any] = [model.config]
    for config in configs:
        configs += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return configs + [model.generation_config] * model.can_generate()


def _ids_in(config: PreTrainedConfig | GenerationConfig) -> Iterator[int]:
    def integers(value: Any) -> Iterator[int]:
        if isinstance(value, int):
            yield value
        elif isinstance(value, list | tuple):
            for item in value:
                yield from integers(item)

    for name, value in vars(config).items():
        if TOKEN_IDS.search(name):
            yield from integers(value)


def _renumber(value: Any, ids: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_renumber(item, ids) for item in value)
    return ids.get(value, value) if isinstance(value, int) else value


def _embeddings(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the input embeddings and, where they are not tied, the output embeddings with their bias."""
    modules = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    return list({id(table): table for module in modules for table in module.parameters()}.values())


@torch.no_grad()
def _prune_model(model: PreTrainedModel, kept: list[int], ids: Mapping[int, int]) -> None:
    """Keep the rows of these tokens, and give their new ids to the configs."""
    rows = model.get_input_embeddings().weight.shape[0]
    for table in _embeddings(model):
        table[: len(kept)] = table[kept]
    for buffer in model.buffers():  # BART adds a bias to the logits
        if buffer.shape[-1:] == (rows,):
            buffer[..., : len(kept)] = buffer[..., kept]
    for config in _configs(model):
        for name, value in list(vars(config).items()):
            if TOKEN_IDS.search(name):
                setattr(config, name, _renumber(value, ids))
            elif name == "vocab_size" and value == rows:
                config.vocab_size = len(kept)
    model.get_input_embeddings().padding_idx = None  # a former id
    model.resize_token_embeddings(len(kept))  # drops the last rows, wherever a family has them


def _compare_vocabulary(
    tokenizer: PreTrainedTokenizerBase, pruned: PreTrainedTokenizerBase, ids: Mapping[int, int]
) -> None:
    """Raise `ValueError` unless a pruned tokenizer is loaded with exactly the kept tokens and their new ids."""
    if pruned.get_vocab() != {token: ids[old] for token, old in tokenizer.get_vocab().items() if old in ids}:
        raise ValueError(f"{type(pruned).__name__} changes a vocabulary as it loads it, so it cannot be pruned.")


def _compare_corpus(
    tokenizer: PreTrainedTokenizerBase,
    pruned: PreTrainedTokenizerBase,
    ids: Mapping[int, int],
    corpus: Iterator[list[str]],
) -> str:
    """Raise `ValueError` unless each text has the same tokens, or without some of them the same text."""
    same = total = 0
    for texts in corpus:
        encoded = [tokenizers(texts, verbose=False)["input_ids"] for tokenizers in (tokenizer, pruned)]
        for text, before, after in zip(texts, *encoded, strict=True):
            total += 1
            if [ids.get(token) for token in before] == after:
                same += 1
            elif ids.keys() >= set(before) or pruned.decode(after) != tokenizer.decode(before):
                raise ValueError(f"The pruned tokenizer writes {text!r} in other tokens; nothing was written.")
    return f"{same:,} of {total:,}"


def _compare_dropped(
    tokenizer: PreTrainedTokenizerBase, pruned: PreTrainedTokenizerBase, ids: Mapping[int, int]
) -> str:
    """Raise `ValueError` unless the texts of dropped tokens are decoded as before."""
    dropped = sorted(set(tokenizer.get_vocab().values()) - ids.keys())
    texts = [tokenizer.decode([token]) for token in dropped[:: max(len(dropped) // DROPPED, 1)]]
    for text in texts:
        if pruned.decode(pruned(text)["input_ids"]) != tokenizer.decode(tokenizer(text)["input_ids"]):
            raise ValueError(f"The pruned tokenizer loses {text!r}; nothing was written.")
    return f"{len(texts):,} of {len(dropped):,} compared: no loss"
