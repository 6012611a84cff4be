"""Adapters handed to vLLM as adapters: the base stays to the bit, what vLLM samples with is what is trained."""

import hashlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import ready
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from tiny import digits_reward, saved_llama
from transformers import AutoModelForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer
from vllm_colocated import LLM, vllm_stand_in

from memhead.integrations import trl as memhead_trl
from recipes.config.load import load_config
from recipes.problems import ConfigError
from recipes.training.checkpoints import guarded
from recipes.training.packed_step import packed
from recipes.training.vllm_engine import EngineWithAdapter, engine, engine_of_adapter, refuse, write_adapter

CONFIG = Path(__file__).parents[3] / "configs" / "llama3.2_1b_gsm8k.yaml"
HERE = ("grpo.use_vllm=true", "grpo.vllm_mode=colocate")
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(*overrides):
    all_of_them = [*HERE, "model.dtype=auto", "lora.r=4", "lora.alpha=8", *overrides]
    return load_config(CONFIG, list({one.partition("=")[0]: one for one in all_of_them}.values()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with its tokenizer, in float32."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = saved_llama(place, num_key_value_heads=2)
    return place, tokenizer


def trainer_of(saved, folder, kind=GRPOTrainer, dtype=torch.float32, lora=True, **overrides):
    place, tokenizer = saved
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    settings = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 6, "learning_rate": 5e-2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "use_vllm": True,
        "vllm_mode": "colocate", "vllm_importance_sampling_mode": "token_truncate", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return guarded(kind)(
        model=model,
        reward_funcs=[digits_reward],
        args=GRPOConfig(**{**settings, **overrides}),
        train_dataset=Dataset.from_dict({"prompt": [f"{i:02d}>"[i % 2 :] for i in range(64)]}),
        processing_class=tokenizer,
        peft_config=config().lora.peft_config() if lora else None,
    )


def sums(model):
    """sha256 of every tensor of the base, by name."""
    return {
        name: hashlib.sha256(p.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }


def tune(model):
    """Adapters as after some training: B is zero before it."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(0.2 * torch.randn(p.shape, generator=generator))


@pytest.fixture
def head():
    with memhead_trl.install() as handle:
        yield handle


def test_a_hundred_syncs_leave_every_base_tensor_as_it_was(saved, tmp_path, head):
    with vllm_stand_in() as made, engine(config()):
        trainer = trainer_of(saved, tmp_path, dtype=torch.bfloat16)
        before = sums(trainer.model)
        for _ in range(100):
            tune(trainer.model)
            trainer.vllm_generation.sync_weights()
    assert len(before) > 15
    assert sums(trainer.model) == before
    assert sums(made[0].base) == sums(AutoModelForCausalLM.from_pretrained(saved[0], dtype="auto"))
    handed = [name for call, name in made[0].calls if call == "add_lora"]
    assert len(set(handed)) == 100  # a name of its own each, so that nothing cached of another one is used
    assert list(made[0].loaded) == [100]


def test_trls_way_would_change_them(saved, tmp_path, head):
    """The merge path, which must not be taken."""
    with vllm_stand_in() as made:
        trainer = trainer_of(saved, tmp_path, dtype=torch.bfloat16)
        tune(trainer.model)
        before = sums(trainer.model)
        trainer.vllm_generation.sync_weights()
    after = sums(trainer.model)
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.split(".")[-3] in ADAPTED
    }
    assert made[0].enable_lora is False


@pytest.mark.parametrize("kind", [GRPOTrainer, packed(GRPOTrainer)], ids=["trl", "packed"])
def test_what_vllm_samples_with_is_what_is_trained(saved, tmp_path, head, kind):
    with vllm_stand_in() as made, engine(config("lora.use_rslora=true")):
        trainer = trainer_of(saved, tmp_path, kind)
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(entries) == 3
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-4 for entry in entries)
    (llm,) = made
    assert [call for call, _ in llm.calls] == ["add_lora"] * 3
    assert (llm.enable_lora, llm.max_lora_rank, llm.max_loras) == (True, 8, 1)
    assert any(delta.abs().max() > 1e-3 for delta in llm.loaded[3].values())


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_vllm_has_room_for_the_rank_and_no_more_than_it_must(rank, room):
    assert engine_of_adapter(config(f"lora.r={rank}"))["max_lora_rank"] == room


def test_asleep_the_base_is_kept(saved, tmp_path, head):
    with vllm_stand_in() as made, engine(config()):
        trainer = trainer_of(saved, tmp_path, vllm_enable_sleep_mode=True)
        trainer.train()
    calls = made[0].calls
    assert ("sleep", 2) not in calls
    assert calls.count(("sleep", 1)) == 4  # at the start, and after each rollout
    assert ("wake_up", ["weights"]) in calls
    assert all(
        e["sampling/sampling_logp_difference/max"] < 1e-4 for e in trainer.state.log_history if "reward" in e
    )


SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
KILLED = """
import os, signal, sys
from pathlib import Path
from test_vllm_engine import *
from transformers import AutoTokenizer, TrainerCallback

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

place, folder = map(Path, sys.argv[1:])
with memhead_trl.install(), vllm_stand_in(), engine(config()):
    saved = place, AutoTokenizer.from_pretrained(place)
    trainer = trainer_of(saved, folder, packed(GRPOTrainer), torch.bfloat16, **SETTINGS)
    trainer.add_callback(Kill())
    trainer.train()
"""


def test_killed_and_resumed_is_the_same_run(saved, tmp_path, head):
    """Killed in its fourth step, it goes on from the second's checkpoint: adapters and base as of a run without it."""

    def trained(name, checkpoint=None):
        with vllm_stand_in() as made, engine(config()):
            trainer = trainer_of(saved, tmp_path / name, packed(GRPOTrainer), torch.bfloat16, **SETTINGS)
            begun = adapters(trainer)
            trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4
        assert [call for call, _ in made[0].calls] == ["add_lora"] * (2 if checkpoint else 4)
        return begun, adapters(trainer), sums(trainer.model)

    def adapters(trainer):
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}

    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    killed = ready.python("-c", KILLED, saved[0], tmp_path / "killed", env={**os.environ, "PYTHONPATH": path})
    assert killed.wait(120) == -signal.SIGKILL, killed.communicate()
    checkpoint = tmp_path / "killed" / "checkpoint-2"
    assert [place.name for place in checkpoint.parent.glob("checkpoint-*")] == [checkpoint.name]
    begun, expected, base = trained("whole")
    _, found, base_again = trained("killed", str(checkpoint))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], begun[name]) for name in begun)
    assert base == base_again


def test_full_fine_tuning_sends_weights_as_before(saved, tmp_path, head):
    with vllm_stand_in() as made, engine(load_config(CONFIG, [*HERE, "lora=null", "model.dtype=auto"])):
        trainer = trainer_of(saved, tmp_path, lora=False, learning_rate=1e-2)
        trainer.train()
    assert made[0].enable_lora is False
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-4 for entry in entries)


def test_options_of_the_engine(saved, tmp_path, head):
    asked = config("model.vllm_engine={hf_overrides: {head_dtype: float32}, max_num_batched_tokens: 8192}")
    with vllm_stand_in() as made, engine(asked):
        trainer_of(saved, tmp_path)
    assert made[0].hf_overrides == {"head_dtype": "float32"}
    assert made[0].max_num_batched_tokens == 8192


def test_what_makes_it_sample_faster_reaches_vllm(saved, tmp_path, head, monkeypatch):
    """docs/speed.md: no text, which neither TRL nor a reward misses, and no more sequences at once than graphs."""
    asked = config("grpo.generation_kwargs={detokenize: false}", "model.vllm_engine={max_num_seqs: 4}")
    seen, generate = [], LLM.generate

    def noted(llm, prompts, sampling_params, **options):
        seen.append(sampling_params)
        return generate(llm, prompts, sampling_params, **options)

    monkeypatch.setattr(LLM, "generate", noted)
    with vllm_stand_in() as made, engine(asked):
        trainer = trainer_of(saved, tmp_path, generation_kwargs=asked.grpo["generation_kwargs"])
        trainer.train()
    assert made[0].max_num_seqs == 4
    assert [(one.detokenize, one.logprobs) for one in seen] == [(False, 0)] * 3
    assert any(entry["reward"] > 0 for entry in trainer.state.log_history if "reward" in entry)


def test_a_server_or_no_vllm_is_left_alone():
    from trl.trainer import grpo_trainer

    theirs = grpo_trainer.VLLMGeneration
    for overrides in (["grpo.vllm_mode=server"], ["grpo.use_vllm=false"]):
        with engine(config(*overrides)):
            assert grpo_trainer.VLLMGeneration is theirs
    with engine(config()):
        assert grpo_trainer.VLLMGeneration is not theirs
    assert grpo_trainer.VLLMGeneration is theirs


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"use_dora": True}, "lora.use_dora"),
        ({"bias": "all"}, "lora.bias"),
        ({"bias": "lora_only"}, "lora.bias"),
        ({"lora_bias": True}, "lora.lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save"),
        ({"r": 1024}, "lora.r"),
        ({"rank_pattern": {"q_proj": 2}}, "lora.rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "lora.alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "lora.init_lora_weights"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, "lora.init_lora_weights"),
        ({"trainable_token_indices": [1]}, "lora.trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "lora.alora_invocation_tokens"),
        ({"layer_replication": [(0, 1)]}, "lora.layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "lora.target_parameters"),
    ],
)
def test_refused_by_name(options, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        refuse(LoraConfig(**{"r": 4, "target_modules": ADAPTED, **options}))
    refuse(LoraConfig(r=4, target_modules=ADAPTED, use_rslora=True))


# Of a LoraConfig: what is checked above or by its value, and what changes neither base nor product of an adapter.
COMPUTED = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern",
    "use_dora", "use_rslora",
}  # fmt: skip
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core",
    "peft_type", "peft_version", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
}  # fmt: skip
OF_A_BEGINNING = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}  # told by init_lora_weights
FURTHER = sorted(
    set(LoraConfig.__dataclass_fields__) - COMPUTED - HARMLESS - OF_A_BEGINNING - {"qalora_group_size"}
)


@pytest.mark.parametrize("name", FURTHER)
def test_whatever_else_peft_has_is_refused(name):
    """Also what PEFT has added since: vLLM would sample by an adapter without it."""
    adapter = LoraConfig(r=4, target_modules=ADAPTED)
    setattr(adapter, name, [1])
    with pytest.raises(ConfigError, match=f"lora\\.{name}"):
        refuse(adapter)


def test_refused_when_the_configuration_is_read():
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save: vLLM takes adapters alone"):
        config("lora.modules_to_save=[lm_head]")
    with pytest.raises(ConfigError, match=r"model\.vllm_engine: is for vLLM"):
        config("grpo.use_vllm=false", "model.vllm_engine={seed: 1}")
    with pytest.raises(ConfigError, match=r"model\.vllm_engine\.enable_lora: is not set here"):
        config("model.vllm_engine={enable_lora: true}")


def test_the_base_is_the_revision_and_dtype_that_is_trained_on(saved, tmp_path, head):
    with vllm_stand_in() as made, engine(config("model.dtype=bfloat16", "model.revision=abc")):
        trainer_of(saved, tmp_path, dtype=torch.bfloat16)
    assert (made[0].dtype, made[0].revision) == ("bfloat16", "abc")


def test_no_adapter_yet():
    with pytest.raises(RuntimeError, match="before it had an adapter"):
        EngineWithAdapter(SimpleNamespace()).generate([])


def test_the_files_are_pefts(saved, tmp_path):
    """PEFT itself reads them back, in the dtype that was asked for."""
    from peft import PeftModel

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved[0]), config().lora.peft_config())
    tune(model)
    write_adapter(model, tmp_path, torch.bfloat16)
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved[0]), tmp_path)
    for (name, p), (_, other) in zip(model.named_parameters(), read.named_parameters(), strict=True):
        torch.testing.assert_close(
            other, p.to(torch.bfloat16).float() if "lora_" in name else p, rtol=0, atol=0
        )
