"""The bins that PackedGRPOTrainer plans: those of a run with the same settings, and where it plans none.

What becomes of them in a training is in tests/recipes/training/test_planned_bins.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOConfig

from memhead.integrations import trl as memhead_trl
from recipes.config.load import load_config
from recipes.models.attention import put_before
from recipes.plan import script
from recipes.plan.plan import GIB, RESERVE, measure, planned_tokens, token_budget
from recipes.plan.script import setting_of, unknown
from recipes.plan.setting import Setting
from recipes.training.planned_bins import bins_of, room

LLAMA_8B, LLAMA_1B = "unsloth/meta-Llama-3.1-8B-Instruct", "unsloth/Llama-3.2-1B-Instruct"
SIZES = {
    "vocab_size": 4003, "hidden_size": 192, "intermediate_size": 416, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0,
}  # fmt: skip
SMALL = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 48},
    "mistral": {"head_dim": 32},
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "alpha": 16, "target_modules": LAYERS}
PROMPT, COMPLETION = 200, 300


@pytest.fixture(autouse=True)
def _head():
    with memhead_trl.install():
        yield


@pytest.fixture
def model_of(tmp_path, without_unsloth):
    """The name of a model and its configuration: in the table, or small and in a folder."""

    def named(kind):
        if kind not in SMALL:
            return kind
        AutoConfig.for_model(kind, **SIZES, **SMALL[kind], dtype="bfloat16").save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return named


def run_of(folder, name, *, lora, dtype="bfloat16", checkpointing=True, head=None, **grpo):
    """The configuration of the run that these settings make."""
    given = {
        "model": {
            "loader": "transformers", "name": name, "dtype": dtype, "max_seq_length": PROMPT + COMPLETION,
            "gradient_checkpointing": checkpointing, "compile_layers": False,
        },
        "task": {"name": "gsm8k"},
        "grpo": {
            "per_device_train_batch_size": 8, "num_generations": 8, "gradient_accumulation_steps": 8,
            "max_completion_length": COMPLETION, **grpo,
        },
        "lora": LORA if lora else None,
        "head": head or {},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(given))
    return load_config(path)


def lora_of(**changed):
    return LoraConfig(**{"r": 16, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **changed})


def trainer_of(folder, config, model=None):
    """What a script with the same settings has when its first loss is due; its weights are on the meta device."""
    grpo, dtype = config.grpo, getattr(torch, config.model.dtype)
    if model is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(script_config(config.model.name), dtype=dtype)
        if config.lora is not None:
            model = get_peft_model(model, lora_of())
    names = (
        "per_device_train_batch_size", "num_generations", "gradient_accumulation_steps", "steps_per_generation",
        "max_completion_length", "beta", "optim", "cache_implementation",
    )  # fmt: skip
    arguments = GRPOConfig(
        str(folder), report_to="none", use_cpu=True, gradient_checkpointing=config.model.gradient_checkpointing,
        **{name: grpo[name] for name in names},
    )  # fmt: skip
    return SimpleNamespace(
        model=model,
        args=arguments,
        num_generations=arguments.num_generations,
        ref_model=object() if grpo["beta"] and config.lora is None else None,
        accelerator=SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16"),
        optimizer=torch.optim.AdamW([torch.zeros(1, requires_grad=True)]),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        _varlen=True,
    )


def script_config(name):
    from recipes.plan.shapes import _TABLE

    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return AutoConfig.for_model(**table[name]) if name in table else AutoConfig.from_pretrained(name)


@pytest.fixture
def card(monkeypatch):
    """A GPU of some GiB, on which the model lies and nothing else but `others` GiB."""

    def lay(setting, gib, others=0.0, there=("parameters", "reference model", "adapter and saved modules")):
        parts = measure(setting).parts
        free = (gib - others) * GIB - sum(parts[part] for part in there) - RESERVE
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(gib * GIB)))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    return lay


def runs_own(config):
    """The run's setting, but for the cache of sampling, which no bin depends on, and with the loaded model's dtype."""
    found = Setting.of(config, device=True)
    return replace(found, wide_cache=False, shape=replace(found.shape, dtype=config.model.dtype))


CASES = [
    (LLAMA_8B, {"lora": True}), (LLAMA_8B, {"lora": True, "checkpointing": False, "beta": 0.04}),
    (LLAMA_1B, {"lora": False, "dtype": "float32", "beta": 0.04}),
    *((kind, {"lora": lora, "dtype": dtype, "checkpointing": checkpointing, "beta": beta})
      for kind, lora, dtype, checkpointing, beta in (
        ("llama", True, "bfloat16", True, 0.0), ("llama", False, "float32", False, 0.04),
        ("qwen2", False, "bfloat16", True, 0.04), ("qwen2", True, "float16", False, 0.0),
        ("qwen3", True, "float32", False, 0.04), ("qwen3", False, "float32", True, 0.0),
        ("mistral", True, "bfloat16", False, 0.0), ("mistral", False, "bfloat16", False, 0.0))),
    ("llama", {"lora": True, "head": {"impl": "full"}}), ("llama", {"lora": True, "head": {"chunk": 64}}),
    ("llama", {"lora": True, "steps_per_generation": 16, "num_generations": 4}),
    ("llama", {"lora": False, "optim": "adamw_torch", "cache_implementation": "static"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_setting_and_bins_are_a_runs(tmp_path, model_of, card, kind, settings):
    config = run_of(tmp_path, model_of(kind), **settings)
    trainer, expected = trainer_of(tmp_path, config), runs_own(config)
    memhead_trl.installed().uninstall()
    with memhead_trl.install(config.head.impl, chunk=config.head.chunk):
        assert list(unknown(trainer)) == []
        assert setting_of(trainer, PROMPT) == expected
        resting = measure(expected).phases["optimizer"] / GIB
        found = set()
        for spare in (0.95, 1.3, 3.0, 8.0, 40.0):  # GiB beside what rests: little, some, enough
            gib = resting + spare
            card(expected, gib)
            budget = token_budget(config, expected, int(gib * GIB))
            assert bins_of(trainer, None, PROMPT).tokens == pytest.approx(budget, abs=1)
            assert str(bins_of(trainer, None, PROMPT)).endswith(" tokens, planned")
            found.add(budget)
        assert len(found) > 1


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(tmp_path, model_of, card, bits):
    pytest.importorskip("bitsandbytes")
    config = run_of(tmp_path, model_of("llama"), lora=True)
    model = AutoModelForCausalLM.from_config(script_config(config.model.name), dtype=torch.bfloat16)
    model.save_pretrained(config.model.name)
    kind = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        config.model.name, quantization_config=kind, dtype=torch.bfloat16
    )
    trainer = trainer_of(tmp_path, config, get_peft_model(model, lora_of()))
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)  # as TRL does
    asked = config.model.model_copy(update={f"load_in_{bits}bit": True})
    expected = runs_own(config.model_copy(update={"model": asked}))
    assert (expected.precision.quantised, expected.precision.adapter) == (f"{bits}bit", 2)
    found = setting_of(trainer, PROMPT)
    packed = replace(
        found.trained, adapted=expected.trained.adapted
    )  # counted in quantised bytes; no bin asks
    assert list(unknown(trainer)) == []
    assert replace(found, trained=packed, shape=expected.shape) == expected
    assert found.shape == replace(expected.shape, quantised=f"{bits}bit")
    for name, p in model.named_parameters():  # as peft.prepare_model_for_kbit_training leaves them
        if p.dtype == torch.bfloat16 and ".lora_" not in name:
            p.data = p.data.float()
    assert reasons(trainer) == ["no formula covers quantised weights beside others in float32"]
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert reasons(trainer) == ["no formula covers its quantisation"]


@pytest.fixture
def trainer(tmp_path, model_of):
    """A small one."""
    return trainer_of(tmp_path, run_of(tmp_path, model_of("llama"), lora=True))


def reasons(trainer):
    return list(unknown(trainer))


def set_to(**values):
    def change(trainer, monkeypatch):
        vars(trainer).update(values)

    return change


def of_accelerator(**values):
    return lambda trainer, monkeypatch: vars(trainer.accelerator).update(values)


def two_processes(trainer, monkeypatch):
    monkeypatch.setattr(script, "count", lambda: 2)


def of_any_length(trainer, monkeypatch):
    trainer.args.max_completion_length = None


def without_a_head(trainer, monkeypatch):
    memhead_trl.installed().uninstall()


def on_two_devices(trainer, monkeypatch):
    norm = trainer.model.get_base_model().model.norm
    norm.weight = torch.nn.Parameter(torch.ones(192, dtype=torch.bfloat16), requires_grad=False)


def float32_norm(trainer, monkeypatch):
    trainer.model.get_base_model().model.norm.float()


def doubles(trainer, monkeypatch):
    trainer.model.double()


NOT_PLANNED = {
    "without a GPU none are planned": of_accelerator(device=torch.device("cpu")),
    "torch's variable-length attention does not run here": set_to(_varlen=False),
    "none are planned for several processes": two_processes,
    "none are planned for a model that FSDP or DeepSpeed takes apart": set_to(is_fsdp_enabled=True),
    "none are planned for a model that FSDP or DeepSpeed takes apart ": set_to(is_deepspeed_enabled=True),
    "completions have no longest length": of_any_length,
    "the head is not one of memhead.integrations.trl": without_a_head,
    "SGD is not the optimizer that optim=adamw_torch_fused names": set_to(
        optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    ),
    "no formula covers fp8": of_accelerator(mixed_precision="fp8"),
    "the model lies on several devices": on_two_devices,
    "no formula covers weights in bfloat16 and float32": float32_norm,
    "no formula covers weights in float64": doubles,
}


@pytest.mark.parametrize("reason", NOT_PLANNED)
def test_where_anything_is_not_known_bins_have_a_micro_batchs_slots(trainer, monkeypatch, reason):
    assert reasons(trainer) == []
    NOT_PLANNED[reason](trainer, monkeypatch)
    assert reasons(trainer) == [reason.strip()]
    found = bins_of(trainer, None, PROMPT)
    assert (found.tokens, str(found)) == (None, f"bins of a micro-batch's slots: {reason.strip()}")
    told = bins_of(trainer, 5, PROMPT)
    assert (told.tokens, str(told)) == (5, "bins of 5 tokens, as told, a micro-batch at least")


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_eager_attention_has_no_formula(trainer, card, attention):
    """Also where the packed step's attention is before it."""
    card(setting_of(trainer, PROMPT), 80)
    model = trainer.model.get_base_model()
    model.config._attn_implementation = attention
    put_before(model, "test_", lambda *_: None)
    found = bins_of(trainer, None, PROMPT)
    assert (found.tokens is None) is (attention == "eager")
    assert str(
        found
    ) == "bins of a micro-batch's slots: no formula covers the layers of llama with its attention" or (
        found.why == "planned"
    )
    assert model.config._attn_implementation == f"test_{attention}"


@pytest.mark.parametrize("part", ["the model", "the optimizer"])
def test_what_cannot_be_counted_is_no_end_of_a_script(trainer, monkeypatch, part):
    def fails(*_):
        raise RuntimeError("no such kernel\nmore")

    if part == "the model":
        monkeypatch.setattr(script, "sizes", fails)
    else:
        monkeypatch.setattr(script.Trainer, "get_optimizer_cls_and_kwargs", fails)
    assert str(bins_of(trainer, None, PROMPT)) == (
        "bins of a micro-batch's slots: its memory could not be counted: no such kernel"
    )


@pytest.mark.parametrize(
    ("noted", "checkpointing", "offloaded"),
    [("unsloth", True, True), (True, True, False), (False, False, False)],
)
def test_the_gradient_checkpointing_that_unsloth_notes_on_its_model(trainer, noted, checkpointing, offloaded):
    """Whatever the GRPOConfig says; a run's, which asks for "unsloth", counts the same."""
    trainer.args.gradient_checkpointing = not checkpointing
    trainer.model._unsloth_gradient_checkpointing = noted
    found = setting_of(trainer, PROMPT)
    assert (found.checkpointing, found.offloaded) == (checkpointing, offloaded)


def test_a_static_cache_stays_unless_vllm_samples(trainer):
    trainer.args.cache_implementation = "static"
    assert setting_of(trainer, PROMPT).kept_cache
    trainer.args.use_vllm = True
    assert not setting_of(trainer, PROMPT).kept_cache


def test_nothing_is_planned_for_a_cpu(trainer):
    setting = setting_of(trainer, PROMPT)
    assert planned_tokens(setting, 80 * GIB) > 0
    assert planned_tokens(replace(setting, device_type="cpu"), 80 * GIB) is None


def test_gemma_has_no_formula(tmp_path, trainer):
    own = AutoConfig.for_model("gemma2", **{**SIZES, "head_dim": 32})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16)
    trainer.model = get_peft_model(model, lora_of())
    assert "no formula covers the layers of gemma2" in str(bins_of(trainer, None, PROMPT))


def test_adapters_as_they_are(trainer):
    """Of several ranks the largest; in their own dtype; a head that is trained."""
    own = trainer.model.get_base_model().config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16)
    ranks = lora_of(r=4, rank_pattern={"q_proj": 32, "k_proj": 2}, modules_to_save=["lm_head"])
    trainer.model = get_peft_model(model, ranks)
    trainer.model.add_adapter("ref", lora_of(r=8))
    found = setting_of(trainer, PROMPT)
    trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    assert found.trained.adapters + found.trained.whole == sum(trained)
    assert found.trained.whole == 4003 * 192
    assert (found.lora_rank, found.precision.adapter, found.trained.head) == (32, 4, True)
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()
    trainer.accelerator.mixed_precision = "no"
    trainer.model.delete_adapter("ref")
    narrow = setting_of(trainer, PROMPT).precision
    assert (narrow.weights, narrow.e, narrow.adapter, narrow.autocast) == (2, 2, 2, False)


def test_planning_draws_nothing_and_changes_nothing(trainer, card):
    card(setting_of(trainer, PROMPT), 80)
    base = trainer.model.get_base_model()
    before, config = torch.get_rng_state(), base.config.to_dict()
    own, attention = {n: id(p) for n, p in base.named_parameters()}, base.config._attn_implementation
    bins_of(trainer, None, PROMPT)
    assert torch.equal(torch.get_rng_state(), before)
    assert (base.config.to_dict(), base.config._attn_implementation) == (config, attention)
    assert {n: id(p) for n, p in base.named_parameters()} == own


def test_the_room_is_what_is_free_and_what_is_planned_and_there(trainer, monkeypatch):
    setting, emptied = replace(setting_of(trainer, PROMPT), reference=True), []
    parts = measure(setting).parts
    weights, adapters, states = (parts[n] for n in ("parameters", "adapter and saved modules", "optimizer"))
    assert min(weights, adapters, states) > 0

    def free(device):
        assert emptied
        assert device == torch.device("cuda")
        return 3 * GIB, 80 * GIB

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    context = int(RESERVE)
    assert room(trainer, setting) == 3 * GIB + 2 * weights + adapters + context
    trainer.optimizer.state[0] = {"step": 1}
    assert room(trainer, setting) == 3 * GIB + 2 * weights + adapters + states + context
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 3 * GIB))
    assert room(trainer, setting) == 3 * GIB


def test_what_others_hold_is_not_planned_with(tmp_path, model_of, card):
    """A vLLM that stays, or a reward model: the bins of a run whose vLLM has that share."""
    config = run_of(tmp_path, model_of("llama"), lora=True)
    beside = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5}
    shared = config.model_copy(update={"grpo": {**config.grpo, **beside}})
    trainer, expected = trainer_of(tmp_path, config), runs_own(config)
    card(expected, 2.0, others=1.0)
    found = bins_of(trainer, None, PROMPT).tokens
    assert found == pytest.approx(token_budget(shared, expected, 2 * GIB), abs=1)
    card(expected, 2.0)
    assert found < bins_of(trainer, None, PROMPT).tokens
