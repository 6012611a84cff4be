"""A quantised head, compared with plain full logits of its widened weight."""

from __future__ import annotations

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes (make test does)")

from grpo_runs import SMALL, PlainTrainer, RecordingTrainer, assert_same_trajectory, train  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from memhead.integrations import trl as memhead_trl  # noqa: E402
from memhead.integrations.bitsandbytes import quantized_logprobs, quantized_weight  # noqa: E402
from memhead.reference import full_logprobs  # noqa: E402


def quantized(kind, vocab=157, hidden=64, seed=0):
    """A quantised layer on the CPU, and the weight (V, H) that it represents according to bitsandbytes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator) / 3
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(hidden, vocab, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        return layer, layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    quant_type, nested = kind.split("-") if "-" in kind else (kind, "")
    layer = bitsandbytes.nn.Linear4bit(hidden, vocab, bias=False)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type=quant_type, compress_statistics=bool(nested)
    )
    layer = layer.to("cpu")
    return layer, bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


KINDS = ["int8", "nf4", "fp4", "nf4-nested"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [64, 128, 40, 6])
def test_tiles_and_rows_are_those_of_the_whole(kind, hidden):
    layer, whole = quantized(kind, hidden=hidden)
    weight = quantized_weight(layer)
    assert weight.shape == tuple(whole.shape)
    for start, stop in ((0, 157), (0, 1), (3, 10), (100, 157), (156, 157)):
        tile = weight.tile(start, stop, torch.float32)
        assert tile.is_contiguous()
        torch.testing.assert_close(tile, whole[start:stop], rtol=1e-6, atol=0)
    indices = torch.tensor([5, 0, 156, 5, 77])
    assert torch.equal(weight.rows(indices, torch.float32), weight.tile(0, 157, torch.float32)[indices])
    assert weight.tile(0, 2, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "softcap": 4.0, "logit_scale": 0.5}], ids=["plain", "all"]
)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_equals_full_logits(kind, options, with_entropy):
    layer, whole = quantized(kind)
    hidden, targets = (
        torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)),
        torch.arange(15).view(3, 5),
    )
    mask = targets % 4 != 1
    bias = torch.linspace(-1, 1, 157)
    results = []
    options = options | {"bias": bias, "mask": mask, "entropy": True}
    for ours in (True, False):
        x = hidden.clone().requires_grad_()
        if ours:
            out = quantized_logprobs(x, quantized_weight(layer), targets, chunk=(4, 30), **options)
        else:
            out = full_logprobs(x, whole, targets, dtype=torch.float64, **options)
        logprobs, entropy, *_ = out
        loss = (logprobs * torch.linspace(-1, 1, 15).view(3, 5)).sum() + with_entropy * entropy.sum()
        results.append((logprobs, entropy, *torch.autograd.grad(loss, x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
def test_a_layer_that_has_run_in_evaluation(kind):
    """On some CPUs bitsandbytes then rearranges the codes, and rounds the scales to bfloat16."""
    layer, whole = quantized(kind, vocab=160)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 64))
    before = layer(torch.ones(1, 64))
    tile = quantized_weight(layer).tile(3, 9, torch.float32)
    torch.testing.assert_close(tile, whole[3:9], rtol=2**-8, atol=0)
    assert torch.equal(layer(torch.ones(1, 64)), before)


def test_no_weight_sized_tensor():
    """Nothing as large as the widened weight is ever allocated."""
    layer, whole = quantized("nf4", vocab=4096)
    x = torch.randn(4, 64).requires_grad_()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        quantized_logprobs(
            x, quantized_weight(layer), torch.arange(4), chunk=(4, 128)
        ).logprobs.sum().backward()
    events = profile.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest < whole.numel() * 4 / 8


def test_refusals():
    with pytest.raises(ValueError, match=r"Linear with a weight of torch\.float32"):
        quantized_weight(torch.nn.Linear(3, 4))
    weight = quantized_weight(quantized("nf4")[0])
    with pytest.raises(ValueError, match=r"hidden has shape \(2, 5\) and weight \(157, 64\)"):
        quantized_logprobs(torch.randn(2, 5), weight, torch.arange(2))
    with pytest.raises(ValueError, match=r"hidden has dtype torch\.int64"):
        quantized_logprobs(torch.zeros(2, 64, dtype=torch.long), weight, torch.arange(2))
    with pytest.raises(ValueError, match=r"bias has shape \(1,\); it must be \(157,\)"):
        quantized_logprobs(torch.randn(2, 64), weight, torch.arange(2), bias=torch.zeros(1))
    layer = quantized("nf4")[0]
    for given in (layer, layer.weight):
        with pytest.raises(ValueError, match=r"weight is a \w+4bit; pass quantized_weight"):
            quantized_logprobs(torch.randn(2, 64), given, torch.arange(2))
    bias = torch.zeros(157, requires_grad=True)
    with pytest.raises(ValueError, match="bias requires a gradient"):
        quantized_logprobs(torch.randn(2, 64), weight, torch.arange(2), bias=bias)


class Float32Adapters:
    """TRL rounds the adapters of a quantised model to bfloat16, which would hide the differences compared here."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


class Ours(Float32Adapters, RecordingTrainer):
    pass


class Plain(Float32Adapters, PlainTrainer):
    pass


@pytest.fixture
def wide_checkpoint(tmp_path):
    """bitsandbytes 0.50 widens rows shorter than a block wrongly on a CPU: this model's are one block long."""
    config = LlamaConfig(**SMALL | {"hidden_size": 64, "num_key_value_heads": 2})
    set_seed(1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


def test_in_trls_trainer(wide_checkpoint, tmp_path):
    """LoRA on the attention of a model whose head is 4-bit: TRL would multiply by the packed bytes."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model"],
    )  # fmt: skip
    settings = {"lora": True, "num_iterations": 2, "optim": "sgd", "learning_rate": 0.1}

    def run(trainer):
        model = AutoModelForCausalLM.from_pretrained(
            wide_checkpoint, quantization_config=config, dtype=torch.float32
        )
        assert type(model.lm_head).__name__ == "Linear4bit"
        return train(wide_checkpoint, tmp_path, model=model, trainer=trainer, **settings)

    ours, plain = run(Ours), run(Plain)
    assert ours.calls > 0
    assert_same_trajectory(ours, plain, loss=1e-6, loss_floor=1.0, parameters=1e-5)
    assert memhead_trl.current_head() is None
