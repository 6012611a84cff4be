"""How large a tile of logits to hold at a time, and what memory that costs.

The head is computed in tiles of ``rows`` tokens by ``columns`` vocabulary entries. Nothing else in
memhead decides a size, so this file is the whole answer to "where does the memory go?".
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MIB = 1 << 20

# (rows, bytes) of a tile. On a CPU it should stay in the last-level cache between the product that
# writes it and the one that reads it; on a GPU it must fill every multiprocessor for several waves,
# and cost few launches. benchmarks/results/ holds the measurements that these come from.
DEFAULT_TILE = {"cpu": (1024, 4 * MIB), "cuda": (2048, 160 * MIB)}

# Bytes of a chunk of whole rows of logits, and the fewest rows where the weight's gradient is wanted.
# Four such chunks exist at a time in cross entropy. Measured in benchmarks/results/planning.md.
WHOLE_ROWS = {"cpu": 16 * MIB, "cuda": 128 * MIB}
TRAINED_ROWS = 128

# (rows, bytes) of a block of rows whose exponentials are kept over the whole vocabulary
# (memhead.sweep.HeadGradients). Every block reads and writes the weight's gradient once, so few rows
# are slow. On a GPU it gains little for its memory, so it is not done there. Both were measured:
# benchmarks/results/planning.md.
KEPT_BLOCK = {"cpu": (512, 256 * MIB)}

# Multiply-adds of one product over the rows that are launched before a GPU is asked how many rows a
# mask keeps (memhead.masking): enough to keep it busy until the next launches arrive. If the mask keeps
# fewer rows, the rest is wasted.
UNASKED = {"cuda": 4e11}

# (rows, columns) of a tile that is not halved any more.
FEWEST = 32, 128


class Chunk(NamedTuple):
    """A tile of logits: ``rows`` tokens by ``columns`` vocabulary entries."""

    rows: int
    columns: int

    def workspace_bytes(self, hidden_size: int, tile_itemsize: int, operand_itemsize: int) -> int:
        """Bytes held while one tile is worked on, beside inputs and outputs.

        The tile, the float32 accumulator (rows, hidden_size) of the gradient's direction, and the
        weight rows of a block's targets (rows, hidden_size) in the operands' dtype.
        """
        accumulators = self.rows * hidden_size * (4 + operand_itemsize)
        return self.rows * self.columns * tile_itemsize + accumulators

    def within(self, num_rows: int, vocab_size: int) -> Chunk:
        """This tile, cut to what there is to compute."""
        return Chunk(max(1, min(self.rows, num_rows)), max(1, min(self.columns, vocab_size)))

    def taller(self, num_rows: int) -> Chunk:
        """A tile of the same size with up to four times the rows.

        A weight gradient is a sum over rows: the fewer blocks of rows, the less often it is read
        and written.
        """
        rows = min(num_rows, 4 * self.rows)
        return self if rows <= self.rows else Chunk(rows, max(1, self.rows * self.columns // rows))

    def halved(self) -> Chunk | None:
        """The tile to try where memory failed for this one, None if there is no sensible one.

        Rows first: a row's bits do not depend on how many are worked on with it (from :data:`FEWEST` on).
        """
        rows, columns = FEWEST
        if self.rows > rows:
            return Chunk(max(rows, self.rows // 2), self.columns)
        if self.columns >= 2 * columns:
            return Chunk(self.rows, self.columns // 2 // columns * columns)
        return None


def default_tile(device_type: str, tile_itemsize: int) -> Chunk:
    """The tile for ``device_type``, where a logit takes ``tile_itemsize`` bytes.

    What is worked on beside inputs and outputs (:meth:`Chunk.workspace_bytes`) is under 128 MiB on a CPU and
    under 256 MiB on a GPU for every model we know.

    Its columns do not depend on the number of rows, so that neither do the bits of a row (which on
    some GPUs they do not anyway: :func:`resolve_chunk`).
    """
    rows, size = DEFAULT_TILE["cpu" if device_type == "cpu" else "cuda"]
    return Chunk(rows, size // (rows * tile_itemsize))


def plan_rows(
    num_rows: int, vocab_size: int, *, device_type: str = "cpu", itemsize: int = 4, trained: bool = False
) -> int:
    """Rows per chunk when a transform needs whole rows of logits (:func:`memhead.chunked_linear`).

    Such a chunk holds rows x vocab_size logits, their gradient and whatever the transform's own
    graph keeps: 16 MiB of logits on a CPU (they are read again soon), 128 MiB on a GPU. The gradient
    of a ``trained`` weight is read and written for every chunk, so there a chunk never has fewer than
    128 rows; from a hidden size of 512 upwards that takes less than the second copy of the gradient
    in the backward pass, so the peak does not rise.
    """
    budget = WHOLE_ROWS["cpu" if device_type == "cpu" else "cuda"]
    rows = max(budget // (vocab_size * itemsize), TRAINED_ROWS if trained else 1)
    return max(1, min(num_rows, rows))


def plan_kept_rows(vocab_size: int, *, device_type: str, itemsize: int) -> int | None:
    """Rows per block of a trainable head's summed loss (:mod:`memhead.summed_op`); None: use no such blocks.

    Such a block holds rows x vocab_size exponentials of ``itemsize`` bytes, the size of a product's operands.
    """
    if device_type not in KEPT_BLOCK:
        return None
    rows, budget = KEPT_BLOCK[device_type]
    return max(1, min(rows, budget // (vocab_size * itemsize)))


def unasked_rows(vocab_size: int, hidden_size: int, *, device_type: str) -> int | None:
    """Rows that are computed before it is known how many a mask keeps; None: asking costs nothing."""
    if device_type not in UNASKED:
        return None
    return max(128, int(UNASKED[device_type] / (vocab_size * hidden_size)) // 128 * 128)


def resolve_chunk(
    chunk: int | tuple[int, int] | None,
    num_rows: int,
    vocab_size: int,
    device: torch.device,
    tile_itemsize: int,
    *,
    widen: bool,
) -> Chunk:
    """The tile that a public function's ``chunk`` argument asks for; ``None`` takes the default.

    Args:
        num_rows: rows to score, of a vocabulary of ``vocab_size``.
        device: anything but a CPU is planned like CUDA.
        tile_itemsize: bytes of a logit in the tile: 4, or 2 where a kernel never writes logits
            (:func:`memhead.backends.triton.tile_dtype`).
        widen: where there are fewer rows than the default's, the tile may have as many more columns.
    """
    rows, columns = default_tile(device.type, tile_itemsize)
    if isinstance(chunk, int):
        rows = chunk
    elif chunk is not None:
        rows, columns = chunk
    elif widen and 0 < num_rows < rows:
        columns = rows * columns // num_rows
    return Chunk(rows, columns).within(num_rows, vocab_size)
