"""Compiled layers: the same numbers, one graph for all layers and lengths, and only where no cache is kept."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes.models.compiled import compile_layers, is_compiled, plain_layers

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


class Graphs:
    """A backend for torch.compile that runs what it is given, by AOTAutograd as inductor does, and counts."""

    def __init__(self) -> None:
        self.compiled, self.run = 0, 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.compilers import nop

        self.compiled += 1
        ready = aot_autograd(fw_compiler=nop)(graph, inputs)

        def counted(*arguments):
            self.run += 1
            return ready(*arguments)

        return counted


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).double().train()


def tokens(length: int, seed: int = 0):
    return torch.randint(2, SHAPE["vocab_size"], (2, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, length: int) -> dict[str, torch.Tensor]:
    ids = tokens(length)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=1e-14, msg=name)


def adapted(model):
    model = get_peft_model(
        model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    ).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("wrapped", [lambda model: model, adapted], ids=["full", "LoRA"])
def test_gradients_of_any_length_by_one_graph(model, wrapped):
    model = wrapped(model)
    plain = {length: gradients(model, length) for length in (7, 12, 31)}
    graphs = Graphs()
    compile_layers(model, graphs)
    assert_same(gradients(model, 7), plain[7])
    once = graphs.compiled
    for length, expected in plain.items():
        assert_same(gradients(model, length), expected)
    assert graphs.compiled == once
    assert graphs.run == 4 * SHAPE["num_hidden_layers"]


def test_with_gradient_checkpointing(model):
    expected = gradients(model, 9)
    graphs = Graphs()
    compile_layers(model, graphs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, 9), expected)
    assert graphs.run == 2 * SHAPE["num_hidden_layers"]  # forward, and again in the backward


def test_where_layers_run_compiled(model):
    graphs, ids, layers = Graphs(), tokens(9), SHAPE["num_hidden_layers"]
    assert not is_compiled(model)
    compile_layers(model, graphs)
    assert is_compiled(model)
    assert not is_compiled(model.lm_head)  # which has no layers
    scored = model(input_ids=ids, use_cache=False).logits
    once = graphs.compiled
    with torch.no_grad():
        again = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(scored, again)
    assert scored.requires_grad
    assert not again.requires_grad
    assert graphs.compiled == once  # the same graph without a gradient
    assert graphs.run == 2 * layers
    model(input_ids=ids, use_cache=True)  # which fills a cache
    with plain_layers(model):
        model(input_ids=ids, use_cache=False)
    model.eval()
    model(input_ids=ids, use_cache=False)
    assert graphs.run == 2 * layers
    model.train()
    model(input_ids=ids, use_cache=False)
    assert graphs.run == 3 * layers


def test_a_layer_of_several_results():
    class Pair(GradientCheckpointingLayer):
        def forward(self, hidden):
            return (2 * hidden, None, 3)

    layer = torch.nn.Sequential(Pair())
    compile_layers(layer, Graphs())
    with torch.no_grad():
        doubled, nothing, three = layer(torch.ones(2))
    assert doubled.tolist() == [2.0, 2.0]
    assert not doubled.requires_grad
    assert (nothing, three) == (None, 3)


def test_what_cannot_be_compiled_runs_as_it_is(model, capsys):
    asked = []

    def refuses(graph, inputs):
        asked.append(graph)
        raise RuntimeError("no kernel for this\nand much more")

    expected = gradients(model, 9)
    compile_layers(model, refuses)
    assert is_compiled(model)
    assert_same(gradients(model, 9), expected)
    assert_same(gradients(model, 9), expected)
    assert len(asked) == 1
    assert not is_compiled(model)
    said = capsys.readouterr()
    assert said.out.startswith("layers: torch.compile fails here, so they run as they came: ")
    assert "no kernel for this\n" in said.out
    assert said.out.count("\n") == 1
    assert said.err == ""  # no traceback


def test_sampling_is_left_as_it_was(model):
    ask = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    expected = model.generate(tokens(6), **ask)
    graphs = Graphs()
    compile_layers(model, graphs)
    assert torch.equal(model.generate(tokens(6), **ask), expected)
    assert graphs.run == 0


def test_a_copy_is_not_bound_to_the_layers_it_was_made_from(model):
    graphs = Graphs()
    compile_layers(model, graphs)
    twin = copy.deepcopy(model)
    assert twin.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    logits = twin(input_ids=tokens(5), use_cache=False).logits
    assert graphs.run == 0
    assert Counter((logits != 0).flatten().tolist())[True] > 0
