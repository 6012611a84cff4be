"""Where tokens lie when every prompt is kept once: the layout of a packed batch, and the bins of a step.

    padded, as TRL hands it over        packed, one row per group
    . p1 p2 a1 a2 a3                    p1 p2 | a1 a2 | b1
    . p1 p2 b1 b2  .                    the last token of a completion predicts nothing, so it is not there

A completion's tokens see their prompt and their own completion; their positions continue from the prompt's end. The
prompt's last state scores the first token of each of its completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]
# Of a row whose attention costs what its products cost, over the hidden size: 6 by operations; measured on a CPU with
# completions of 6 to 256 tokens, 8 is as good as any.
_TOKENS_AS_ATTENTION = 8
_HALVINGS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # of a budget


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts padded on the left and completions on the right, as TRL's trainers keep them."""

    input_ids: Tensor  # (B, P + K)
    attention_mask: Tensor  # (B, P + K), 1 for a real token
    completion_width: int  # K

    @property
    def prompt_width(self) -> int:
        """P."""
        return self.input_ids.shape[1] - self.completion_width


class Lengths(NamedTuple):
    """What planning needs to know about a batch, on the host."""

    prompt: Tensor  # (B,) tokens of each prompt
    completion: Tensor  # (B,)
    group: Tensor  # (B,) rows with the same prompt have the same number, counted from 0


class VarlenKeys(NamedTuple):
    """A packed row as segments: every segment's queries, and the keys that it sees, prompt first."""

    keys: Tensor  # (T_k,) which tokens' keys and values, segment by segment
    query_ends: Tensor  # (S + 1,) int32, cumulative
    key_ends: Tensor  # (S + 1,) int32, cumulative
    longest_query: int
    longest_keys: int
    copies: Tensor  # (T_k,) where in `keys` each token stands, token by token: the inverse of `keys`
    copies_begin: Tensor  # (T,) int64, where those of a token begin


@dataclass(frozen=True)
class Packed:
    """A packed batch. Indices count slots of the (R, L) grid, or of the padded batch, row by row."""

    source: Tensor  # (R, L) the padded slot whose token lies here
    positions: Tensor  # (R, L)
    segments: Tensor  # (R, L) 0 a prompt, 1, 2, … its completions, -1 padding
    states: Tensor  # (M,) the slot whose hidden state scores a target
    targets: Tensor  # (M,) the padded slot of that target
    scores: Tensor  # (M,) its place in (B, K)
    tokens: int  # computed, padding of the grid not counted
    varlen: VarlenKeys | None  # for one long row
    groups: list[tuple[int, list[int]]]  # of that row: tokens here of each prompt and its completions

    def to(self, device: torch.device) -> Packed:
        """The same with its tensors on ``device``."""

        def tensors_of(values: dict[str, Any]) -> dict[str, Any]:
            return {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}

        varlen = self.varlen and self.varlen._replace(**tensors_of(self.varlen._asdict()))
        return replace(self, **tensors_of(vars(self)), varlen=varlen)


def measure(batch: PaddedBatch) -> Lengths:
    """Lengths and groups. Groups are found by the prompts' tokens, whatever order they come in."""
    mask = batch.attention_mask.cpu()
    prompts = (batch.input_ids.cpu() * mask)[:, : batch.prompt_width]
    lengths = mask[:, : batch.prompt_width].sum(1)
    found: dict[tuple[int, bytes], int] = {}
    keys = zip(lengths.tolist(), (row.tobytes() for row in prompts.numpy()), strict=True)
    group = [found.setdefault(key, len(found)) for key in keys]
    return Lengths(lengths, mask[:, batch.prompt_width :].sum(1), torch.tensor(group))


def in_short_rows(lengths: Lengths, rows: Sequence[int], hidden_size: int) -> Lengths:
    """``lengths`` with groups divided where one row of each would cost more than it saves, under a dense mask.

    A row of L tokens costs L in the layers' products and L² in attention, masked or not: with long completions, many
    times what the shared prompt saves. A prompt of P tokens is repeated wherever that is less in all.
    """
    prompt, completion, group = lengths.prompt.tolist(), lengths.completion.tolist(), lengths.group.clone()
    filled: dict[int, tuple[int, int]] = {}  # group -> its number now, completion tokens in its row
    unused = int(group.max()) + 1
    for row in rows:
        number, tokens = filled.get(own := int(lengths.group[row]), (own, 0))
        most = math.sqrt(prompt[row] * (prompt[row] + _TOKENS_AS_ATTENTION * hidden_size))
        more = completion[row] - 1
        if tokens and tokens + more > most:
            number, tokens, unused = unused, 0, unused + 1
        filled[own] = number, tokens + more
        group[row] = number
    return lengths._replace(group=group)


def pack(batch: PaddedBatch, lengths: Lengths, rows: Sequence[int], *, one_row: bool) -> Packed:
    """Lay out ``rows`` of a padded batch.

    In numpy, because torch spreads even such small arrays over all cores, and waits for each of them.

    Args:
        rows: the rows to compute, each with at least one completion token.
        one_row: all groups in one row, with :class:`VarlenKeys`; else one row per group, as long as the longest.
    """
    width, completion_width = batch.input_ids.shape[1], batch.completion_width
    row = np.asarray(rows, dtype=np.int64)
    _, first, group = np.unique(lengths.group.numpy()[row], return_index=True, return_inverse=True)
    groups = len(first)
    own, prompt = lengths.completion.numpy()[row], lengths.prompt.numpy()[row[first]]  # (N,), (G,)

    # Segments: each group's prompt, then its completions less their last tokens.
    unordered_group = np.concatenate([np.arange(groups), group])
    order = unordered_group.argsort(kind="stable")
    rank = np.empty_like(order)  # unordered -> ordered
    rank[order] = np.arange(len(order))
    segment_group = unordered_group[order]
    length = np.concatenate([prompt, own - 1])[order]
    begins = [row[first] * width + batch.prompt_width - prompt, row * width + batch.prompt_width]
    start = np.concatenate(begins)[order]
    first_position = np.concatenate([np.zeros_like(prompt), prompt[group]])[order]
    begin = length.cumsum() - length
    prompt_segment = rank[:groups]  # (G,)
    number = np.arange(len(order)) - prompt_segment[segment_group]
    if one_row:
        shape, slot = (1, int(length.sum())), begin
    else:
        group_length = np.bincount(segment_group, weights=length, minlength=groups)
        shape = (groups, int(group_length.max(initial=0)))
        slot = begin - begin[prompt_segment][segment_group] + segment_group * shape[1]

    segment, offset = _spread(length)  # (T,) the segment of each token, and its place in it
    here = slot[segment] + offset

    # Scores: a completion's first token by its prompt's last state, each other by the state before it.
    completion, place = _spread(own)  # (M,)
    last = slot[prompt_segment] + prompt - 1  # (G,)
    before = slot[rank[groups:]][completion] + place - 1
    states = np.where(place == 0, last[group][completion], before)
    scored_row = row[completion]
    return Packed(
        source=_grid(shape, 0, here, start[segment] + offset),
        positions=_grid(shape, 0, here, first_position[segment] + offset),
        segments=_grid(shape, -1, here, number[segment]),
        states=torch.from_numpy(states),
        targets=torch.from_numpy(scored_row * width + batch.prompt_width + place),
        scores=torch.from_numpy(scored_row * completion_width + place),
        tokens=len(here),
        varlen=_varlen(length, slot, number, segment_group, prompt, slot[prompt_segment])
        if one_row
        else None,
        groups=_of_groups(prompt, own - 1, group) if one_row else [],
    )


def even_bins(
    lengths: Lengths,
    slots: Sequence[Sequence[int]],
    budget: int,
    agree: Callable[[int], int] = int,
) -> list[range]:
    """As few bins as :func:`fill_bins` makes of the same, and as even: a short last one costs as many launches."""
    found, share = fill_bins(lengths, slots, budget, agree), 1.0
    for step in _HALVINGS if len(found) > 1 else ():
        # By shares, and by a number that is the same in all processes, whose budgets may not be.
        tried = fill_bins(lengths, slots, int((share - step) * budget), agree)
        if len(tried) == len(found):
            found, share = tried, share - step
    return found


def fill_bins(
    lengths: Lengths,
    slots: Sequence[Sequence[int]],
    budget: int,
    agree: Callable[[int], int] = int,
) -> list[range]:
    """Cut consecutive micro-batches into bins of at most ``budget`` packed tokens.

    Args:
        slots: rows to compute of each micro-batch, of which some may be empty, but not all.
        budget: a micro-batch that needs more is a bin of its own.
        agree: the smallest of the ends that all processes propose. Their bins then are the same, and fit each.

    Returns:
        The micro-batches of each bin. None is without rows in every process, and a cut falls between groups where it
        can.
    """
    prompt, completion, group = (x.tolist() for x in lengths)
    bins: list[range] = []
    begin = 0
    while begin < len(slots):
        tokens, seen = 0, set[int]()
        between_groups, end = begin, begin
        while end < len(slots):
            groups = {group[r] for r in slots[end]}
            if seen and not groups & {group[r] for r in slots[end - 1]}:
                between_groups = end
            more = sum(max(0, completion[r] - 1) for r in slots[end])
            more += sum({group[r]: prompt[r] for r in slots[end] if group[r] not in seen}.values())
            if seen and groups and tokens + more > budget:
                break
            tokens, seen, end = tokens + more, seen | groups, end + 1
        else:
            between_groups = end
        end = agree(between_groups if between_groups > begin else end)
        bins.append(range(begin, end))
        begin = end
    return bins


def _spread(lengths: Integers) -> tuple[Integers, Integers]:
    """For runs of these lengths, one after another: the run of every item, and its place in it."""
    run = np.arange(len(lengths)).repeat(lengths)
    return run, np.arange(len(run)) - (lengths.cumsum() - lengths)[run]


def _of_groups(prompt: Integers, completion: Integers, group: Integers) -> list[tuple[int, list[int]]]:
    """For prompts (G,) and completions (N,), each of a group (N,): the tokens of each prompt and of its completions."""
    in_order = completion[group.argsort(kind="stable")]
    own = np.split(in_order, np.bincount(group, minlength=len(prompt)).cumsum()[:-1])
    return [(int(p), lengths.tolist()) for p, lengths in zip(prompt, own, strict=True)]


def _grid(shape: tuple[int, int], empty: int, slots: Integers, values: Integers) -> Tensor:
    grid = np.full(shape[0] * shape[1], empty, dtype=np.int64)
    grid[slots] = values
    return torch.from_numpy(grid.reshape(shape))


def _varlen(
    length: Integers,  # (S,) tokens of each segment
    slot: Integers,  # (S,) where it begins
    number: Integers,  # (S,) 0 for a prompt
    group: Integers,  # (S,)
    prompt: Integers,  # (G,) tokens of each prompt
    prompt_slot: Integers,  # (G,) where it begins
) -> VarlenKeys:
    some = length > 0  # a completion of one token has no queries: its prompt scores it
    length, slot, number, group = length[some], slot[some], number[some], group[some]
    shared = np.where(number > 0, prompt[group], 0)
    count = shared + length
    segment, offset = _spread(count)
    of_prompt = prompt_slot[group][segment] + offset
    of_itself = slot[segment] + offset - shared[segment]
    keys = np.where(offset < shared[segment], of_prompt, of_itself)
    times = np.bincount(keys)  # every token is a key of its own segment
    return VarlenKeys(
        keys=torch.from_numpy(keys),
        query_ends=_ends(length),
        key_ends=_ends(count),
        longest_query=int(length.max()),
        longest_keys=int(count.max()),
        copies=torch.from_numpy(keys.argsort(kind="stable")),
        copies_begin=torch.from_numpy(times.cumsum() - times),
    )


def _ends(lengths: Integers) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
