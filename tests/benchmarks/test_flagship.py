"""The benchmark of a large configuration's life: its model, its commands, its table."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.flagship_gpu import coin, commands, make_model, table
from recipes.config.load import load_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("flagship")
    make_model(root / "model", toy=True)
    return root


def test_the_tokenizer_reads_whatever_the_model_can_say(place):
    tokenizer, config = (kind.from_pretrained(place / "model") for kind in (AutoTokenizer, AutoConfig))
    assert len(tokenizer) == config.vocab_size == 600
    text = "Ann has 17 nuts"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # fillers are never written
    assert "Filler" in tokenizer.decode([599])


def test_a_model_that_ends_its_texts(tmp_path):
    """After each token with about the probability that was asked for; left alone, one in 600."""
    make_model(tmp_path / "ends", toy=True, ends=0.02)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "ends", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ends")
    ids = torch.randint(found.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ends = found(ids).logits.softmax(-1)[..., tokenizer.eos_token_id]
    assert 0.01 < ends.mean() < 0.04


def test_a_group_differs_by_its_texts():
    said = [[{"role": "assistant", "content": str(n)}] for n in range(64)]
    assert 16 < sum(coin(said)) < 48
    assert coin(said) == coin(said)


def test_the_commands_are_ones_that_a_run_takes(place):
    name = "configs/llama3.2_1b_gsm8k.yaml"  # Unsloth's would change TRL for the tests that follow
    then = ["resume", "evaluate", "export"]
    options = Namespace(config=name, then=then, overrides=["grpo.temperature=0.5"], steps=3, evaluated=5)
    found = commands(options, place)
    assert list(found) == ["train", *then]
    config = load_config(name, [word for word in found["resume"] if "=" in word])
    assert config.grpo["max_steps"] == 4
    assert config.grpo["temperature"] == 0.5
    assert config.run.evaluation.size == 5
    assert config.run.save_every == 2
    assert "grpo.max_steps=3" in found["train"]
    assert config.task.options.rewards == {"benchmarks.flagship_gpu.coin": 1.0}


def test_what_went_wrong_is_in_the_table():
    found = {
        "train": {"status": 0, "seconds": 3.2},
        "resume": {"status": None, "seconds": 9},
        "export": {"status": 2, "seconds": 1},
    }
    record = {
        "config": "c",
        "device": "d",
        "torch": "t",
        "commands": found,
        "step_seconds": [{"forward": 1.5}],
        "mean_length": [93.4],
    }
    record["memory_mib"] = {"generation": [2048.0, 1024.0], "scoring": [1024.0, None]}
    lines = table(record).splitlines()
    assert "| train | well | 3 |" in lines
    assert "| resume | its time was over | 9 |" in lines
    assert "| export | status 2 | 1 |" in lines
    assert "| generation | 2.00 | 1.00 | 0.50 |" in lines
    assert "| scoring | 1.00 | – | – |" in lines
    assert "step 1: forward 1.50; completions 93 tokens long" in lines
