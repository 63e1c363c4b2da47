"""Batches: their order and size, equal prompts, and reading ahead."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_llm2slm.inference import batching
from modeling_llm2slm.inference.batching import BatchLimits, PromptTable, one_ahead
from modeling_llm2slm.inference.files import generate_file
from modeling_llm2slm.inference.text_to_text import TextToText
from modeling_llm2slm.settings import GenerateFileSettings
from tests.support.checkpoints import KINDS, PROMPTS
from tests.support.common import count_calls

from .conftest import MAX_NEW_TOKENS, REPEATED, record


OPTIONS = {"max_new_tokens": MAX_NEW_TOKENS}


class TestBatches:
    def test_rows_tokens_and_padding_limit_a_batch(self) -> None:
        lengths = [9, 9, 5, 4, 4, 1, 1, 1, 1, 1]
        cut = [list(batch) for batch in BatchLimits(4, 18).cut(lengths, lambda length: length)]
        assert cut == [[9, 9], [5, 4, 4], [1, 1, 1, 1], [1]]
        assert all(batch[0] * len(batch) <= 18 for batch in cut)
        assert [list(batch) for batch in BatchLimits(4, 3).cut([9, 2], lambda length: length)] == [[9], [2]]
        assert [len(batch) for batch in BatchLimits(4).cut(lengths, lambda length: length)] == [4, 4, 2]

    def test_resumed_runs_and_shares_keep_the_batches_of_a_whole_run(self) -> None:
        table = PromptTable(sampled=True)
        table.add(["a", "b", "a", "c", "d", "e", "a"], lambda new: [3, 5, 2, 2, 9][: len(new)])
        whole = table.batches(BatchLimits(2, 10))
        assert whole == [[(4, 0)], [(1, 0), (0, 0), (0, 1), (0, 2)], [(2, 0), (3, 0)]]
        known = {table.key(output) for batch in whole[:1] for output in batch}
        assert table.batches(BatchLimits(2, 10), known) == whole[1:]
        shares = [table.batches(BatchLimits(2, 10), (), rank, 2) for rank in (0, 1)]
        assert shares == [whole[0::2], whole[1::2]]

    @pytest.mark.parametrize("kind", KINDS)
    def test_equal_prompts_are_generated_for_once(
        self, models: dict[str, TextToText], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = [models[kind].generate([prompt], **OPTIONS)[0] for prompt in REPEATED]
        with record(monkeypatch) as seen:
            assert models[kind].generate(REPEATED, 3, **OPTIONS) == expected
        assert seen["written"] == [3, 3, 2]

    def test_equal_prompts_are_read_once_and_sampled_separately(
        self, models: dict[str, TextToText], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = models["llm2slm"]
        torch.manual_seed(0)
        with record(monkeypatch) as seen, count_calls(model.model.encoder.llm) as calls:
            outputs = model.generate([PROMPTS[0]] * 20, 8, do_sample=True, temperature=3.0, **OPTIONS)
        assert len(set(outputs)) > 10
        assert len(calls) == 1
        assert [shape[0] for shape in seen["read"]] == [1]
        assert seen["written"] == [8, 8, 4]

    def test_a_sampled_batch_gives_each_prompt_its_own_output(self, models: dict[str, TextToText]) -> None:
        prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[4], PROMPTS[0]]
        for kind in KINDS:
            greedy = models[kind].generate(prompts, 3, **OPTIONS)
            assert models[kind].generate(prompts, 3, do_sample=True, top_k=1, **OPTIONS) == greedy


class TestReadingAhead:
    @pytest.mark.parametrize("kind", KINDS)
    def test_reading_ahead_changes_no_output(
        self, models: dict[str, TextToText], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, results = models[kind], []
        for overlap in (False, True):
            with record(monkeypatch) as seen:
                results.append(self.outputs(model, overlap, do_sample=True, temperature=2.0, seed=3))
            assert seen["main_thread"] == [not overlap] * 4
        assert results[0] == results[1]

    @staticmethod
    def outputs(model: TextToText, overlap: bool, seed: int, **options: Any) -> dict[Any, list[int]]:
        features, limits = model.features(REPEATED), BatchLimits(2)
        table = PromptTable(sampled=True)
        table.add(REPEATED, lambda new: [len(features["input_ids"][row]) for row in new])

        def features_of(rows: list[int]) -> dict[str, list[list[int]]]:
            return {name: [values[row] for row in rows] for name, values in features.items()}

        outputs: dict[Any, list[int]] = {}
        batches = table.batches(limits)
        for ids, tokens in model.generate_batches(
            table, batches, features_of, limits, overlap=overlap, seed=seed, **OPTIONS, **options
        ):
            outputs.update(zip(ids, tokens, strict=True))
        return outputs

    def test_one_batch_is_read_ahead_and_no_more(self) -> None:
        begun: list[int] = []
        for item in one_ahead(lambda item: begun.append(item) or item, range(6), overlap=True):
            time.sleep(0.01)
            assert begun == list(range(min(item + 2, 6)))

    def test_an_error_while_reading_reaches_the_caller(self) -> None:
        with pytest.raises(ZeroDivisionError):
            list(one_ahead(lambda item: 1 // item, [2, 1, 0, 1], overlap=True))

    def test_batches_are_read_ahead_if_a_core_is_free(
        self, composite: str, prompts: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = prompts.with_name("outputs.txt")
        for cores, main_thread in ((1, [True] * 4), (torch.get_num_threads() + 1, [False] * 4)):
            monkeypatch.setattr(batching, "_cores", lambda cores=cores: cores)
            with record(monkeypatch) as seen:
                generate_file(
                    composite, prompts, output, GenerateFileSettings(batch_size=2, overwrite=True, **OPTIONS)
                )
            assert seen["main_thread"] == main_thread
            assert output.read_text().splitlines() == alone
