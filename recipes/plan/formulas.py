"""How many bytes each part of a GRPO step takes, from the shape of the model. docs/memory.md derives every formula.

All functions return bytes. `e` is the size of an element in the compute dtype: 2 under autocast or in half precision, 4
in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from memhead.planning import Chunk, resolve_chunk
from recipes.plan.shapes import LayerShape, ModelShape, Trained

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 64  # weights that share a scale in bitsandbytes' NF4
OPTIMIZER_STATES = {  # bytes per trained element; the rest as AdamW, two states in the parameter's dtype
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_bnb_8bit": 2 * (1 + 4 / 256),
    "sgd": 0.0,
}
# Layer inputs that stay on the card where Unsloth moves them to host memory: the current layer's, and two in transit.
OFFLOADED_INPUTS = 3
ENGINE = 128 * 2**20  # of Unsloth's vLLM while it sleeps, whatever the model
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


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass, in numbers.

    scored: tokens whose log-probability the head computes. keys: those that attention reads, each copy counted.
    repeated: keys and values are copied for every query head, as scaled-dot-product attention does under a mask.
    mask: its elements, in every layer. angles: positions that the rotary tables hold.
    """

    tokens: int
    scored: int
    keys: int
    repeated: bool
    mask: int
    angles: int

    @classmethod
    def padded(cls, sequences: int, prompt: int, completion: int, *, mask: bool = True) -> Batch:
        """TRL's batch: sequences of one length. mask: some of the tokens are padding."""
        length = prompt + completion
        tokens = sequences * length
        elements = tokens * length if mask else 0
        return cls(tokens, sequences * completion, tokens, repeated=mask, mask=elements, angles=length)


@dataclass(frozen=True)
class Group:
    """A prompt and its completions as the packed step lays them out: [prompt | c1 | … | cG], in tokens.

    The prompt's last state scores a completion's first token; a completion's last token scores none and is left out.
    """

    prompt: int
    completion: int
    generations: int

    @property
    def tokens(self) -> int:
        """The length of the row."""
        return self.prompt + self.generations * (self.completion - 1)

    def varlen(self, tokens: int) -> Batch:
        """`tokens` tokens of such groups in one row: the prompt's keys are gathered before each completion's own."""
        keys = self.prompt + self.generations * (self.prompt + self.completion - 1)
        return Batch(
            tokens, self._scored(tokens), self._share(keys, tokens), repeated=False, mask=0, angles=tokens
        )

    def dense(self, tokens: int) -> Batch:
        """The same with one group a row, and a mask over each row's tokens."""
        length = min(self.tokens, tokens)
        grid = tokens // length * length
        return Batch(grid, self._scored(grid), grid, repeated=True, mask=grid * length, angles=grid)

    def most(self, tokens: int, *, varlen: bool) -> Batch:
        """The most that a bin of `tokens` tokens takes if no completion is longer: short completions have more keys per
        token, long ones more rows in the head and a wider mask."""
        shortest = Group(self.prompt, 1, self.generations)
        scored = max(self._scored(tokens), shortest._scored(tokens))
        if varlen:
            return replace(shortest.varlen(tokens), scored=scored)
        return Batch(
            tokens, scored, tokens, repeated=True, mask=tokens * min(self.tokens, tokens), angles=tokens
        )

    def _scored(self, tokens: int) -> int:
        return self._share(self.generations * self.completion, tokens)

    def _share(self, count: int, tokens: int) -> int:
        """The share of a whole group's count that belongs to `tokens` of its tokens."""
        return -(-count * tokens // self.tokens)


def weight_bytes(shape: ModelShape, precision: Precision) -> int:
    """The model at rest. Quantisation takes the transformer layers' linears; embedding, head and norms stay."""
    kept = (shape.parameters - shape.linear) * precision.weights
    per_weight = {
        "": precision.weights,
        "8bit": 1.0,
        "4bit": 0.5 + 4 / BLOCK,
        "4bit-double": 0.5 + 1 / BLOCK + 4 / (BLOCK * 256),
    }[precision.quantised]
    return round(kept + shape.linear * per_weight)


def optimizer_bytes(parameters: int, size: int, optim: str) -> tuple[int, int]:
    """(states that stay, temporaries of the step) for `parameters` trained parameters of `size` bytes each."""
    per_element = OPTIMIZER_STATES.get(optim, 2 * size)
    return round(parameters * per_element), parameters * size * TEMPORARIES.get(optim, 0)


def merge_bytes(shape: ModelShape, trained: Trained, size: int) -> int:
    """Main memory of recipes.export's merge: weights of `size` bytes, the adapter, the largest layer in float32. The
    file's pages come on top only where there is room. As measured: docs/memory.md."""
    largest = max(shape.vocab * shape.hidden, shape.parameters // shape.layers)
    return shape.parameters * size + trained.adapters * 4 + largest * 4


def asleep_bytes(shape: ModelShape, quantised: str) -> int:
    """What Unsloth's vLLM keeps while it sleeps, graphs and buffers; in 4 bits also the widest product's weights in 16.

    Fitted to what four configurations of two sizes kept: docs/memory.md.
    """
    intermediate = shape.layer.intermediate if shape.layer and quantised else 0
    return ENGINE + 3 * 2**10 * shape.layers * shape.hidden + 4 * shape.hidden * intermediate


def kv_cache_bytes(shape: ModelShape, sequences: int, length: int, e: int) -> int:
    """What every layer caches of every sequence; 0 where that is not known."""
    return sequences * e * sum(layer.elements(length) for layer in shape.cache or ())


def sampling_bytes(shape: ModelShape, sequences: int) -> int:
    """One row of float32 logits per sequence, with its softmax and sorted copy while a token is drawn."""
    return 3 * 4 * sequences * shape.vocab


def layer_bytes(hidden: int, layer: LayerShape, precision: Precision, batch: Batch, *, r: int) -> int:
    """What one transformer layer keeps for the backward pass. r: rank of LoRA on all linears, 0 without.

    A single key head is repeated without a copy.
    """
    h, i, e, query = hidden, layer.intermediate, precision.e, layer.attention_width
    norms = 2 * (4 * h + 4)  # the float32 input and one float32 a token
    if layer.head_norms:
        norms += 4 * (query + layer.kv_width) + 4 * (layer.heads + layer.kv_heads)
    attention = e * 2 * query + 4 * layer.heads  # q, output, log-sum-exp
    keys = batch.keys * e * 2 * (query if batch.repeated and layer.kv_heads > 1 else layer.kv_width)
    mlp = e * 3 * i  # gate, silu(gate), up
    if not r:
        # Each norm's output before and after its weight; the product. Under autocast float32 norms stay so, and each
        # of the five projections of a norm's output casts it anew.
        wide = precision.autocast and precision.weights == 4
        inputs = 4 * 2 * h + e * (5 * h + i) if wide else e * (4 * h + i)
        inputs += e * (query + layer.kv_width) if layer.head_norms else 0
    else:
        # PEFT casts each adapted linear's input to the adapter's dtype: six of hidden width, one of the MLP's.
        cast = precision.adapter != precision.weights or precision.autocast
        inputs = (e if precision.autocast else precision.adapter) * (
            (5 * h + query + i) if cast else (2 * h + i)
        )
        inputs += (e if precision.autocast else precision.adapter) * 7 * r
    return batch.tokens * (norms + attention + mlp + inputs) + keys + batch.mask * e


def compiled_layer_bytes(
    hidden: int, layer: LayerShape, precision: Precision, batch: Batch, *, r: int
) -> int:
    """The same of a layer that torch.compile made: what products and attention read; the rest is computed again.

    Norms of heads are kept as attention reads them, behind their weight.
    """
    h, e, query = hidden, precision.e, layer.attention_width
    wide = precision.autocast and precision.weights == 4
    stream = (4 if wide else e) * h + e * h  # the layer's input, and what attention adds to it
    inputs = e * (2 * h + layer.intermediate)  # both norms' outputs, the product of gate and up
    attention = (
        e * 2 * query + 4 * layer.heads + 2 * 4
    )  # q, output, log-sum-exp; a float32 a token for each norm
    adapters = (
        e * (query + 7 * r) if r else 0
    )  # the output as the adapter reads it, and the width between its halves
    keys = batch.keys * e * 2 * (query if batch.repeated and layer.kv_heads > 1 else layer.kv_width)
    gated = e * 2 * layer.intermediate
    return batch.tokens * (stream + inputs + attention + gated + adapters) + keys + batch.mask * e


def ends_bytes(hidden: int, layer: LayerShape, precision: Precision, batch: Batch, *, trained: bool) -> int:
    """What the embedding, the rotary tables and the last norm keep. trained: their weights get gradients.

    Frozen, the first norm's input needs no gradient and is not kept, which pays for the last norm's.
    """
    last = 4 * hidden + 4 + precision.e * hidden + 8 if trained else 0
    return batch.tokens * last + 2 * precision.e * layer.head_dim * batch.angles


def activation_bytes(
    shape: ModelShape,
    precision: Precision,
    batch: Batch,
    *,
    r: int,
    checkpointing: bool,
    offloaded: bool = False,
    compiled: bool = False,
) -> int:
    """The transformer's activations at the peak of forward and backward.

    With checkpointing: every layer's input (offloaded: three), and one layer's activations while it is recomputed. With
    or without, the gradients that move through one layer are added: three of the MLP's width, two of the hidden width.
    For layers that no formula describes only the inputs are counted. Under autocast those of float32 weights are
    float32: the embedding is not a product, and what is added to it becomes float32.
    """
    on_card = min(shape.layers, OFFLOADED_INPUTS) if checkpointing and offloaded else shape.layers
    stream = 4 if precision.autocast and precision.weights == 4 else precision.e
    inputs = on_card * batch.tokens * stream * shape.hidden
    if shape.layer is None:
        return inputs
    kept = compiled_layer_bytes if compiled else layer_bytes
    one = kept(shape.hidden, shape.layer, precision, batch, r=r)
    ends = ends_bytes(shape.hidden, shape.layer, precision, batch, trained=not r)
    moving = batch.tokens * precision.e * (3 * shape.layer.intermediate + 2 * shape.hidden)
    return (inputs + one if checkpointing else shape.layers * one) + ends + moving


def inference_bytes(shape: ModelShape, precision: Precision, tokens: int) -> int:
    """One layer's transients without a graph: residual, normed and float32 hidden, gate, up and product."""
    e, intermediate = precision.e, shape.layer.intermediate if shape.layer is not None else 0
    return tokens * (e * (3 * shape.hidden + 3 * intermediate) + 4 * shape.hidden)


def full_logits_bytes(shape: ModelShape, rows: int, e: int) -> int:
    """Plain full logits: the product, its float32 copy scaled by the temperature, log-softmax and its gradient."""
    return rows * shape.vocab * ((e if e != 4 else 0) + 3 * 4)


def memhead_bytes(shape: ModelShape, rows: int, e: int, chunk: Chunk, *, trained: bool) -> int:
    """memhead: one tile's workspace and the gradient's direction (rows, hidden); trained: also the float32 accumulator
    of the weight's gradient, one block of the vocabulary at a time."""
    direction = rows * shape.hidden * (4 if trained else e)
    return chunk.workspace_bytes(shape.hidden, 4, e) + direction


def head_chunk(
    shape: ModelShape, rows: int, e: int, device_type: str, chunk_rows: int | tuple[int, int] | None
) -> Chunk:
    """The tile that memhead takes; `chunk_rows` is head.chunk, or a tile as memhead takes it."""
    device = torch.device(device_type)
    return resolve_chunk(chunk_rows, rows, shape.vocab, device, 4, widen=False)
