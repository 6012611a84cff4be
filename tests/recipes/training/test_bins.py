"""How micro-batches are joined into bins: against every way to cut a few of them, and in two processes at once."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from rollouts import rollout

from recipes.training.packing import Lengths, PaddedBatch, even_bins, fill_bins, in_short_rows, measure
from recipes.training.rollout import Bin, Rollout, padded


def window(seed: int, count: int = 7) -> tuple[Lengths, list[list[int]], list[int]]:
    """Micro-batches of one group of three completions; also the tokens of each."""
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(5, 60, (count,), generator=draw).repeat_interleave(3)
    completion = torch.randint(1, 40, (3 * count,), generator=draw)
    rows = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(count)]
    tokens = [int(prompt[r[0]] + (completion[r] - 1).sum()) for r in rows]
    return Lengths(prompt, completion, torch.arange(count).repeat_interleave(3)), rows, tokens


def largest(bins: list[range], tokens: list[int]) -> int:
    return max(sum(tokens[i] for i in bin_) for bin_ in bins)


def ways(count: int, number: int) -> list[list[range]]:
    """Every cut of `count` micro-batches into `number` bins."""
    return [
        [range(a, b) for a, b in itertools.pairwise((0, *cuts, count))]
        for cuts in itertools.combinations(range(1, count), number - 1)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_as_few_bins_as_the_budget_allows_and_as_even(seed):
    lengths, rows, tokens = window(seed)
    budget = max(max(tokens), sum(tokens) // (2 + seed % 3))
    full, even = fill_bins(lengths, rows, budget), even_bins(lengths, rows, budget)
    fewest = next(n for n in itertools.count(1) if any(largest(w, tokens) <= budget for w in ways(7, n)))
    assert len(full) == len(even) == fewest
    assert [i for bin_ in even for i in bin_] == list(range(7))
    best = min(largest(way, tokens) for way in ways(7, fewest))
    assert best <= largest(even, tokens) <= best + budget / 16
    assert largest(even, tokens) <= largest(full, tokens) <= budget


def test_a_short_last_bin_is_filled_up():
    lengths = Lengths(torch.full((4,), 10), torch.full((4,), 11), torch.arange(4))
    rows = [[0], [1], [2], [3]]  # of 20 tokens each
    assert fill_bins(lengths, rows, 60) == [range(3), range(3, 4)]
    assert even_bins(lengths, rows, 60) == [range(2), range(2, 4)]
    assert even_bins(lengths, rows, 5) == fill_bins(lengths, rows, 5) == [range(i, i + 1) for i in range(4)]


@pytest.mark.parametrize(("completion", "in_a_row"), [(6, 8), (64, 4), (256, 1), (2048, 1)])
def test_rows_under_a_dense_mask_are_as_long_as_pays(completion, in_a_row):
    """By its cost for each number of completions in a row: of 8 in a group, after a prompt of 64, at a width of 128."""
    lengths = Lengths(torch.full((8,), 64), torch.full((8,), completion), torch.zeros(8, dtype=torch.long))
    found = in_short_rows(lengths, range(8), 128).group.bincount().tolist()

    def cost(number: int) -> float:
        length = 64 + number * (completion - 1)
        return 8 / number * (length + length**2 / (8 * 128))

    assert max(found) == in_a_row
    assert sum(found) == 8
    assert cost(in_a_row) <= 1.1 * min(map(cost, (1, 2, 4, 8)))


@pytest.mark.parametrize(
    ("completions", "rows"),
    [
        ([7, 7, 7, 7], [0, 0, 1, 1]),  # a row is best with √(4 · (4 + 8 · 4)) = 12 tokens behind its prompt
        ([7, 8, 6, 1], [0, 1, 1, 1]),  # the prompt's last state scores each one's first token: 7 + 5
        ([1, 1, 99, 2], [0, 0, 0, 1]),  # completions of one token cost nothing: no row of their own
    ],
)
def test_rows_are_divided_at_the_token(completions, rows):
    """Groups by turns, the second of which has no room to spare either; and the lengths that were given stay."""
    twice = torch.tensor(completions).repeat_interleave(2)
    given = Lengths(torch.full_like(twice, 4), twice, torch.tensor([0, 1] * len(completions)))
    found = in_short_rows(given, range(len(twice)), 4).group
    wanted = [(row, group) for row in rows for group in (0, 1)]
    pairs = set(zip(found.tolist(), wanted, strict=True))
    assert (
        len(pairs) == len(set(found.tolist())) == len(set(wanted))
    )  # the same division, whatever its numbers
    assert given.group.tolist() == [0, 1] * len(completions)


def test_a_group_is_of_the_same_prompt_padding_aside():
    """Whatever numbers stand in the padding; and a prompt may begin with the token that pads."""
    ids = torch.tensor([[0, 0, 5, 7], [0, 0, 5, 8], [3, 9, 5, 7], [0, 0, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1]])
    found = measure(PaddedBatch(ids, mask, completion_width=1))
    assert found.group.tolist() == [0, 1, 0, 2]
    assert (found.prompt.tolist(), found.completion.tolist()) == ([1, 2, 1, 1], [1, 1, 0, 1])


@pytest.mark.parametrize("count", [1, 2])
def test_where_nothing_has_an_advantage_the_shortest_completion_is_computed(count):
    fed = rollout("shared", "all")
    fed["completion_mask"][0] = 0  # which leaves nothing of it
    torch.manual_seed(0)
    made = Rollout.shuffled(fed, count, True, 10_000)
    for index in range(count):
        (bin_,) = made.cut(range(index, index + 1))
        rows = slice(bin_.start * made.size, bin_.stop * made.size)
        assert made.lengths.completion[rows][made.live[rows]].tolist() == [1]


def test_a_run_of_micro_batches_is_agreed_on_once():
    """Asked again it is the same cut: a process that asked the others once more would wait for them in vain."""
    asked = []

    def agree(end):
        asked.append(end)
        return end

    made = Rollout.shuffled(rollout("shared", "all"), 4, True, 1, agree)
    bins = made.cut(range(4))
    agreements = len(asked)
    assert agreements > 0
    assert made.cut(range(4)) == bins
    assert len(asked) == agreements


def test_what_a_bin_counts_for_the_log():
    """A prompt as often as it has completions; rows without a token, and those left out."""
    fed = rollout("shared", "some")
    fed["completion_mask"][15] = 0
    made = Rollout.shuffled(fed, 2, True, 10_000)
    (bin_,) = made.cut(range(2))
    rows = fed["prompt_mask"].sum(1) + fed["completion_mask"].sum(1)
    assert Bin(made, bin_).counts() == {"real": int(rows.sum()), "rows": 16, "left_out": 4}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_untold_a_bin_holds_what_a_padded_micro_batch_has_slots(count):
    fed = rollout("shared", "none")  # 16 rows
    slots = 16 // count * padded(fed).input_ids.shape[1]
    assert Rollout.shuffled(fed, count, False, None).budget == slots
    assert Rollout.shuffled(fed, count, False, 7).budget == 7


@pytest.mark.parametrize("seed", range(5))
def test_two_processes_cut_alike(seed):
    """Each has its own lengths and its own budget; the smaller of two ends holds."""
    windows = [window(2 * seed + rank) for rank in range(2)]
    proposed, meet = [0, 0], threading.Barrier(2, timeout=20)

    def agree(rank: int, end: int) -> int:
        proposed[rank] = end
        meet.wait()
        found = min(proposed)
        meet.wait()
        return found

    def cut(rank: int) -> list[range]:
        lengths, rows, tokens = windows[rank]
        return even_bins(lengths, rows, max(max(tokens), sum(tokens) // (2 + rank)), partial(agree, rank))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(cut, range(2))
    assert first == second
    assert [i for bin_ in first for i in bin_] == list(range(7))
    for rank, (_, _, tokens) in enumerate(windows):
        assert largest(first, tokens) <= max(max(tokens), sum(tokens) // (2 + rank))
