"""Every loss of TRL's GRPO, with and without everything that reads log-probabilities or entropies.

In float64, where two runs that compute the same thing stay together to the last digits whatever the
optimizer makes of them, and a run that computes something else does not.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from grpo_runs import assert_same_trajectory, configurations, train

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
LEVELS = ("token", "sequence")
OPTIONS = {
    "delta": {"delta": 1.5, "epsilon": 0.01},
    "top_entropy_quantile": {"top_entropy_quantile": 0.4},
    "entropy_coef": {"entropy_coef": 0.05},
    "adaptive_entropy": {
        "use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 2.0, "entropy_coef_delta": 0.01,
    },
    "entropy_of_the_uncertain": {"entropy_coef": 0.05, "top_entropy_quantile": 0.4},
    "off_policy_mask": {"off_policy_mask_threshold": 0.001},
    "bias_corrected_kl": {"use_bias_correction_kl": True, "beta": 0.2},
    "temperature": {"temperature": 0.7},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "fp32_head": {"cast_lm_head_to_fp32": False, "scale_rewards": "batch"},
}  # fmt: skip


def assert_exact(path, folder, **settings):
    settings = {"max_steps": 2, "model_init_kwargs": {"dtype": torch.float64}} | settings
    ours, plain = (train(path, folder, impl, **settings) for impl in ("memhead", "full"))
    assert_same_trajectory(ours, plain, loss=1e-6, loss_floor=1e-6, parameters=1e-9)
    assert ours.calls == plain.calls > 0


# Of the eight combinations with each loss four, in which every pair of settings occurs.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("iterations", "beta", "lora"), [(1, 0.0, False), (1, 0.04, True), (2, 0.0, True), (2, 0.04, False)]
)
@pytest.mark.parametrize(("loss_type", "level"), itertools.product(LOSSES, LEVELS))
def test_every_loss(checkpoints, tmp_path, loss_type, level, iterations, beta, lora):
    assert_exact(
        checkpoints["llama"], tmp_path, loss_type=loss_type, importance_sampling_level=level,
        num_iterations=iterations, beta=beta, lora=lora,
    )  # fmt: skip


# Every option on Llama, and on half of the others; every one of those with half of the options.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for row, name in enumerate(configurations())
        for column, option in enumerate(OPTIONS)
        if name == "llama" or (row + column) % 2
    ],
)
def test_every_option_on_half_of_the_architectures(checkpoints, tmp_path, name, option):
    assert_exact(checkpoints[name], tmp_path, num_iterations=2, **OPTIONS[option])


@pytest.mark.parametrize("name", configurations())
def test_every_architecture(checkpoints, tmp_path, name):
    assert_exact(checkpoints[name], tmp_path, num_iterations=2, beta=0.04, entropy_coef=0.05)
