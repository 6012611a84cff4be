"""Where tokens lie when every prompt is kept once: the layout of a packed batch, and the bins of a step.

    padded, as TRL hands it over        packed, one row per group
    . p1 p2 a1 a2 a3                    p1 p2 | a1 a2 | b1
    . p1 p2 b1 b2  .                    the last token of a completion predicts nothing, so it is not there

A completion's tokens see their prompt and their own completion; their positions continue from the prompt's end. The
prompt's last state scores the first token of each of its completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def pack(batch: PaddedBatch, lengths: Lengths, rows: Sequence[int], *, one_row: bool) -> Packed:
    """Lay out ``rows`` of a padded batch.

    Args:
        rows: the rows to compute, each with at least one completion token.
        one_row: all groups in one row, with :class:`VarlenKeys`; else one row per group, as long as the longest.
    """
    width, completion_width = batch.input_ids.shape[1], batch.completion_width
    row = torch.as_tensor(rows, dtype=torch.long)
    groups, first, group = _groups(lengths.group[row])
    own, prompt = lengths.completion[row], lengths.prompt[row[first]]  # (N,), (G,)

    # Segments: each group's prompt, then its completions less their last tokens.
    order = torch.cat([torch.arange(groups), group]).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))  # unordered -> ordered
    segment_group = torch.cat([torch.arange(groups), group])[order]
    length = torch.cat([prompt, own - 1])[order]
    start = torch.cat([row[first] * width + batch.prompt_width - prompt, row * width + batch.prompt_width])[
        order
    ]
    first_position = torch.cat([torch.zeros_like(prompt), prompt[group]])[order]
    begin = length.cumsum(0) - length
    prompt_segment = rank[:groups]  # (G,)
    number = torch.arange(len(order)) - prompt_segment[segment_group]
    if one_row:
        shape, slot = (1, int(length.sum())), begin
    else:
        group_length = torch.zeros(groups, dtype=torch.long).index_add_(0, segment_group, length)
        shape = (groups, int(group_length.max()) if groups else 0)
        slot = begin - begin[prompt_segment][segment_group] + segment_group * shape[1]

    segment, offset = _spread(length)  # (T,) the segment of each token, and its place in it
    here = slot[segment] + offset
    positions = _grid(shape, 0, here, first_position[segment] + offset)

    # Scores: a completion's first token by its prompt's last state, each other by the state before it.
    completion, place = _spread(own)  # (M,)
    last = slot[prompt_segment] + prompt - 1  # (G,)
    before = slot[rank[groups:]][completion] + place - 1
    states = torch.where(place == 0, last[group][completion], before)
    scored_row = row[completion]
    return Packed(
        source=_grid(shape, 0, here, start[segment] + offset),
        positions=positions,
        segments=_grid(shape, -1, here, number[segment]),
        states=states,
        targets=scored_row * width + batch.prompt_width + place,
        scores=scored_row * completion_width + place,
        tokens=len(here),
        varlen=_varlen(length, slot, number, segment_group, prompt, slot[prompt_segment])
        if one_row
        else None,
    )


def plan_bins(lengths: Lengths, slots: Sequence[Sequence[int]], budget: int) -> list[range]:
    """Cut consecutive micro-batches into bins of at most ``budget`` packed tokens.

    Args:
        slots: rows to compute of each micro-batch, of which some may be empty, but not all.
        budget: a micro-batch that needs more is a bin of its own.

    Returns:
        The micro-batches of each bin. None is without rows, and a cut falls between groups where it can.
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
        end = between_groups if between_groups > begin else end
        bins.append(range(begin, end))
        begin = end
    return bins


def _groups(group: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many groups, the first row of each, and each row's group counted from 0."""
    names, dense = group.unique(return_inverse=True)
    first = torch.full((len(names),), len(group)).scatter_reduce_(
        0, dense, torch.arange(len(group)), reduce="amin"
    )
    return len(names), first, dense


def _spread(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For runs of these lengths, one after another: the run of every item, and its place in it."""
    run = torch.arange(len(lengths)).repeat_interleave(lengths)
    return run, torch.arange(len(run)) - (lengths.cumsum(0) - lengths)[run]


def _grid(shape: tuple[int, int], empty: int, slots: Tensor, values: Tensor) -> Tensor:
    grid = torch.full((shape[0] * shape[1],), empty, dtype=torch.long)
    grid[slots] = values
    return grid.view(shape)


def _varlen(
    length: Tensor,  # (S,) tokens of each segment
    slot: Tensor,  # (S,) where it begins
    number: Tensor,  # (S,) 0 for a prompt
    group: Tensor,  # (S,)
    prompt: Tensor,  # (G,) tokens of each prompt
    prompt_slot: Tensor,  # (G,) where it begins
) -> VarlenKeys:
    some = length > 0  # a completion of one token has no queries: its prompt scores it
    length, slot, number, group = length[some], slot[some], number[some], group[some]
    shared = torch.where(number > 0, prompt[group], 0)
    count = shared + length
    segment, offset = _spread(count)
    of_prompt = prompt_slot[group][segment] + offset
    of_itself = slot[segment] + offset - shared[segment]
    keys = torch.where(offset < shared[segment], of_prompt, of_itself)
    times = keys.bincount()  # every token is a key of its own segment
    return VarlenKeys(
        keys=keys,
        query_ends=_ends(length),
        key_ends=_ends(count),
        longest_query=int(length.max()),
        longest_keys=int(count.max()),
        copies=keys.argsort(stable=True),
        copies_begin=times.cumsum(0) - times,
    )


def _ends(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
