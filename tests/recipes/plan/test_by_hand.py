"""Every formula of the plan on sizes so small that its bytes are added up by hand: a term that is off shows."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from memhead.planning import Chunk
from recipes.config.load import load_config
from recipes.plan import formulas as memory
from recipes.plan.formulas import DTYPE_BYTES, Batch, Group, Precision
from recipes.plan.plan import GIB, Memory, Plan, Storage, _largest, longest_completion, measure, store
from recipes.plan.setting import Setting
from recipes.plan.shapes import CacheLayer, LayerShape, ModelShape, Trained

LAYER = LayerShape(intermediate=10, heads=4, kv_heads=2, head_dim=3)  # queries 12 wide, keys and values 6
SHAPE = ModelShape(
    kind="llama",
    vocab=101,
    hidden=6,
    layers=5,
    positions=1000,
    parameters=2000,
    linear=800,
    cache=(CacheLayer(width=12),) * 5,
    layer=LAYER,
)
BATCH = Batch(tokens=7, scored=5, keys=11, repeated=False, mask=13, angles=9)
HALF, MIXED = Precision(2, 2), Precision(4, 2, autocast=True)


def test_bytes_of_a_dtype_and_what_is_assumed_of_a_precision():
    assert DTYPE_BYTES == {"float32": 4, "bfloat16": 2, "float16": 2}
    assert Precision(2, 2) == Precision(weights=2, e=2, adapter=4, quantised="", autocast=False)


# Batches


def test_a_padded_batch():
    assert Batch.padded(3, 7, 4) == Batch(33, 12, 33, repeated=True, mask=33 * 11, angles=11)
    assert Batch.padded(3, 7, 4, mask=False) == Batch(33, 12, 33, repeated=False, mask=0, angles=11)


@pytest.mark.parametrize(
    ("group", "tokens", "varlen", "dense"),
    [
        # Of three completions of one token each, 28 keys for 7 tokens.
        (Group(7, 4, 3), 8, Batch(8, 6, 32, False, 0, 8), Batch(8, 6, 8, True, 8 * 8, 8)),
        (Group(7, 4, 3), 40, Batch(40, 30, 160, False, 0, 40), Batch(40, 30, 40, True, 40 * 16, 40)),
        # Short completions of a short prompt have more rows in the head: 8 for 2 tokens.
        (Group(2, 20, 8), 30, Batch(30, 120, 270, False, 0, 30), Batch(30, 120, 30, True, 30 * 30, 30)),
    ],
)  # fmt: skip
def test_the_most_that_a_bin_takes(group, tokens, varlen, dense):
    assert group.most(tokens, varlen=True) == varlen
    assert group.most(tokens, varlen=False) == dense


# Parts


@pytest.mark.parametrize(
    ("quantised", "size"),
    [
        ("", 2_000_000 * 2),
        ("8bit", 976_000 * 2 + 1_024_000),
        ("4bit", 976_000 * 2 + 512_000 + 64_000),  # a float32 for 64 weights
        ("4bit-double", 976_000 * 2 + 512_000 + 16_000 + 250),  # a byte, and a float32 for 256 of those
    ],
)
def test_weights_at_rest(quantised, size):
    shape = replace(SHAPE, parameters=2_000_000, linear=1_024_000)
    assert memory.weight_bytes(shape, Precision(2, 2, quantised=quantised)) == size


@pytest.mark.parametrize(
    ("optim", "states", "temporaries"),
    [
        ("adamw_torch_fused", 8_192_000, 0),
        ("adamw_torch", 8_192_000, 4_096_000),
        ("adamw_8bit", 2_080_000, 0),  # a byte for each of two states, and a float32 for 256 of them
        ("paged_adamw_8bit", 2_080_000, 0),
        ("adamw_bnb_8bit", 2_080_000, 0),
        ("sgd", 0, 0),
        ("anything else", 8_192_000, 0),
    ],
)
def test_states_of_an_optimizer(optim, states, temporaries):
    assert memory.optimizer_bytes(1_024_000, 4, optim) == (states, temporaries)


def test_a_merge():
    """Two bytes for each of 2,000 weights, four for 30 numbers of adapters and for the largest part's weights."""
    trained = Trained(adapters=30, whole=20, adapted=400, head=False)
    assert memory.merge_bytes(SHAPE, trained, 2) == 2000 * 2 + 30 * 4 + 101 * 6 * 4
    few_words = replace(SHAPE, vocab=50)  # so that a fifth of all weights is more
    assert memory.merge_bytes(few_words, trained, 2) == 2000 * 2 + 30 * 4 + 400 * 4


def test_what_a_sleeping_engine_keeps():
    """128 MiB, 3 KiB for each of 6 hidden in 5 layers; of quantised weights 6 x 2 x 10 in 16 bits besides."""
    assert memory.asleep_bytes(SHAPE, "") == 134_217_728 + 3072 * 30
    assert memory.asleep_bytes(SHAPE, "4bit") == 134_217_728 + 3072 * 30 + 2 * 120
    assert memory.asleep_bytes(replace(SHAPE, layer=None), "4bit") == memory.asleep_bytes(SHAPE, "")


def test_what_sampling_keeps():
    cache = (CacheLayer(width=8), CacheLayer(width=8, window=4, fixed=5))
    assert memory.kv_cache_bytes(replace(SHAPE, cache=cache), 3, 10, 2) == 3 * 2 * (80 + 32 + 5)
    assert memory.kv_cache_bytes(replace(SHAPE, cache=None), 3, 10, 2) == 0
    assert memory.sampling_bytes(SHAPE, 3) == 3 * 101 * 12


ONE = (
    7 * (56 + 64 + 60 + 68) + 264 + 26
)  # norms, attention, MLP and the inputs of the linears; keys; the mask


@pytest.mark.parametrize(
    ("layer", "precision", "repeated", "r", "size"),
    [
        (LAYER, HALF, False, 0, ONE),
        (LAYER, HALF, True, 0, ONE + 264),  # four heads in place of two
        (replace(LAYER, kv_heads=1), HALF, True, 0, ONE - 132),
        (replace(LAYER, head_norms=True), HALF, False, 0, ONE + 7 * (72 + 24 + 36)),
        (LAYER, HALF, False, 8, ONE + 7 * (4 * 52 + 4 * 56 - 68)),  # inputs cast to the adapters' float32
        (LAYER, Precision(2, 2, adapter=2), False, 8, ONE + 7 * (2 * 22 + 2 * 56 - 68)),
        (LAYER, MIXED, False, 8, ONE + 7 * (2 * 52 + 2 * 56 - 68)),
    ],
)
def test_what_a_layer_keeps(layer, precision, repeated, r, size):
    batch = replace(BATCH, repeated=repeated)
    assert memory.layer_bytes(6, layer, precision, batch, r=r) == size


COMPILED = 7 * (24 + 44 + 72 + 40) + 264 + 26  # the stream, inputs of the linears, attention, gate and up


@pytest.mark.parametrize(
    ("layer", "precision", "repeated", "r", "size"),
    [
        (LAYER, HALF, False, 0, COMPILED),
        (LAYER, HALF, True, 0, COMPILED + 264),
        (replace(LAYER, kv_heads=1), HALF, True, 0, COMPILED - 132),
        (replace(LAYER, head_norms=True), HALF, False, 0, COMPILED),
        (LAYER, HALF, False, 8, COMPILED + 7 * 2 * (12 + 56)),
        (LAYER, MIXED, False, 0, COMPILED + 7 * 2 * 6),  # the layer's input in float32
    ],
)
def test_what_a_compiled_layer_keeps(layer, precision, repeated, r, size):
    batch = replace(BATCH, repeated=repeated)
    assert memory.compiled_layer_bytes(6, layer, precision, batch, r=r) == size


def test_what_the_ends_keep():
    assert memory.ends_bytes(6, LAYER, HALF, BATCH, trained=False) == 108  # sine and cosine of 9 positions
    assert memory.ends_bytes(6, LAYER, HALF, BATCH, trained=True) == 108 + 7 * (24 + 4 + 12 + 8)


ENDS, MOVING, INPUT = 108 + 7 * 48, 7 * 2 * (30 + 12), 7 * 2 * 6


@pytest.mark.parametrize(
    ("shape", "checkpointing", "offloaded", "size"),
    [
        (SHAPE, False, False, 5 * ONE + ENDS + MOVING),
        (SHAPE, False, True, 5 * ONE + ENDS + MOVING),
        (SHAPE, True, False, 5 * INPUT + ONE + ENDS + MOVING),
        (SHAPE, True, True, 3 * INPUT + ONE + ENDS + MOVING),
        (replace(SHAPE, layers=2), True, True, 2 * INPUT + ONE + ENDS + MOVING),
        (replace(SHAPE, layer=None), False, False, 5 * INPUT),
    ],
)
def test_activations_at_their_peak(shape, checkpointing, offloaded, size):
    found = memory.activation_bytes(shape, HALF, BATCH, r=0, checkpointing=checkpointing, offloaded=offloaded)
    assert found == size


@pytest.mark.parametrize(
    ("checkpointing", "size"),
    [(False, 5 * COMPILED + ENDS + MOVING), (True, 5 * INPUT + COMPILED + ENDS + MOVING)],
)
def test_activations_of_compiled_layers(checkpointing, size):
    found = memory.activation_bytes(SHAPE, HALF, BATCH, r=0, checkpointing=checkpointing, compiled=True)
    assert found == size


def test_a_layer_without_a_graph():
    assert memory.inference_bytes(SHAPE, HALF, 7) == 7 * (2 * (18 + 30) + 24)
    assert memory.inference_bytes(replace(SHAPE, layer=None), HALF, 7) == 7 * (2 * 18 + 24)


def test_the_head():
    assert memory.full_logits_bytes(SHAPE, 5, 2) == 5 * 101 * 14
    assert memory.full_logits_bytes(SHAPE, 5, 4) == 5 * 101 * 12  # the product is float32 already
    tile = 3 * 17 * 4 + 3 * 6 * (4 + 2)  # logits; the accumulator and the targets' rows
    assert memory.memhead_bytes(SHAPE, 5, 2, Chunk(3, 17), trained=False) == tile + 5 * 6 * 2
    assert memory.memhead_bytes(SHAPE, 5, 2, Chunk(3, 17), trained=True) == tile + 5 * 6 * 4


def test_the_heads_tile():
    large = replace(SHAPE, vocab=128_256)
    assert memory.head_chunk(SHAPE, 5, 2, "cpu", None) == (5, 101)
    assert memory.head_chunk(large, 100_000, 2, "cpu", None) == (1024, 1024)
    assert memory.head_chunk(large, 100_000, 2, "cuda", None) == (2048, 20_480)
    assert memory.head_chunk(large, 100_000, 2, "cpu", 64).rows == 64


# The whole


SETTING = Setting(
    shape=SHAPE,
    trained=Trained(adapters=30, whole=0, adapted=800, head=False),
    precision=MIXED,
    lora_rank=8,
    optim="adamw_torch",
    sequences=2,
    sampled=6,
    prompt=3,
    completion=4,
    generations=3,
    checkpointing=False,
    offloaded=False,
    reference=False,
    head="memhead",
    chunk_rows=None,
    device_type="cpu",
)  # fmt: skip


def test_compiled_layers_change_the_activations_alone():
    plain, compiled = measure(SETTING), measure(replace(SETTING, compiled=True))
    spared = 5 * 14 * (56 + 64 + 60 + 2 * 52 + 2 * 56 - (36 + 44 + 72 + 40 + 2 * 68))
    assert plain.parts | {"activations": plain.parts["activations"] - spared} == compiled.parts


def test_a_sleeping_engine_is_there_in_every_phase():
    alone, beside = measure(SETTING), measure(replace(SETTING, asleep=True))
    kept = memory.asleep_bytes(SHAPE, "")
    assert beside.parts == alone.parts | {"sleeping vLLM": kept}
    assert beside.phases == {phase: size + kept for phase, size in alone.phases.items()}


def test_parts_and_phases():
    found = measure(SETTING)
    one = 14 * (56 + 64 + 60 + 2 * 52 + 2 * 56) + 14 * 48 + 14 * 7 * 2
    ends = 2 * 2 * 3 * 7 + 14 * 2 * 42  # the rotary tables, and what moves
    assert found.parts == {
        "parameters": 8000,
        "reference model": 0,
        "adapter and saved modules": 120,
        "gradients": 120,
        "optimizer": 240,
        "sleeping vLLM": 0,
        "KV cache and sampling": 5040 + 7272,
        "weights cast by autocast": 1600,
        "activations": 5 * one + ends,
        "head": 3520 + 96,
    }
    assert found.instead == {
        "head with full logits": 8 * 101 * 14,
        "activations with checkpointing": 5 * 14 * 24 + one + ends,
    }
    resting = 8000 + 120 + 240
    assert found.phases == {
        "generation": resting + 12_312 + 18 * 120,
        "scoring without gradient": resting + 14 * 120 + 3616 + 1600,
        "forward, loss and backward": resting + 120 + 1600 + 5 * one + ends + 3616,
        "optimizer": resting + 120 + 120,
    }
    assert found.peak == resting + 120 + 1600 + 5 * one + ends + 3616


def test_parts_and_phases_the_other_way():
    """Every weight trained in float32, full logits, a reference model, checkpointing, a cache that is kept."""
    whole = replace(
        SETTING,
        trained=Trained(adapters=0, whole=2000, adapted=0, head=True),
        lora_rank=0,
        optim="sgd",
        head="full",
        reference=True,
        checkpointing=True,
        kept_cache=True,
    )
    found, given = measure(whole), measure(SETTING)
    one = 14 * (56 + 64 + 60 + 128) + 14 * 48 + 14 * 7 * 2
    ends = 14 * 48 + 2 * 2 * 3 * 7 + 14 * 2 * 42
    full = 8 * 101 * 14
    assert found.parts == {
        **given.parts,
        "reference model": 8000,
        "adapter and saved modules": 0,
        "gradients": 8000,
        "optimizer": 0,
        "activations": 5 * 14 * 24 + one + ends,
        "head": full,
    }
    assert found.instead == {
        "head with memhead": 3520 + 8 * 6 * 4,
        "activations without checkpointing": 5 * one + ends,
    }
    assert found.phases == {
        "generation": 16_000 + 12_312 + 18 * 120,
        "scoring without gradient": 16_000 + 5040 + 14 * 120 + full + 1600,
        "forward, loss and backward": 16_000 + 5040 + 8000 + 1600 + 5 * 14 * 24 + one + ends + full,
        "optimizer": 16_000 + 5040 + 8000,
    }


def test_unsloths_scoring_takes_what_its_forward_pass_takes():
    offloaded = replace(SETTING, checkpointing=True, offloaded=True)
    phases = measure(offloaded).phases
    one = 14 * (56 + 64 + 60 + 2 * 52 + 2 * 56) + 14 * 48 + 14 * 7 * 2
    through = 3 * 14 * 24 + one + 2 * 2 * 3 * 7 + 14 * 2 * 42
    assert phases["scoring without gradient"] == 8360 + through + 3616 + 1600
    assert phases["forward, loss and backward"] == 8360 + 120 + 1600 + through + 3616


def test_the_head_takes_the_rows_that_it_is_told_to():
    assert measure(replace(SETTING, chunk_rows=2)).parts["head"] == 2 * 101 * 4 + 2 * 6 * (4 + 2) + 8 * 6 * 2


def test_what_is_not_cast():
    """Half precision needs no copies; float32 without autocast neither."""
    for precision in (replace(MIXED, weights=2), replace(MIXED, autocast=False)):
        assert measure(replace(SETTING, precision=precision)).parts["weights cast by autocast"] == 0
    found = measure(replace(SETTING, shape=replace(SHAPE, layer=None)))
    assert list(found.instead) == ["head with full logits"]


CONFIGS = Path(__file__).parents[3] / "configs"


def test_what_is_kept_of_a_model_in_another_dtype_than_its_checkpoints():
    """It comes in two bytes a weight and is trained and left in four; a merge reads two."""
    s = replace(SETTING, shape=replace(SHAPE, dtype="bfloat16"))
    told = ["grpo.max_steps=1000", "run.save_every=300", "model.name=org/model"]

    def of(*overrides):
        return store(load_config(CONFIGS / "smollm2_135m_char_count.yaml", [*told, *overrides]), s)

    found = of()
    expected = Storage(
        download=4000,
        download_4bit=0,
        checkpoint=120 + 240,
        kept=4,
        final=120,
        warm_start=8000,
        merge=2000 * 2 + 120 + 606 * 4,
        host=0,
    )
    assert found == expected
    assert of("run.warm_start=null") == replace(expected, warm_start=0)
    assert [of(f"grpo.save_total_limit={most}").kept for most in (3, 10)] == [3, 4]


def test_what_unsloth_loads_and_moves(without_unsloth):
    """A 4-bit copy if there is one; the inputs of all layers but three lie in main memory."""
    s = replace(
        SETTING, precision=Precision(2, 2, quantised="4bit-double"), checkpointing=True, offloaded=True
    )
    s = replace(s, shape=replace(SHAPE, dtype="float16", linear=1600, parameters=2000))
    config = load_config(CONFIGS / "llama3.1_8b_gsm8k.yaml", ["model.name=org/model"])
    found = store(config, s)
    assert (found.download, found.download_4bit) == (4000, 800 + round(1600 * (0.5 + 1 / 64 + 4 / 16384)))
    assert found.host == (5 - 3) * 14 * 2 * 6
    assert store(config, replace(s, offloaded=False)).host == 0
    assert store(config, replace(s, shape=replace(s.shape, layers=2))).host == 0
    assert store(config, replace(s, shape=replace(s.shape, quantised="4bit"))).download_4bit == 0


def test_the_longest_completion_ends_with_the_models_positions():
    config = load_config(CONFIGS / "quickstart.yaml", ["step.impl=trl"])
    assert longest_completion(config, SETTING, 10**12) == 1000 - 3
    assert longest_completion(config, replace(SETTING, prompt=1001), 10**12) == 0
    assert longest_completion(config, SETTING, measure(SETTING).peak) == 4
    assert longest_completion(config, SETTING, 1) == 0


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 8])
def test_the_largest_number_that_fits(limit):
    for largest in range(limit + 1):
        asked = []

        def fits(number, largest=largest, asked=asked):
            asked.append(number)
            assert 0 < number <= limit
            assert len(asked) <= 4, "halving needs no more"
            return number <= largest

        assert _largest(limit, fits) == largest


# In words


STORAGE = Storage(
    download=3 * GIB,
    download_4bit=0,
    checkpoint=GIB,
    kept=3,
    final=2 * GIB,
    warm_start=0,
    merge=0,
    host=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({}, ["disk: 3.00 GiB to download; 2.00 GiB for the final model; 3 checkpoints of 1.00 GiB"]),
        ({"download": 0, "kept": 0}, ["disk: 2.00 GiB for the final model; no checkpoints"]),
        (
            {"download_4bit": 2**28, "kept": None, "merge": 5 * GIB},
            [
                "disk: 0.25 GiB to download if Unsloth has a 4-bit copy, else 3.00 GiB; 2.00 GiB for the final "
                "adapter; each checkpoint 1.00 GiB",
                "main memory: 5.00 GiB to merge the adapter into the unquantised base",
            ],
        ),
        (
            {"warm_start": 4 * GIB, "download": 0, "host": 2**29, "merge": 5 * GIB},
            [
                "disk: 4.00 GiB for the model after the warm start; 2.00 GiB for the final adapter; "
                "3 checkpoints of 1.00 GiB",
                "main memory: 5.00 GiB to merge the adapter into the unquantised base; 0.50 GiB for layer inputs "
                "while it trains",
            ],
        ),
    ],
)
def test_what_is_kept_in_words(changed, lines):
    assert replace(STORAGE, **changed).lines() == lines


PLAN = Plan(
    name="small",
    setting=replace(SETTING, sequences=512, completion=1024),
    memory=Memory(
        parts={"parameters": GIB // 2, "reference model": 0},
        phases={"generation": 3 * GIB, "optimizer": 2 * GIB},
        instead={"head with full logits": 3 * GIB},
    ),
    storage=STORAGE,
    chunk=Chunk(1024, 512),
    device_bytes=25 * GIB,  # 23 of them usable: a twentieth is not, nor three quarters of a GiB
    longest_completion=77,
    notes=["it rains"],
)  # fmt: skip
UNCOUNTED = replace(PLAN.setting, shape=replace(SHAPE, layer=None))


def test_a_plan_in_words():
    assert PLAN.lines() == [
        "small: 512 sequences of 3 + 1024 tokens a forward pass, 6 sampled at a time",
        "chunk: 1024 rows × 512 vocabulary entries = 2.0 MiB of logits in place of 524288 × 101 = 202.0 MiB: "
        "memhead's tile for cpu, the size that was fastest when measured",
        "peak 3.00 GiB fits 25.0 GiB, of which 23.0 are counted as usable",
        "longest completion that fits: 77 tokens",
        "disk: 3.00 GiB to download; 2.00 GiB for the final model; 3 checkpoints of 1.00 GiB",
        "note: it rains",
    ]
    asked = replace(PLAN, setting=replace(PLAN.setting, chunk_rows=64)).lines()[1]
    assert asked.endswith("202.0 MiB: head.chunk asks for its rows")


def of(peak):
    return Memory({"parameters": 1}, {"generation": peak, "optimizer": 1}, {})


@pytest.mark.parametrize(
    ("changed", "fits", "verdict"),
    [
        (
            {"memory": of(23 * GIB)},
            True,
            [
                "peak 23.00 GiB fits 25.0 GiB, of which 23.0 are counted as usable",
                "longest completion that fits: 77 tokens",
            ],
        ),
        (
            {"memory": of(23 * GIB + 1), "longest_completion": 0},
            False,
            [
                "peak 23.00 GiB does NOT fit 25.0 GiB, of which 23.0 are counted as usable",
                "longest completion that fits: none",
            ],
        ),
        (
            {"setting": UNCOUNTED},
            None,
            [
                "peak at least 3.00 GiB, more with what is not counted (see below): whether it fits is not known; "
                "there are 25.0 GiB, of which 23.0 are counted as usable"
            ],
        ),
        (
            {"setting": UNCOUNTED, "memory": of(24 * GIB)},
            False,
            ["peak at least 24.00 GiB does NOT fit 25.0 GiB, of which 23.0 are counted as usable"],
        ),
        (
            {"setting": UNCOUNTED, "device_bytes": None},
            None,
            ["peak at least 3.00 GiB: not everything could be counted"],
        ),
        ({"device_bytes": None}, None, []),
    ],
)
def test_whether_it_fits(changed, fits, verdict):
    found = replace(PLAN, **changed)
    assert found.fits is fits
    assert found.lines()[2:-2] == verdict


def test_the_tables():
    """What takes nothing is left out, and only a phase is a peak, even where another choice is as large."""
    console = Console(file=io.StringIO(), width=200)
    PLAN.print(console)
    shown = console.file.getvalue()
    rows = [line.split("│") for line in shown.splitlines() if line.count("│") == 3]
    assert [[cell.strip() for cell in row[1:3]] for row in rows] == [
        ["parameters", "0.500"],
        ["generation  ← peak", "3.000"],
        ["optimizer", "2.000"],
        ["head with full logits", "3.000"],
    ]
    assert shown.rstrip().endswith("note: it rains")
