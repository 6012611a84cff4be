"""Export: a merged adapter is proven against base and adapter, and a useless one is refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from recipes.export import main
from recipes.models import character_tokenizer


def run_folder(tmp_path, dtype=torch.float32, learnt=True):
    """A run's folder as training leaves it: an adapter in final/, figures and config."""
    tokenizer = character_tokenizer("0123456789")
    base = tmp_path / "base"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).to(dtype).save_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(r=4, target_modules="all-linear")
    )
    if learnt:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    run = tmp_path / "run"
    model.save_pretrained(run / "final")
    tokenizer.save_pretrained(run / "final")
    (run / "summary.json").write_text(json.dumps({"steps": 7, "accuracy_after": 0.25}))
    (run / "config.yaml").write_text("model:\n  loader: scratch\n")
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_are_proven_and_load_alone(tmp_path, capsys, dtype):
    run = run_folder(tmp_path, dtype)
    assert main([str(run), "--merge"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["changed_weights"] == proof["adapted_weights"] == 14
    assert proof["logits_error"] <= proof["allowed"] < proof["adapter_effect"]
    assert AutoModelForCausalLM.from_pretrained(run / "merged").config.num_hidden_layers == 2
    card = (run / "merged" / "README.md").read_text()
    assert "| accuracy after | 0.25 |" in card
    assert "loader: scratch" in card
    assert main([str(run), "--merge"]) == 1
    assert "remove it to merge again" in capsys.readouterr().err


def test_an_adapter_that_changes_nothing_is_refused(tmp_path, capsys):
    run = run_folder(tmp_path, learnt=False)
    assert main([str(run), "--merge"]) == 1
    assert "equal the base" in capsys.readouterr().err
    assert not (run / "merged").exists()


def test_the_base_may_be_named(tmp_path, capsys):
    run = run_folder(tmp_path)
    place = run / "final" / "adapter_config.json"
    quantised = {**json.loads(place.read_text()), "base_model_name_or_path": "its-4bit-copy"}
    place.write_text(json.dumps(quantised))
    assert main([str(run), "--merge", "--base", str(tmp_path / "base")]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["changed_weights"] == 14
    assert proof["logits_error"] <= proof["allowed"] < proof["adapter_effect"]


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path)]) == 1
    assert "holds no folder final" in capsys.readouterr().err
    run = run_folder(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(run), "--gguf"]) == 1
    assert "add --merge" in capsys.readouterr().err
    assert main([str(run), "--merge", "--gguf"]) == 1
    assert "convert_hf_to_gguf.py on the PATH" in capsys.readouterr().err


def test_an_adapter_without_a_base_is_refused(tmp_path, capsys):
    run = run_folder(tmp_path)
    place = run / "final" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "base_model_name_or_path": None}))
    assert main([str(run), "--merge"]) == 1
    assert "base_model_name_or_path is empty" in capsys.readouterr().err
