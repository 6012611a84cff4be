"""How large a tile of logits to hold at a time, and what memory that costs.

The head is computed in tiles of ``rows`` tokens by ``columns`` vocabulary entries. Nothing else in
memhead decides a size, so this file is the whole answer to "where does the memory go?".
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MIB = 1 << 20

# A CPU tile should stay in the last-level cache between the product that writes it and the one
# that reads it; a GPU tile must fill every multiprocessor for several waves.
# benchmarks/results/ holds the measurements that these defaults come from.
DEFAULT_TILE = {"cpu": (2048, 1024), "cuda": (8192, 8192)}


class Chunk(NamedTuple):
    """A tile of logits: ``rows`` tokens by ``columns`` vocabulary entries."""

    rows: int
    columns: int

    def workspace_bytes(self, hidden_size: int, itemsize: int, accumulator_itemsize: int = 4) -> int:
        """Bytes held while one tile is worked on, beside inputs and outputs.

        ``itemsize`` is that of the operands of the matrix products (2 for bf16): the tile in
        float32, its exponentials in the operands' dtype, and the float32 accumulator of the
        gradient direction (rows, hidden_size).
        """
        tile = self.rows * self.columns * (accumulator_itemsize + itemsize)
        return tile + self.rows * hidden_size * accumulator_itemsize


def plan_chunk(
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    *,
    device_type: str = "cpu",
    itemsize: int = 4,
    budget_bytes: int | None = None,
) -> Chunk:
    """Choose the tile for ``num_rows`` tokens of a (vocab_size, hidden_size) head.

    Args:
        device_type: ``torch.device.type``; anything but "cpu" is planned like "cuda".
        itemsize: bytes of one element of the matrix products' operands.
        budget_bytes: upper bound for :meth:`Chunk.workspace_bytes`; ``None`` keeps the default
            tile of the device, which is under 128 MiB on a CPU and under 512 MiB on a GPU for
            every model we know.

    Raises:
        ValueError: the budget cannot hold a tile of one row by one column.
    """
    rows, columns = DEFAULT_TILE["cpu" if device_type == "cpu" else "cuda"]
    chunk = Chunk(max(1, min(rows, num_rows)), max(1, min(columns, vocab_size)))
    if budget_bytes is None:
        return chunk
    while chunk.workspace_bytes(hidden_size, itemsize) > budget_bytes:
        if chunk.rows == 1 and chunk.columns == 1:
            needed = chunk.workspace_bytes(hidden_size, itemsize)
            raise ValueError(
                f"budget_bytes={budget_bytes} is too small to hold one row of hidden size "
                f"{hidden_size}: at least {needed} bytes are needed"
            )
        # Rows cost the accumulator as well as the tile, so they are halved first.
        if chunk.rows >= chunk.columns or chunk.columns == 1:
            chunk = Chunk(max(1, chunk.rows // 2), chunk.columns)
        else:
            chunk = Chunk(chunk.rows, max(1, chunk.columns // 2))
    return chunk


def plan_rows(num_rows: int, vocab_size: int, *, device_type: str = "cpu", itemsize: int = 4) -> int:
    """Rows per chunk when a transform needs whole rows of logits (:func:`memhead.chunked_linear`).

    Such a chunk holds rows x vocab_size logits, their gradient and whatever the transform's own
    graph keeps: 16 MiB of logits on a CPU (they are read again soon), 128 MiB on a GPU.
    """
    budget = 16 * MIB if device_type == "cpu" else 128 * MIB
    return max(1, min(num_rows, budget // (vocab_size * itemsize)))


def resolve_chunk(
    chunk: int | tuple[int, int] | None,
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    device: torch.device,
    itemsize: int,
) -> Chunk:
    """The tile that a public function's ``chunk`` argument asks for; ``None`` plans one."""
    planned = plan_chunk(num_rows, vocab_size, hidden_size, device_type=device.type, itemsize=itemsize)
    if chunk is None:
        return planned
    rows, columns = (chunk, planned.columns) if isinstance(chunk, int) else chunk
    return Chunk(max(1, min(rows, num_rows)), max(1, min(columns, vocab_size)))
