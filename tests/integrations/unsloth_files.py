"""What a run with the loader unsloth reads: a checkpoint, questions, a reward, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from recipes.models.tokenizers import character_tokenizer

CHARACTERS = "0123456789 #How much is+?\n"

REWARD = '''
def evens(completions, **columns):
    """Even digits, the first counting most: something that every group disagrees on."""
    return [sum((c in "02468") / (1 + i) for i, c in enumerate(text)) for text in completions]
'''

CONFIG = """\
model:
  loader: unsloth
  name: {folder}/checkpoint
  dtype: float32
  max_seq_length: 64
task:
  name: gsm8k
  dataset: {folder}/questions
  prompt: plain
  system_prompt: ""
  rewards:
    run_rewards.evens: 1.0
grpo:
  max_steps: 10
  per_device_train_batch_size: 8
  num_generations: 4
  num_iterations: 2
  max_completion_length: 5
  learning_rate: 0.1
  lr_scheduler_type: constant
  optim: sgd
  beta: 0.04
lora:
  r: 4
  alpha: 8
  target_modules: [q_proj, v_proj, up_proj]
run:
  output_root: {folder}/runs
  evaluation:
    size: 8
    every: 5
"""


def write_files(folder: Path) -> Path:
    """Everything into ``folder``; returns the configuration's path."""
    tokenizer = character_tokenizer("".join(sorted(set(CHARACTERS))))
    set_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    # Wide enough for a policy that is far from uniform, so that what a head gets wrong shows.
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, **shape, **tokens
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    (folder / "questions").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"How much is {i}+{i}?", "answer": f"{i}+{i}#### {2 * i}"} for i in range(16)]
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / "questions" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (folder / "run_rewards.py").write_text(REWARD, encoding="utf-8")
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(folder=folder), encoding="utf-8")
    return path
