"""What each process of a script does for test_packed_trainer.py: torchrun script_on_ranks.py FOLDER KIND.

KIND: packed, trl, or fault, a packed step whose check fails in the last process alone. Its results: FOLDER/KIND-N.pt.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rollouts import model_of
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from memhead.integrations import trl as memhead_trl
from recipes.models.tokenizers import character_tokenizer
from recipes.packed_trainer import PackedGRPOTrainer
from recipes.training import step_check


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids) > 2 and ids[1] % 2 == 0) for ids in completion_ids]


def fail(*_: Any) -> dict[str, Any]:
    return {"passed": False, "packed": {}}


def main(folder: Path, kind: str) -> None:
    state = PartialState(cpu=True)
    if kind == "fault" and state.is_last_process:
        step_check.check_step = fail
    if kind == "trl":
        memhead_trl.install()  # TRL's own head needs a GPU
    set_seed(0)
    trainer = (GRPOTrainer if kind == "trl" else PackedGRPOTrainer)(
        model=model_of("llama").float(),
        reward_funcs=reward,
        args=GRPOConfig(
            str(folder / kind), max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1,
            per_device_train_batch_size=4, gradient_accumulation_steps=4, num_generations=8, max_completion_length=6,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"{n}+{n % 3}=" for n in range(32)]}),
        processing_class=character_tokenizer("0123456789+-*=>abcdef"),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    found = {
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        "why": getattr(trainer, "why_not_packed", None),
        "said": [str(warning.message) for warning in said if "packed step" in str(warning.message)],
    }
    torch.save(found, folder / f"{kind}-{state.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
