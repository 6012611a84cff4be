"""What keeps a vLLM from starting is said with the run's settings: the messages of vLLM 0.26 and of Unsloth itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.config.load import load_config
from recipes.training.memory import explained
from recipes.training.session import RunError
from recipes.training.vllm_faults import VllmStart

CONFIGS = Path(__file__).parents[3] / "configs"
HERE = ("grpo.use_vllm=true", "grpo.vllm_mode=colocate", "grpo.vllm_gpu_memory_utilization=0.9")
TAKEN = ValueError(
    "Free memory on device cuda:0 (32.20/79.19 GiB) on startup is less than desired GPU memory utilization (0.9, 71.27"
    " GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
NO_CACHE = ValueError(
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine"
)
TOO_LONG = ValueError(
    "To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is needed, which is larger"
    " than the available KV cache memory (2.1 GiB). Based on the available memory, the estimated maximum model length"
    " is 17184. Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."
)
RACE = AssertionError(
    "Error in memory profiling. Initial free memory 137.1 GiB, current free memory 138.4 GiB. This happens when other"
    " processes sharing the same container release GPU memory while vLLM is profiling during initialization."
)
BY_UNSLOTH = """
import unsloth
from unsloth_zoo import vllm_utils
print(vllm_utils._memory_profiling_race_message(AssertionError("Error in memory profiling."), 1, True), end="\\0")
print(vllm_utils._expandable_segments_standby_message(RuntimeError("not supported with expandable segments")), end="")
"""


@pytest.fixture
def transformers_run(without_unsloth):
    return load_config(CONFIGS / "llama3.2_1b_gsm8k.yaml", [*HERE])


@pytest.fixture
def unsloth_run(without_unsloth):
    return load_config(CONFIGS / "llama3.1_8b_gsm8k.yaml", ["model.gpu_memory_utilization=0.7"])


def told(error, config):
    """The page that a start which fails by this error becomes, as lines."""
    with pytest.raises(VllmStart) as raised, explained(config):
        raise error
    return str(raised.value).splitlines()


@pytest.mark.parametrize(
    ("error", "meaning", "remedies"),
    [
        (
            TAKEN,
            "its share of the card is not free",
            ["grpo.vllm_gpu_memory_utilization=0.4", "end what else uses the card"],
        ),
        (
            NO_CACHE,
            "the weights take all of its share of the card",
            ["grpo.vllm_gpu_memory_utilization higher than 0.9", "model.load_in_4bit=true"],
        ),
        (
            TOO_LONG,
            "its share of the card has no room for the longest sequence",
            [
                "grpo.vllm_gpu_memory_utilization higher than 0.9",
                "grpo.vllm_max_model_length=17184 at most, which prompt and completion must fit into",
            ],
        ),
        (
            RACE,
            "another process let go of memory of the card while vLLM measured it",
            ["the same command again", "end what else uses the card"],
        ),
    ],
)
def test_what_vllm_says_is_told_by_the_runs_settings(transformers_run, error, meaning, remedies):
    lines = told(error, transformers_run)
    assert lines[0] == f"vLLM did not start: {meaning}"
    assert lines[1] == f"  it says  {error}"
    assert lines[-1].endswith("troubleshooting.md#driver-cuda-and-vllm")
    for number, remedy in enumerate(remedies, 1):
        assert lines[2 + number].startswith(f"  {number}. {remedy}")
    assert len(lines) == 4 + len(remedies)


def test_by_unsloths_settings_where_unsloth_starts_it(unsloth_run):
    assert told(TAKEN, unsloth_run)[3] == "  1. model.gpu_memory_utilization=0.4"
    assert told(NO_CACHE, unsloth_run)[3] == "  1. model.gpu_memory_utilization higher than 0.7"
    assert told(TOO_LONG, unsloth_run)[4].startswith("  2. model.max_seq_length=17184 at most")


def test_a_message_without_figures(transformers_run):
    taken = ValueError("Free memory on startup is less than desired GPU memory utilization")
    assert told(ValueError(f"it {str(taken)[12:]}"), transformers_run)[3] == (
        "  1. grpo.vllm_gpu_memory_utilization lower than 0.9"
    )
    assert told(ValueError("To serve at least one request"), transformers_run)[4].startswith(
        "  2. grpo.vllm_max_model_length smaller, which"
    )


def test_what_is_done_already_is_not_advised(without_unsloth):
    for bits in (4, 8):
        smaller = load_config(CONFIGS / "llama3.2_1b_gsm8k.yaml", [*HERE, f"model.load_in_{bits}bit=true"])
        assert told(NO_CACHE, smaller)[3:-1] == ["  1. grpo.vllm_gpu_memory_utilization higher than 0.9"]
    everything = load_config(CONFIGS / "llama3.2_1b_gsm8k.yaml", [*HERE, "lora=null"])
    assert told(NO_CACHE, everything)[3:-1] == ["  1. grpo.vllm_gpu_memory_utilization higher than 0.9"]


def test_a_share_that_nobody_has_set(without_unsloth):
    config = load_config(CONFIGS / "llama3.1_8b_gsm8k.yaml", ["model.gpu_memory_utilization=null"])
    assert told(NO_CACHE, config)[3] == "  1. model.gpu_memory_utilization higher"


@pytest.mark.slow
def test_unsloths_own_words_are_not_taken_for_a_lack_of_memory(unsloth_run):
    """Both say "NOT an out of memory error", which once was read as one."""
    environment = os.environ | {"UNSLOTH_DISABLE_STATISTICS": "1"}
    words = [sys.executable, "-c", BY_UNSLOTH]
    child = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    race, segments = child.stdout[child.stdout.index("Unsloth: vLLM could not") :].split("\0")
    assert "NOT an out of memory error" in race
    assert "NOT an out of memory error" in segments
    lines = told(RuntimeError(race), unsloth_run)
    assert lines[0].endswith("another process let go of memory of the card while vLLM measured it")
    assert lines[3] == "  1. the same command again"
    lines = told(RuntimeError(segments), unsloth_run)
    assert lines[0].endswith("it cannot sleep with expandable segments")
    assert "PYTORCH_CUDA_ALLOC_CONF" in lines[3]
    assert lines[4] == "  2. model.vllm_standby=false"


def test_without_a_vllm_here_and_after_an_explanation_nothing_is_explained(transformers_run):
    for kind in (["grpo.use_vllm=false"], ["grpo.use_vllm=true", "grpo.vllm_mode=server"]):
        other = load_config(CONFIGS / "llama3.2_1b_gsm8k.yaml", kind)
        assert_untold(other)
    alone = ["model.fast_inference=false", "model.vllm_standby=false", "model.gpu_memory_utilization=null"]
    assert_untold(load_config(CONFIGS / "llama3.1_8b_gsm8k.yaml", alone))
    said = RunError(f"a reward failed: {TAKEN}")
    with pytest.raises(RunError) as raised, explained(transformers_run):
        raise said
    assert raised.value is said


def assert_untold(config):
    with pytest.raises(AssertionError) as raised, explained(config):
        raise RACE
    assert raised.value is RACE
