"""What cannot be computed is refused in one line that names argument, value and rule."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from memhead import (
    LowRankUpdate,
    chunked_linear,
    linear_cross_entropy,
    linear_logprobs,
    supported_logprobs,
    truncation_support,
)
from tests.memhead.reference import make_head

CASES = [
    ({"hidden": torch.zeros(4, 23)}, r"hidden has shape \(4, 23\) and weight \(11, 24\)"),
    ({"hidden": torch.tensor(1.0)}, r"hidden has shape \(\)"),
    (
        {"hidden": torch.zeros(4, 24, dtype=torch.long)},
        "hidden has dtype torch.int64; it must be floating point",
    ),
    ({"weight": torch.zeros(11)}, r"weight \(11,\)"),
    (
        {"weight": torch.nn.Linear(24, 11)},
        r"weight is a Linear; pass its weight, as lm_head\.weight, and bias=",
    ),
    ({"weight": [1.0]}, "weight is a list; pass a tensor"),
    ({"weight": torch.zeros(0, 24)}, "weight has no rows"),
    ({"weight": torch.zeros(11, 24, dtype=torch.uint8)}, "weight has dtype torch.uint8.*quantised"),
    ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets has shape \(3,\); it must be \(4,\)"),
    ({"targets": torch.zeros(4)}, "targets has dtype torch.float32; it must hold integers"),
    ({"targets": torch.zeros(4, dtype=torch.bool)}, "targets has dtype torch.bool"),
    ({"targets": torch.tensor([0, 11, 0, 0])}, r"targets contains 11, outside the vocabulary 0\.\.10"),
    ({"targets": torch.tensor([0, 0, -100, 0])}, "targets contains -100.*mask="),
    ({"bias": torch.zeros(10)}, r"bias has shape \(10,\); it must be \(11,\)"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask has shape \(5,\)"),
    ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "temperature contains 0.0"),
    ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\)"),
    ({"softcap": -30.0}, "softcap=-30.0"),
    ({"chunk": 0}, "chunk=0 is too small to hold a row"),
    ({"chunk": (4, 0)}, r"chunk=\(4, 0\)"),
    ({"chunk": (4, 4, 4)}, r"chunk=\(4, 4, 4\)"),
    ({"chunk": (4,)}, r"chunk=\(4,\) must be a number of rows or \(rows, vocabulary columns\)"),
    ({"chunk": 2.5}, r"chunk=2\.5"),
    ({"chunk": (4, 2.5)}, r"chunk=\(4, 2\.5\) must be a number of rows or"),
    ({"extra_outputs": ("perplexity",)}, r"extra_outputs contains \['perplexity'\]; known are"),
    ({"backend": "cuda"}, "backend='cuda' is not one of torch, triton"),
    (
        {"low_rank": LowRankUpdate(torch.zeros(2, 24), torch.zeros(11, 3))},
        r"low_rank has a \(2, 24\) and b \(11, 3\)",
    ),
    ({"low_rank": torch.zeros(2, 24)}, r"low_rank is a Tensor; pass a memhead\.LowRankUpdate"),
    (
        {"extra_outputs": "is_top1"},
        r"extra_outputs='is_top1' is a text; pass a tuple of names, as \('is_top1',\)",
    ),
    *(
        ({name: [1.0] * 4}, f"{name} is a list; pass a tensor")
        for name in ("targets", "bias", "mask", "temperature")
    ),
    *(
        ({name: value.to("meta")}, f"{name} is on meta and hidden on cpu")
        for name, value in {
            "weight": torch.zeros(11, 24),
            "targets": torch.zeros(4, dtype=torch.long),
            "bias": torch.zeros(11),
            "mask": torch.ones(4, dtype=torch.bool),
            "temperature": torch.ones(4),
        }.items()
    ),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[message for _, message in CASES])
def test_refused(change, message):
    head = make_head(4, 11)
    arguments = {"hidden": head.hidden, "weight": head.weight, "targets": head.targets} | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


def test_a_sharded_weight_is_refused_with_the_way_to_gather_it():
    """FSDP2's DTensor, real; ZeRO-3's empty parameter as DeepSpeed, not installed here, documents it."""
    head = make_head(4, 11)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(head.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"weight is a DTensor \(11, 24\).*full_tensor\(\)"):
            linear_logprobs(head.hidden, sharded, head.targets)
        with pytest.raises(ValueError, match="weight is a DTensor"):
            linear_cross_entropy(head.hidden, sharded, head.targets)
        bias = distribute_tensor(head.bias, sharded.device_mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"bias is a DTensor \(11,\)"):
            linear_logprobs(head.hidden, head.weight, head.targets, bias=bias)
        update = LowRankUpdate(torch.zeros(24, 24), sharded)
        with pytest.raises(ValueError, match=r"low_rank\.b is a DTensor \(11, 24\)"):
            linear_logprobs(head.hidden, head.weight, head.targets, low_rank=update)
        assert linear_logprobs(head.hidden, sharded.full_tensor(), head.targets).logprobs.isfinite().all()
    finally:
        dist.destroy_process_group()
    partitioned = torch.nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size((11, 24))
    with pytest.raises(
        ValueError, match=r"weight is \(11, 24\) but partitioned by ZeRO-3.*GatheredParameters"
    ):
        linear_logprobs(head.hidden, partitioned, head.targets)
    gathered = torch.nn.Parameter(head.weight.clone())  # inside GatheredParameters
    gathered.ds_shape = gathered.shape
    found = linear_logprobs(head.hidden, gathered, head.targets).logprobs
    assert torch.equal(found, linear_logprobs(head.hidden, head.weight, head.targets).logprobs)


def test_ignored_targets_are_for_cross_entropy():
    head = make_head(4, 11)
    targets = torch.where(torch.arange(4) == 2, -100, head.targets)
    assert linear_cross_entropy(head.hidden, head.weight, targets).isfinite()


def test_a_masked_row_may_hold_anything():
    head = make_head(4, 11)
    mask = torch.tensor([True, False, True, True])
    targets = torch.where(mask, head.targets, 10**9)
    temperature = torch.where(mask, 1.0, 0.0)
    hidden = head.hidden.requires_grad_()
    weight = head.weight.requires_grad_()
    result = linear_logprobs(hidden, weight, targets, mask=mask, temperature=temperature, entropy=True)
    (result.logprobs.sum() + result.entropy.sum()).backward()
    assert result.logprobs.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_chunk_of_whole_rows_has_no_columns():
    head = make_head(4, 11)
    support = truncation_support(head.hidden, head.weight, top_k=3)
    calls = [
        lambda: truncation_support(head.hidden, head.weight, top_k=3, chunk=(4, 8)),
        lambda: supported_logprobs(head.hidden, head.weight, head.targets, support, chunk=(4, 8)),
        lambda: chunked_linear(head.hidden, head.weight, lambda z: z.sum(-1), chunk=(4, 8)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"chunk=\(4, 8\) must be a number of rows"):
            call()


def test_a_lora_head_is_refused_with_its_update_named():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential()
    model.lm_head = torch.nn.Linear(24, 11, bias=False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"]), model)
    head = make_head(4, 11)
    with pytest.raises(
        ValueError, match=r"as lm_head\.weight, .*low_rank=memhead\.integrations\.peft\.low_rank_update"
    ):
        linear_logprobs(head.hidden, model.lm_head, head.targets)


def test_an_argument_of_rows_on_another_device_is_refused():
    head = make_head(4, 11)
    with pytest.raises(ValueError, match=r"row_args\[1\] is on meta and hidden on cpu"):
        chunked_linear(
            head.hidden, head.weight, lambda z, *_: z.sum(-1), head.targets, torch.ones(4, device="meta")
        )
