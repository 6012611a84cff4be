"""The counted arithmetic against torch's own counter of operations, on real models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from recipes.plan.shapes import ModelShape, Trained
from recipes.plan.work import Flow, Work


def llama(**options):
    settings = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    settings |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager"))


def adapters():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def counted(model, batch, length, *, backward):
    ids = torch.randint(0, 96, (batch, length))
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(backward):
            loss = model(ids).logits.float().logsumexp(-1).sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_operations_of_a_real_pass(lora, backward):
    torch.manual_seed(0)
    model = llama()
    shape = ModelShape.of(model)
    work = Work.of(shape, Trained.of(llama(), adapters() if lora else None))
    if lora:
        model = get_peft_model(model, adapters())
    # Eager attention computes every pair of a square; causal ones are half of them.
    flow = Flow(tokens=2 * 50, scored=2 * 50, pairs=2 * 50 * 50)
    found = work.training(flow) if backward else work.forward(flow)
    expected = counted(model, 2, 50, backward=backward)
    if backward and lora:  # the first layer's inputs need no gradient, of 3 × 7 linears the first three's
        first = (1 - 2 / 12) * shape.linear
        assert work.training(flow) > expected > work.training(flow) - 2 * first * 100
    else:
        assert found == pytest.approx(expected, rel=0.002)


def test_a_prompt_counts_once_a_group():
    flow = Flow.of_lengths([4, 4, 6], [10, 20, 2], groups=[0, 0, 1])
    assert (flow.tokens, flow.scored) == (4 + 10 + 20 + 6 + 2, 32)
    assert flow.pairs == 4 * 4 // 2 + 6 * 6 // 2 + (40 + 50) + (80 + 200) + (12 + 2)
    assert Flow.of_lengths([4, 4], [10, 20], groups=[0, 1]).tokens == 4 + 10 + 4 + 20


def test_a_packed_row_has_no_last_tokens():
    flow = Flow.packed([4, 4, 6], [10, 20, 1], groups=[0, 0, 1])
    assert (flow.tokens, flow.scored) == (4 + 9 + 19 + 6, 31)
    assert flow.pairs == 4 * 4 // 2 + 6 * 6 // 2 + (36 + 40) + (76 + 180)


def test_a_mixture_of_experts_is_not_counted():
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    assert Work.of(ModelShape.of(model), Trained.of(model, None)) is None
