"""How many bytes each part of a GRPO step takes, from the shape of the model. docs/memory.md derives every formula.

All functions return bytes and take tokens as `sequences` × `length`, the padded batch of one forward pass. `e` is the
size of an element in the compute dtype: 2 under autocast or in half precision, 4 in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from memhead.planning import Chunk, plan_chunk
from recipes.plan.shapes import ModelShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 64  # weights that share a scale in bitsandbytes' NF4
OPTIMIZER_STATES = {  # bytes per trained element; the rest as AdamW, two states in the parameter's dtype
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_bnb_8bit": 2 * (1 + 4 / 256),
    "sgd": 0.0,
}
# Layer inputs that stay on the card where Unsloth moves them to host memory: the layer's own, and two on their way.
OFFLOADED_INPUTS = 3
TEMPORARIES = {"adamw_torch": 1}  # copies of the parameters during the step: without the fused kernel, one


@dataclass(frozen=True)
class Precision:
    """`weights`: bytes of a weight at rest; `e`: of a computed element; `adapter`: of a LoRA weight.

    `quantised`: "", "4bit", "4bit-double" (scales quantised too, as Unsloth's checkpoints are) or "8bit".
    `autocast`: the compute dtype comes from autocast, which keeps a copy of float32 weights for the pass.
    """

    weights: int
    e: int
    adapter: int = 4
    quantised: str = ""
    autocast: bool = False


def weight_bytes(shape: ModelShape, precision: Precision) -> int:
    """The model at rest. Quantisation takes the transformer layers' linears; embedding, head and norms stay."""
    kept = shape.other_parameters() * precision.weights
    linear = shape.linear_parameters()
    per_weight = {
        "": precision.weights,
        "8bit": 1.0,
        "4bit": 0.5 + 4 / BLOCK,
        "4bit-double": 0.5 + 1 / BLOCK + 4 / (BLOCK * 256),
    }[precision.quantised]
    return round(kept + linear * per_weight)


def optimizer_bytes(parameters: int, size: int, optim: str) -> tuple[int, int]:
    """(states that stay, temporaries of the step) for so many trained parameters of `size` bytes each."""
    per_element = OPTIMIZER_STATES.get(optim, 2 * size)
    return round(parameters * per_element), parameters * size * TEMPORARIES.get(optim, 0)


def kv_cache_bytes(shape: ModelShape, sequences: int, length: int, e: int) -> int:
    """Keys and values of every layer for every token of every sequence."""
    return 2 * shape.layers * shape.kv_width * e * sequences * length


def sampling_bytes(shape: ModelShape, sequences: int) -> int:
    """One row of float32 logits a sequence, and its softmax and sorted copy while a token is drawn."""
    return 3 * 4 * sequences * shape.vocab


def layer_bytes(
    shape: ModelShape, precision: Precision, sequences: int, length: int, *, r: int, padded: bool = True
) -> int:
    """What one transformer layer keeps for the backward pass. r: rank of LoRA on all linears, 0 without.

    padded: the batch has a padding mask, which makes scaled-dot-product attention repeat the keys for every query
    head and keep the mask. A single key head is repeated without a copy.
    """
    h, i, e, query = shape.hidden, shape.intermediate, precision.e, shape.attention_width
    keys = query if padded and shape.kv_heads > 1 else shape.kv_width
    norms = 2 * (4 * h + 4)  # the float32 input and one float32 a token
    attention = e * (2 * query + 2 * keys) + 4 * shape.heads  # q, output, k, v, log-sum-exp
    mask = e * length if padded else 0
    mlp = e * 3 * i  # gate, silu(gate), up
    if not r:
        inputs = e * (4 * h + i)  # each norm's output before and after its weight; the product
    else:
        # PEFT casts each adapted linear's input to the adapter's dtype: six of hidden width, one of the MLP's.
        cast = precision.adapter != precision.weights or precision.autocast
        inputs = (e if precision.autocast else precision.adapter) * (
            (5 * h + query + i) if cast else (2 * h + i)
        )
        inputs += (e if precision.autocast else precision.adapter) * 7 * r
    return sequences * length * (norms + attention + mask + mlp + inputs)


def ends_bytes(shape: ModelShape, precision: Precision, sequences: int, length: int, *, trained: bool) -> int:
    """What the embedding, the rotary tables and the last norm keep. trained: their weights get gradients.

    Frozen, the first norm's input needs no gradient and is not kept, which pays for the last norm's.
    """
    last = 4 * shape.hidden + 4 + precision.e * shape.hidden + 8 if trained else 0
    return sequences * length * last + 2 * precision.e * shape.head_dim * length


def activation_bytes(
    shape: ModelShape,
    precision: Precision,
    sequences: int,
    length: int,
    *,
    r: int,
    checkpointing: bool,
    offloaded: bool = False,
) -> int:
    """The transformer's activations at the height of forward and backward.

    With checkpointing: every layer's input (offloaded: three), and one layer's own while it is computed again. To
    either come the gradients that move through one layer: three of the MLP's width and two of the hidden width.
    """
    one = layer_bytes(shape, precision, sequences, length, r=r)
    ends = ends_bytes(shape, precision, sequences, length, trained=not r)
    moving = sequences * length * precision.e * (3 * shape.intermediate + 2 * shape.hidden)
    if not checkpointing:
        return shape.layers * one + ends + moving
    kept = min(shape.layers, OFFLOADED_INPUTS) if offloaded else shape.layers
    inputs = kept * sequences * length * precision.e * shape.hidden
    return inputs + one + ends + moving


def inference_bytes(shape: ModelShape, precision: Precision, sequences: int, length: int) -> int:
    """One layer's transients without a graph: residual, normed and float32 hidden, gate, up and product."""
    e = precision.e
    return sequences * length * (e * (3 * shape.hidden + 3 * shape.intermediate) + 4 * shape.hidden)


def full_logits_bytes(shape: ModelShape, rows: int, e: int) -> int:
    """Plain full logits: the product, its float32 copy scaled by the temperature, log-softmax and its gradient."""
    return rows * shape.vocab * ((e if e != 4 else 0) + 3 * 4)


def memhead_bytes(shape: ModelShape, rows: int, e: int, chunk: Chunk, *, trained: bool) -> int:
    """memhead: one tile's workspace and the gradient's direction (rows, hidden); trained: the float32 weight gradient's
    accumulator besides, one block of the vocabulary at a time."""
    direction = rows * shape.hidden * (4 if trained else e)
    return chunk.workspace_bytes(shape.hidden, 4, e) + direction


def head_chunk(shape: ModelShape, rows: int, e: int, device_type: str, chunk_rows: int | None) -> Chunk:
    """The tile that memhead takes; `chunk_rows` is head.chunk."""
    found = plan_chunk(rows, shape.vocab, device_type=device_type)
    return found if chunk_rows is None else Chunk(min(chunk_rows, rows), found.columns)
