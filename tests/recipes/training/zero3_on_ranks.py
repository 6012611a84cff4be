"""What each process does for test_zero3.py: torchrun zero3_on_ranks.py FOLDER.

TRL's fused forward with memhead in its slot, under DeepSpeed's ZeRO-3 engine: gradients against the model in one piece.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rollouts import model_of
from trl.trainer.utils import add_fused_lm_head

from memhead.integrations import trl as memhead_trl

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
CASES = [(frozen, entropy) for frozen in (True, False) for entropy in (False, True)]


def build(frozen: bool) -> Any:
    """A Llama in float32 whose head is frozen, or all of it trained."""
    model = model_of("llama").float()
    model.lm_head.weight.requires_grad_(not frozen)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def loss(model: Any, ids: torch.Tensor, entropy: bool) -> torch.Tensor:
    found = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), fused_lm_head=True)
    return found.log_probs.sum() + (found.entropy.sum() if entropy else 0.0)


def main(folder: Path) -> None:
    import deepspeed
    import deepspeed.comm.torch
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations import HfDeepSpeedConfig

    # Two processes that compile it for the first time at once wait for each other.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(3, 24, (2 * world, 9), generator=torch.Generator().manual_seed(5))
    errors = {}
    with memhead_trl.install():
        expected, models = {}, {}
        for case in CASES:
            whole = build(case[0])
            (loss(whole, ids, case[1]) / world).backward()
            expected[case] = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
            models[case] = build(case[0])
        alive = HfDeepSpeedConfig(CONFIG)  # from here on TRL knows that parameters are in parts
        for case, model in models.items():
            trained = [p for p in model.parameters() if p.requires_grad]
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=CONFIG
            )
            engine.backward(loss(engine, ids[2 * rank : 2 * rank + 2], case[1]))
            found = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
            assert found.keys() == expected[case].keys()
            errors[str(case)] = max(
                float((found[n] - grad).norm() / grad.norm()) for n, grad in expected[case].items()
            )
    del alive
    (folder / f"errors-{rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
