"""The plan's formulas against bytes counted on three small real models, and the plans of the repo's configs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import train_grpo
from recipes.config.load import load_config
from recipes.plan import formulas as memory
from recipes.plan.formulas import Precision
from recipes.plan.plan import GIB, measure, parse_size, plan, usable
from recipes.plan.shapes import ModelShape, UnknownShape

pytestmark = pytest.mark.usefixtures("without_unsloth")
ROOT = Path(__file__).parents[3]
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_has_a_plan(path, capsys):
    found = plan(load_config(path), parse_size("80 GiB"))
    found.print()
    shown = capsys.readouterr().out
    assert "forward, loss and backward" in shown
    assert found.fits
    assert found.longest_completion >= found.setting.completion


FOR_A_CPU = ("quickstart.yaml", "gsm8k_scratch.yaml")
LARGE = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name not in FOR_A_CPU)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.name)
def test_a_config_opens_with_what_its_plan_says(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    card = re.search(r"Card: (\d+ GB)", head)
    planned = re.search(r"Memory, planned: ([\d.]+) GiB", head)
    found = plan(load_config(path), parse_size(card[1]))
    assert found.fits
    assert found.peak / GIB == pytest.approx(float(planned[1]), abs=0.06)
    runs = re.findall(r"python train_grpo\.py --config (\S+)(.*)", head)
    assert len(runs) == 3
    for file, rest in runs:
        load_config(ROOT / file, [word for word in rest.split() if "=" in word])


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.name)
def test_a_run_of_hours_is_saved_on_its_way(path):
    config = load_config(path)
    assert config.run.save_every <= config.grpo["max_steps"] / 5


MEASURED = json.loads((ROOT / "benchmarks" / "results" / "step_h100.json").read_text())["rows"]
STACKS = {  # of benchmarks/step_gpu.py
    "trl": {"loader": "transformers"},
    "unsloth4": {"loader": "unsloth", "load_in_4bit": True},
    "unsloth16": {"loader": "unsloth"},
}


@pytest.mark.parametrize(
    "row",
    [row for row in MEASURED if row["head"] == "memhead" or (row["stack"], row["head"]) == ("trl", "full")],
    ids=lambda row: f"{row['stack']}-{row['head']}-{row['length']}",
)
def test_the_plan_against_what_an_h100_measured(row, tmp_path):
    """A step of the 8B architecture, and its scoring: at most 6 per cent above the plan, and 8 below.

    Below, because the plan counts a padding mask, which these batches do not have: 64 KiB a token at the longest.
    Without it a peak under TRL is within 3 per cent. What Unsloth holds is an estimate, and at 32k tokens the mask
    stands in for what it lacks: without it the plan would be up to 10 per cent too low.
    """
    path = tmp_path / "measured.yaml"
    model = {"name": "meta-llama/Llama-3.1-8B-Instruct", "dtype": "bfloat16", **STACKS[row["stack"]]}
    adapted = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    grpo = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": row["length"]}
    path.write_text(
        yaml.safe_dump(
            {
                "model": {**model, "max_seq_length": 128 + row["length"], "gradient_checkpointing": True},
                "task": {"name": "gsm8k"},
                "grpo": grpo,
                "lora": {"r": 16, "alpha": 16, "target_modules": adapted},
                "head": {"impl": row["head"]},
            }
        )
    )
    setting = plan(load_config(path), parse_size("80 GiB")).setting
    phases = measure(replace(setting, sequences=row["sequences"], sampled=0))[1]
    if "error" in row:
        assert row["error"] == "out of memory"
        assert max(phases.values()) > usable(80 * GIB)
        return
    for planned, measured in (
        (max(phases.values()), max(row["peak_mib"].values())),
        (phases["scoring without gradient"], row["peak_mib"]["scoring"]),
    ):
        assert measured / 1.06 <= planned / 2**20 <= measured * 1.08
    if row["stack"] == "trl":
        mask = row["sequences"] * setting.length**2 * setting.precision.e
        peak = max(row["peak_mib"].values())
        assert (max(phases.values()) - mask) / 2**20 == pytest.approx(peak, rel=0.03)


def test_more_makes_more_and_the_longest_fits():
    config = load_config(ROOT / "configs" / "llama3.1_8b_gsm8k.yaml")
    found = plan(config, parse_size("24 GiB"))
    longest = found.longest_completion
    for step, fits in ((0, True), (1, False)):
        setting = replace(found.setting, completion=longest + step)
        assert (max(measure(setting)[1].values()) <= usable(found.device_bytes)) is fits
    full = plan(config.model_copy(update={"head": config.head.model_copy(update={"impl": "full"})}), 24 * GIB)
    assert full.peak > found.peak
    assert full.longest_completion < longest
    assert not plan(config, parse_size("8 GB")).fits


def test_a_completion_that_is_not_given_is_trls(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(
        "model: {loader: transformers, name: meta-llama/Llama-3.2-1B-Instruct}\ntask: {name: gsm8k}\n"
    )
    config = load_config(path)
    assert plan(config).setting.completion == config.grpo_config(tmp_path).max_completion_length


def test_known_totals():
    """Parameters as the model cards give them."""
    table = yaml.safe_load((ROOT / "recipes" / "plan" / "model_shapes.yaml").read_text())
    counts = {name: ModelShape.from_config(config).parameters() for name, config in table.items()}
    assert counts["meta-llama/Llama-3.1-8B-Instruct"] == 8_030_261_248
    assert counts["meta-llama/Llama-3.2-1B-Instruct"] == 1_235_814_400
    assert counts["Qwen/Qwen2.5-0.5B-Instruct"] == 494_032_768
    assert counts["Qwen/Qwen2.5-3B"] == 3_085_938_688


def test_sizes_are_read():
    assert parse_size("24 GiB") == 24 * GIB
    assert parse_size("16GB") == 16 * 10**9
    for wrong in ("24 apples", "24", "", "-1", "0 GiB"):
        with pytest.raises(ValueError, match=r"--device.*write it as 24 GiB"):
            parse_size(wrong)


def test_a_device_without_a_plan_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_grpo.main(["--config", str(ROOT / "configs" / "quickstart.yaml"), "--device", "24 GiB"])
    assert stopped.value.code == 2
    assert "means nothing without --plan" in capsys.readouterr().err


def test_a_model_that_is_not_here_is_an_error_with_a_remedy():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    elsewhere = config.model.model_copy(
        update={"loader": "transformers", "name": "nobody/nothing", "scratch": None}
    )
    with pytest.raises(UnknownShape, match=r"hf download nobody/nothing config\.json"):
        plan(config.model_copy(update={"model": elsewhere}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["norm", "mlp"]], ids=str)
def test_modules_saved_in_full_are_counted(name, saved):
    config_class, model_class, rest = MODELS[name]
    config = config_class(**SIZES, **rest)
    adapters = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)
    model = get_peft_model(model_class(config).to(torch.bfloat16), adapters)
    copies = [p for n, p in model.named_parameters() if ".modules_to_save." in n]
    shape = ModelShape.from_config(config.to_dict())
    assert shape.module_parameters(saved) == sum(p.numel() for p in copies)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in copies)


def test_a_saved_head_has_a_copy_a_gradient_and_states():
    path = ROOT / "configs" / "llama3.2_1b_gsm8k.yaml"
    frozen, trained = plan(load_config(path)), plan(load_config(path, ["lora.modules_to_save=[lm_head]"]))
    head = 128256 * 2048 * 2  # bytes in bfloat16
    more = {part: size - frozen.parts[part] for part, size in trained.parts.items()}
    assert more["adapter and saved modules"] == more["gradients"] == head
    assert more["optimizer"] == 2 * head
    assert more["head with memhead"] > 0
    assert trained.peak >= frozen.peak + 4 * head
