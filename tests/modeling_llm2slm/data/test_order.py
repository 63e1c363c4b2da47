"""The order of training has every example once, depends on seed and epoch alone, and groups by length."""

from __future__ import annotations

import pytest
import torch

from modeling_llm2slm.data.order import EpochSampler, grouped_order, lengths, seeded


LENGTHS = torch.randint(1, 100, (1003,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given", [None, LENGTHS])
def test_each_example_comes_once_and_epochs_differ(given: torch.Tensor | None) -> None:
    sampler = EpochSampler(len(LENGTHS), 5, given, batch_size=8)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(LENGTHS)))
    assert orders[0] != orders[1] != orders[2]
    sampler.set_epoch(1)
    torch.manual_seed(99)
    assert list(sampler) == orders[1]  # whatever the global generator did
    assert list(EpochSampler(len(LENGTHS), 6, given, batch_size=8)) != orders[0]


def test_the_length_counts_prompt_and_target() -> None:
    """With long prompts and short targets, batches of similar targets alone would be mostly padding."""
    prompts, targets = LENGTHS * 5, torch.randint(5, 15, LENGTHS.shape, generator=seeded(2))
    features = {name: [[0] * int(n) for n in each] for name, each in (("input_ids", prompts), ("labels", targets))}
    assert lengths(features) == (prompts + targets).tolist()


def test_batches_have_similar_lengths_in_random_order() -> None:
    order = list(EpochSampler(len(LENGTHS), 0, LENGTHS, batch_size=8))
    batches = [LENGTHS[order[start : start + 8]] for start in range(0, 1000, 8)]
    longest = torch.stack([batch.max() for batch in batches]).float()
    padded = sum(int(batch.max()) * len(batch) for batch in batches) / int(sum(batch.sum() for batch in batches))
    shuffled = torch.randperm(1000, generator=seeded(1)).split(8)
    shuffled_only = sum(int(LENGTHS[b].max()) * 8 for b in shuffled) / int(LENGTHS[:1000].sum())
    assert padded < 1.05 < 1.5 < shuffled_only
    assert longest[0] == LENGTHS.max()
    later = longest[1:]
    correlation = torch.corrcoef(torch.stack([later, torch.arange(len(later)).float()]))[0, 1]
    assert abs(correlation) < 0.25  # 1 if batches were sorted


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9])
def test_few_examples_are_enough(rows: int) -> None:
    order = grouped_order(torch.randperm(rows), LENGTHS[:rows], 8, seeded(0))
    assert sorted(order.tolist()) == list(range(rows))


def test_generators_differ_by_each_number() -> None:
    seeds = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)]
    assert len({float(torch.rand(1, generator=seeded(*seed))) for seed in seeds}) == len(seeds)
