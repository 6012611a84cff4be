"""Plans of the repo's configs, compared with measurements on an H100, and of architectures not wholly covered."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model

import train_grpo
from recipes.config.load import load_config
from recipes.models.load import load
from recipes.plan import setting
from recipes.plan.formulas import Batch, sampling_bytes
from recipes.plan.plan import (
    CARDS,
    GIB,
    _gib,
    measure,
    parse_device,
    plan,
    plan_token_budget,
    token_budget,
    tokens_as_padded,
    usable,
)
from recipes.plan.time import filling_tokens
from recipes.problems import ConfigError

pytestmark = pytest.mark.usefixtures("without_unsloth")
ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
COUNTED = {}


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    """The same model with the same adapters is counted once for all tests: it takes a second, and is tested itself."""
    count = setting.sizes

    def remembered(config, lora):
        key = config.to_json_string(), str(lora)
        if key not in COUNTED:
            COUNTED[key] = count(config, lora)
        return COUNTED[key]

    monkeypatch.setattr(setting, "sizes", remembered)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_has_a_plan(path, capsys):
    found = plan(load_config(path), parse_device("80 GiB"))
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
    found = plan(load_config(path), parse_device(card[1]))
    assert found.fits
    assert found.peak / GIB == pytest.approx(float(planned[1]), abs=0.06)
    runs = re.findall(r"python train_grpo\.py --config (\S+)(.*)", head)
    assert len(runs) == 3
    for file, rest in runs:
        load_config(ROOT / file, [word for word in rest.split() if "=" in word])


def readme_peaks():
    """(config, card, GiB) of each line of README's table that names a card."""
    for line in (ROOT / "README.md").read_text().splitlines():
        names, _, card = [*line.split("|"), "", "", "", ""][1:4]
        if found := re.fullmatch(r" (\d+ GB), ([\d.]+(?: and [\d.]+)*) GiB ", card):
            files = re.findall(r"\((configs/\S+?)\)", names)
            yield from (
                (file, found[1], float(peak))
                for file, peak in zip(files, found[2].split(" and "), strict=True)
            )


@pytest.mark.parametrize(("file", "card", "peak"), readme_peaks())
def test_the_readme_says_what_the_plan_says(file, card, peak):
    assert plan(load_config(ROOT / file), parse_device(card)).peak / GIB == pytest.approx(peak, abs=0.06)


def test_the_notebook_says_what_the_plan_says():
    said = (ROOT / "notebooks" / "grpo_llama3_1_8b.py").read_text()
    (config,) = set(re.findall(r'"(configs/\S+?\.yaml)"', said))
    rows = {
        name: re.findall(r"planned ([\d.]+) (?!×)", rest)
        for name, rest in re.findall(r"(?m)^# \| (\w+)(.*)$", said)
    }
    whole = plan(load_config(ROOT / config), parse_device("T4")).peak / GIB
    short = ["grpo.max_completion_length=256", "head.impl=full"]
    beside = plan(load_config(ROOT / config, short), parse_device("T4")).peak / GIB
    assert float(re.search(r"([\d.]+) GiB at the peak", said)[1]) == pytest.approx(whole, abs=0.06)
    assert float(rows["training"][2]) == pytest.approx(whole, abs=0.06)
    assert float(rows["beside"][0]) == pytest.approx(beside, abs=0.06)


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
                "model": {
                    **model,
                    "max_seq_length": 128 + row["length"],
                    "gradient_checkpointing": True,
                    "compile_layers": False,
                },
                "task": {"name": "gsm8k"},
                "grpo": grpo,
                "lora": {"r": 16, "alpha": 16, "target_modules": adapted},
                "head": {"impl": row["head"]},
                "step": {"impl": "trl"},
            }
        )
    )
    found = plan(load_config(path), parse_device("80 GiB")).setting
    phases = measure(replace(found, sequences=row["sequences"], sampled=0)).phases
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
        mask = row["sequences"] * found.length**2 * found.precision.e
        peak = max(row["peak_mib"].values())
        assert (max(phases.values()) - mask) / 2**20 == pytest.approx(peak, rel=0.03)


def test_more_makes_more_and_the_longest_fits():
    config = load_config(ROOT / "configs" / "llama3.1_8b_gsm8k.yaml")
    found = plan(config, parse_device("24 GiB"))
    longest = found.longest_completion
    for step, fits in ((0, True), (1, False)):
        stretched = replace(found.setting, completion=longest + step)
        assert (measure(stretched).peak <= usable(found.device_bytes)) is fits
    full = plan(config.model_copy(update={"head": config.head.model_copy(update={"impl": "full"})}), 24 * GIB)
    assert full.peak > found.peak
    assert full.longest_completion < longest
    assert not plan(config, parse_device("8 GB")).fits


def test_a_completion_that_is_not_given_is_trls(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(
        "model: {loader: transformers, name: meta-llama/Llama-3.2-1B-Instruct}\ntask: {name: gsm8k}\n"
    )
    config = load_config(path)
    assert plan(config).setting.completion == config.grpo_config(tmp_path).max_completion_length


def test_sizes_and_cards_are_read():
    assert parse_device("24 GiB") == 24 * GIB
    assert parse_device("16GB") == 16 * 10**9
    for wrong in ("24 apples", "24", "", "-1", "0 GiB", "A100"):
        with pytest.raises(
            ConfigError, match=r"^--device: .*write it as 24 GiB .*T4, L4, 4090, A100-40, A100-80"
        ):
            parse_device(wrong)
    mib = {"T4": 15_360, "L4": 23_034, "4090": 24_564, "A100-40": 40_960, "A100-80": 81_920, "h100": 81_559}
    for card, size in {**mib, "h200": 143_771}.items():  # as nvidia-smi gives them
        assert parse_device(card) == size * 1_048_576
    assert {card.upper() for card in mib} | {"H200"} == set(CARDS)


def test_a_device_without_a_plan_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_grpo.main(["--config", str(QUICKSTART), "--device", "24 GiB"])
    assert stopped.value.code == 2
    assert "means nothing without --plan" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["--plan", "--pilot", "--evaluate=runs/a"])
def test_of_two_things_to_do_none_is_left_out_silently(capsys, other):
    with pytest.raises(SystemExit) as stopped:
        train_grpo.main(["--config", str(QUICKSTART), other, "grpo.max_steps=1", "--resume"])
    assert stopped.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def run_of(tmp_path, name, *, lora=True, **model):
    """A plain run of a model of the hub: 2 × 128 tokens, 64 of them sampled."""
    path = tmp_path / "run.yaml"
    given = {
        "model": {"loader": "transformers", "name": name, "max_seq_length": 128, **model},
        "task": {"name": "gsm8k"},
        "grpo": {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 64},
        "lora": {"r": 8} if lora else None,
    }
    path.write_text(yaml.safe_dump(given))
    return load_config(path)


@pytest.mark.parametrize("name", ["gpt2", "google/gemma-3-1b-it", "Qwen/Qwen3-30B-A3B"])
def test_what_no_formula_covers_is_said(name, tmp_path, capsys):
    config = run_of(tmp_path, name)
    found = plan(config, parse_device("A100-80"))
    assert found.fits is None
    assert found.longest_completion is None
    found.print()
    shown = capsys.readouterr().out
    assert "peak at least" in shown
    assert "whether it fits is not known" in shown
    assert f"note: NOT counted: what the layers of {found.setting.shape.kind} keep" in shown
    assert "longest completion" not in shown
    s = found.setting
    assert s.bin_tokens == s.rollout
    width = 4 if s.precision.weights == 4 else 2  # of float32 weights they are float32
    assert found.memory.parts["activations"] == s.shape.layers * s.rollout * width * s.shape.hidden
    assert list(found.memory.instead) == ["head with full logits"]
    small = plan(config, parse_device("1 GiB"))
    assert small.fits is False
    assert "does NOT fit" in "\n".join(small.lines())


def test_qwen3_is_planned_whole(tmp_path):
    found = plan(run_of(tmp_path, "Qwen/Qwen3-0.6B"), parse_device("T4"))
    assert found.fits
    assert found.longest_completion > 1000
    assert found.storage.download_4bit == 0  # Unsloth's alone
    assert not any("NOT counted" in line for line in found.lines())


def test_what_a_setting_leaves_out_is_said(tmp_path):
    eager = plan(run_of(tmp_path, "Qwen/Qwen3-0.6B", attn_implementation="eager"), 24 * GIB)
    assert any(
        "NOT counted: what the layers of qwen3 with eager attention keep" in note for note in eager.notes
    )
    assert eager.fits is None
    config = run_of(tmp_path, "Qwen/Qwen3-0.6B")
    some = config.model_copy(
        update={"lora": config.lora.model_copy(update={"target_modules": ["q_proj", "v_proj"]})}
    )
    assert any("as if every linear" in note for note in plan(some, 24 * GIB).notes)
    assert not any("as if every linear" in note for note in plan(config, 24 * GIB).notes)


def test_a_mistake_is_one_line(tmp_path, capsys):
    run_of(tmp_path, "gpt2")
    command = ["--config", str(tmp_path / "run.yaml"), "--plan"]
    assert train_grpo.main([*command, "--device", "A100"]) == 2
    assert (
        train_grpo.main([*command, "lora.target_modules=[c_attn, gate_proj]"]) == 2
    )  # PEFT takes one of two
    assert train_grpo.main([*command, "model.name=nobody/nothing"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["--device", "lora.target_modules", "model.name"]


@pytest.mark.parametrize("overrides", [[], ["lora={r: 8}"]], ids=["whole", "adapters"])
def test_phases_are_sums_of_parts_and_alternatives_are_none_of_them(overrides):
    config = load_config(QUICKSTART, overrides)
    ours, full = plan(config).memory, plan(load_config(QUICKSTART, [*overrides, "head.impl=full"])).memory
    checkpointed = plan(load_config(QUICKSTART, [*overrides, "model.gradient_checkpointing=true"])).memory
    for found in (ours, full, checkpointed):
        apart = found.parts["KV cache and sampling"]
        assert found.phases["forward, loss and backward"] == sum(found.parts.values()) - apart
        assert not set(found.instead) & set(found.parts)
    assert ours.instead["head with full logits"] == full.parts["head"]
    assert full.instead["head with memhead"] == ours.parts["head"]
    assert ours.instead["activations with checkpointing"] == checkpointed.parts["activations"]
    assert checkpointed.instead["activations without checkpointing"] == ours.parts["activations"]


def test_the_tables_show_what_is_there(capsys):
    plan(load_config(QUICKSTART)).print()
    shown = capsys.readouterr().out
    parts, _, rest = shown.partition("phase, with")
    assert "reference model" not in parts
    assert "full logits" not in parts
    assert "head with full logits" in rest


@pytest.mark.parametrize("overrides", [[], ["lora={r: 32}"]], ids=["whole", "adapters"])
def test_disk_is_what_a_checkpoint_takes(overrides, tmp_path):
    config = load_config(QUICKSTART, ["run.save_every=100", "grpo.max_steps=250", *overrides])
    found = plan(config).storage
    model = load(config.model, config.make_task(), 0)[0]
    if config.lora is not None:
        model = get_peft_model(model, config.lora.peft_config())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.save_pretrained(tmp_path / "model")
    weights = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert found.final == pytest.approx(weights, rel=0.03)
    assert found.checkpoint == pytest.approx(weights + (tmp_path / "optimizer.pt").stat().st_size, rel=0.05)
    assert found.kept == 3  # 100, 200 and the last
    assert found.download == found.host == 0
    assert bool(found.merge) is bool(overrides)


def test_checkpoints_that_stay():
    def kept(*overrides):
        return plan(load_config(QUICKSTART, overrides)).storage.kept

    assert kept("grpo.max_steps=250", "run.save_every=null") == 0
    assert kept("grpo.max_steps=250", "run.save_every=50", "grpo.save_total_limit=2") == 2
    assert kept("grpo.max_steps=-1", "run.save_every=50", "grpo.num_train_epochs=1") is None


def test_disk_and_main_memory_of_the_8b():
    """8,030,261,248 weights, 41,943,040 adapters at rank 16, 128,256 × 4,096 in the embedding: 2, 4 and 4 bytes."""
    found = plan(load_config(ROOT / "configs" / "llama3.1_8b_gsm8k.yaml", ["lora.r=16"]), parse_device("L4"))
    assert found.storage.download == 2 * 8_030_261_248
    assert found.storage.download_4bit == found.memory.parts["parameters"] < found.storage.download / 2
    assert found.storage.final == 4 * 41_943_040
    assert found.storage.merge == 2 * 8_030_261_248 + 4 * 41_943_040 + 4 * 128_256 * 4096
    assert found.storage.host == 29 * 6 * 1024 * 4096 * 2  # all layers' inputs but three
    lines = found.lines()
    assert (
        "disk: 5.31 GiB to download if Unsloth has a 4-bit copy, else 14.96 GiB; 0.16 GiB for the final"
        in (next(line for line in lines if line.startswith("disk")))
    )
    assert any(line.startswith("main memory: 17.07 GiB to merge the adapter") for line in lines)


def test_a_saved_head_has_a_copy_a_gradient_and_states():
    path = ROOT / "configs" / "llama3.2_1b_gsm8k.yaml"
    frozen, trained = plan(load_config(path)), plan(load_config(path, ["lora.modules_to_save=[lm_head]"]))
    head = 128256 * 2048 * 2  # bytes in bfloat16
    more = {part: size - frozen.memory.parts[part] for part, size in trained.memory.parts.items()}
    assert more["adapter and saved modules"] == more["gradients"] == head
    assert more["optimizer"] == 2 * head
    assert more["head"] > 0
    assert trained.peak >= frozen.peak + 4 * head


ONE_B = ROOT / "configs" / "llama3.2_1b_gsm8k.yaml"


def in_bins(tokens, *overrides):
    """Setting of the 1B run: 4 groups sampled at a time, each of 8 completions of 512 tokens on a prompt of 256."""
    return replace(plan(load_config(ONE_B, overrides), 24 * GIB).setting, bin_tokens=tokens)


PLAIN = "model.compile_layers=false"


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        ([PLAIN], 1.05),
        ([PLAIN, "head.impl=full"], 1.05),
        ([PLAIN, "model.gradient_checkpointing=false"], 1.05),
        ([], 1.05),
        # Planned for are the keys of the shortest completions and the scored rows of the longest, which no length has
        # together: where layers keep little, as compiled ones, that is 6 per cent.
        (["model.gradient_checkpointing=false"], 1.1),
    ],
    ids=str,
)
def test_the_token_budget_is_the_largest_that_fits(overrides, more):
    s, device = in_bins(None, *overrides), 6 * GIB
    budget = plan_token_budget(s, device)

    def peak(tokens, completion):
        return measure(replace(s, bin_tokens=tokens, completion=completion)).peak

    assert 0 < budget < 4 * (256 + 8 * 511)
    assert max(peak(budget, length) for length in (1, 20, 100, 300, 512)) <= usable(device)
    assert max(peak(int(more * budget), length) for length in (1, 20, 100, 300, 512)) > usable(device)
    assert plan_token_budget(s, 7 * GIB) > budget


def test_the_token_budget_has_bounds():
    s = in_bins(None)
    assert plan_token_budget(s, 80 * GIB) == 4 * (256 + 8 * 511)  # all that is sampled
    assert plan_token_budget(s, 3 * GIB) == 0
    assert (
        token_budget(load_config(ONE_B), s, 3 * GIB) == 256 + 8 * 511
    )  # a micro-batch, which is never divided
    with pytest.raises(ValueError, match=r"gpt2; set step\.token_budget"):
        plan_token_budget(replace(s, shape=replace(s.shape, layer=None, kind="gpt2")), 80 * GIB)


def bin_of(device, *overrides):
    return plan(load_config(ONE_B, overrides), device).setting.bin_tokens


def test_a_run_takes_the_largest_bin_that_fits_and_is_of_use():
    assert bin_of(80 * GIB) == bin_of(24 * GIB) == filling_tokens(in_bins(None))
    assert bin_of(80 * GIB, "model.gradient_checkpointing=false") == 16384
    planned = bin_of(5 * GIB)
    assert 256 + 8 * 511 < planned < 8 * 768  # where TRL's micro-batch would not fit
    assert plan(load_config(ONE_B), 5 * GIB).peak <= usable(5 * GIB)
    assert plan(load_config(ONE_B, ["step.impl=trl"]), 5 * GIB).fits is False
    assert bin_of(3 * GIB) == 256 + 8 * 511  # not even a micro-batch fits, and it is never divided
    assert plan(load_config(ONE_B), 3 * GIB).fits is False


@pytest.mark.parametrize(
    ("prompt", "completion", "more"), [(3072, 256, True), (256, 256, False), (512, 2048, True)]
)
def test_bins_are_of_use_up_to_trls_memory_or_to_where_they_keep_the_card_at_work(prompt, completion, more):
    """Of the 8B architecture, eight completions a micro-batch, as benchmarks/packed_gpu.py runs it."""
    config = load_config(
        ONE_B, ["model.name=unsloth/meta-Llama-3.1-8B-Instruct", f"model.max_seq_length={prompt + completion}",
                f"grpo.max_completion_length={completion}", "grpo.gradient_accumulation_steps=8"],
    )  # fmt: skip
    found, padded = (plan(load_or, 80 * GIB) for load_or in (config, trls(config)))
    assert found.setting.bin_tokens == max(tokens_as_padded(found.setting), filling_tokens(found.setting))
    assert (found.setting.bin_tokens > filling_tokens(found.setting)) is more
    assert (found.memory.step <= padded.memory.step) is more


def trls(config):
    """The same run by TRL's step."""
    return config.model_copy(update={"step": config.step.model_copy(update={"impl": "trl"})})


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_plan_names_the_bins_that_take_no_more_than_trls_step(compiled):
    """Which is never compiled. Of the 1B architecture without checkpointing, whose fastest bins take more."""
    short = [
        "model.gradient_checkpointing=false",
        "model.max_seq_length=512",
        "grpo.max_completion_length=256",
    ]
    given = [*short, f"model.compile_layers={str(compiled).lower()}"]
    fastest = plan(load_config(ONE_B, given), 80 * GIB)
    trls_step = plan(load_config(ONE_B, [*short, "step.impl=trl", "model.compile_layers=false"]), 80 * GIB)
    assert fastest.memory.step > 1.3 * trls_step.memory.step
    (line,) = (line for line in fastest.lines() if "step.token_budget" in line)
    named = int(re.search(r"step\.token_budget=(\d+) would take no more", line)[1])
    smaller = plan(load_config(ONE_B, [*given, f"step.token_budget={named}"]), 80 * GIB)
    assert smaller.setting.bin_tokens == named

    def most(tokens):  # whatever the lengths of the completions
        return measure(smaller.setting, smaller.setting.group.most(tokens, varlen=True)).step

    s = trls_step.setting
    unmasked = measure(
        s, Batch.padded(s.sequences, s.prompt, s.completion, mask=False)
    ).step  # the least it takes
    assert smaller.memory.step <= most(named) <= unmasked < most(named + 8)
    assert unmasked <= trls_step.memory.step
    assert not any("step.token_budget" in line for line in smaller.lines() + trls_step.lines())


def test_a_run_takes_the_bins_it_is_told_to(monkeypatch):
    assert bin_of(80 * GIB, "step.token_budget=9000") == 9000
    assert bin_of(80 * GIB, "step.token_budget=100") == 256 + 8 * 511  # one group, which is not divided
    assert bin_of(80 * GIB, "step.token_budget=1000000") == 4 * (256 + 8 * 511)  # all that is sampled
    assert bin_of(80 * GIB, "step.token_budget=100", "grpo.per_device_train_batch_size=12") == (
        2 * 256 + 12 * 511
    )
    assert bin_of(80 * GIB, "step.impl=trl") is None
    for ruled_out in ("lora.dropout=0.05", "grpo.neftune_noise_alpha=5"):  # TRL's step is what runs then
        assert bin_of(80 * GIB, ruled_out) is None
    for launcher, packs in (("FSDP", True), ("DEEPSPEED", False)):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{launcher}", "true")
            assert (bin_of(80 * GIB) is not None) is packs


def test_bins_leave_room_for_a_vllm_that_stays():
    beside = [PLAIN, "grpo.use_vllm=true", "grpo.vllm_mode=colocate", "grpo.vllm_gpu_memory_utilization=0.5"]
    assert bin_of(10 * GIB, *beside) == bin_of(5 * GIB, PLAIN)  # as layers are beside a vLLM
    assert bin_of(10 * GIB, *beside, "grpo.vllm_enable_sleep_mode=true") == bin_of(10 * GIB, PLAIN)
    assert bin_of(10 * GIB, "grpo.use_vllm=true", "grpo.vllm_mode=server") == bin_of(10 * GIB)


def test_a_kept_cache_stays_between_rollouts():
    """SmolLM2's: 30 layers keep 3 heads of 64 key and value numbers of 2 bytes for each of 1,024 × 256 tokens."""
    path = ROOT / "configs" / "smollm2_135m_char_count.yaml"
    setting = plan(load_config(path), 24 * GIB).setting
    assert setting.kept_cache
    assert not plan(load_config(path, ["grpo.use_vllm=true"]), 24 * GIB).setting.kept_cache
    assert not setting.wide_cache  # which has one dtype, as vLLM's
    kept, gone = measure(setting).phases, measure(replace(setting, kept_cache=False)).phases
    cache = 1024 * 256 * 30 * 2 * 3 * 64 * 2
    assert kept.pop("generation") == gone.pop("generation")
    assert {phase: size - gone[phase] for phase, size in kept.items()} == dict.fromkeys(gone, cache)


@pytest.mark.parametrize(
    ("overrides", "launcher", "size"),
    [
        ([], "", 4),
        (["grpo.use_cpu=true", "model.dtype=bfloat16"], "", 2),  # nothing is cast there
        (["lora={}", "model.dtype=bfloat16"], "", 2),
        ([], "FSDP", 4),
        ([], "DeepSpeed", 2),
        (["grpo.use_vllm=true"], "", 2),
    ],
)
def test_a_cache_that_grows_has_four_bytes_where_float32_weights_are_cast(
    monkeypatch, overrides, launcher, size
):
    """FSDP and autocast cast for a product alone; DeepSpeed's weights are bfloat16, and so is a vLLM's cache."""
    if launcher:
        monkeypatch.setenv(f"ACCELERATE_USE_{launcher.upper()}", "true")
    path = ROOT / "configs" / "smollm2_135m_char_count.yaml"
    found = plan(load_config(path, ["grpo.cache_implementation=null", *overrides]))
    tokens, shape = 1024 * 256, found.setting.shape
    held = found.memory.parts["KV cache and sampling"] - sampling_bytes(shape, 1024)
    assert held == tokens * 30 * 2 * 3 * 64 * size


def test_a_bin_is_one_micro_batch_where_nothing_can_be_planned(tmp_path):
    one_of_four = ["grpo.gradient_accumulation_steps=4", "grpo.per_device_train_batch_size=128"]
    quickstart = plan(quickstart_of(one_of_four)).setting
    assert quickstart.bin_tokens == quickstart.sequences * quickstart.length == 128 * 13
    assert bin_of(80 * GIB, "model.attn_implementation=eager") == 8 * 768


def test_a_bin_has_no_more_than_the_rollout():
    """Padded, its one micro-batch has 512 × 13 slots; packed it is 64 × (7 + 8 × 5) tokens."""
    assert plan(quickstart_of([])).setting.bin_tokens == 64 * (7 + 8 * 5)


def quickstart_of(overrides):
    """With the prompts that it has, of which a run looks for the longest."""
    return load_config(QUICKSTART, overrides).model_copy(update={"longest_prompt": 7})


def test_unsloth_raises_a_micro_batch_to_one_group():
    sizes = {}
    for loader in ("transformers", "unsloth"):
        few = ["grpo.per_device_train_batch_size=2", "grpo.num_generations=8", f"model.loader={loader}"]
        few += ["model.name=unsloth/Llama-3.2-1B-Instruct", "grpo.gradient_accumulation_steps=4"]
        found = setting.Setting.of(load_config(ONE_B, few), device=True)
        sizes[loader] = found.sequences, found.sampled
    assert sizes == {"transformers": (2, 8), "unsloth": (8, 32)}


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens", "measured"), [(200, 204, 16000, 30.7), (256, 256, 12000, 23.6)]
)
def test_a_bin_against_what_an_h100_measured(prompt, completion, tokens, measured):
    """benchmarks/packed_gpu.py with torch 2.11: LoRA on every linear layer of the 1B architecture."""
    s = in_bins(tokens, "model.gradient_checkpointing=false", "lora.r=16", "model.compile_layers=false")
    peak = measure(replace(s, prompt=prompt, completion=completion, sampled=0)).peak / GIB
    assert peak == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("tokens", "measured"), [(10397, 17150), (16216, 22354)])
def test_a_bin_of_a_model_in_float32_against_what_an_h100_measured(tokens, measured):
    """benchmarks/results/char_count_h100.md: SmolLM2 under autocast, every weight trained, MiB in the backward."""
    path = ROOT / "configs" / "smollm2_135m_char_count.yaml"
    s = replace(plan(load_config(path, ["model.compile_layers=false"]), 80 * GIB).setting, bin_tokens=tokens)
    planned = measure(s).phases["forward, loss and backward"]
    assert planned / 2**20 == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("compiled", "measured"), [("false", 30.24), ("true", 22.16)])
def test_a_bin_against_what_an_h200_measured(compiled, measured):
    """benchmarks/results/packed_h200.md: half of a window of 29,022 tokens, with compiled layers and without."""
    s = in_bins(14_511, "model.gradient_checkpointing=false", "lora.r=16", f"model.compile_layers={compiled}")
    peak = measure(replace(s, prompt=200, completion=204, sampled=0)).peak / GIB
    assert peak == pytest.approx(measured, rel=0.05)


def test_a_whole_run_with_compiled_layers_against_what_an_h200_measured():
    """benchmarks/results/char_count_h100.md: updates of 32 prompts, MiB."""
    path = ROOT / "configs" / "smollm2_135m_char_count.yaml"
    s = plan(load_config(path), 141 * GIB).setting
    assert measure(s).phases["forward, loss and backward"] / 2**20 == pytest.approx(16_748, rel=0.05)


def test_a_bin_of_as_many_tokens_takes_no_more_than_a_padded_batch():
    padded = in_bins(None)
    packed = replace(padded, bin_tokens=padded.sequences * padded.length)
    ours, trls = measure(packed), measure(padded)
    assert ours.parts["activations"] < trls.parts["activations"]
    assert ours.phases["generation"] == trls.phases["generation"]
    assert packed.batch.scored > padded.batch.scored  # the prompt is there once


def test_a_plan_says_what_a_bin_is():
    found = plan(load_config(QUICKSTART))
    lines = replace(found, setting=replace(found.setting, bin_tokens=4096)).lines()
    generations = found.setting.generations
    assert (
        f"quickstart: a bin of 4096 tokens, prompts shared by {generations} completions, of 58 + 6"
        in lines[0]
    )


def test_units_by_literal_numbers():
    assert parse_device("1 GiB") == 1_073_741_824
    assert parse_device("1.5MiB") == 1_572_864
    assert (parse_device("2 KiB"), parse_device("2KB"), parse_device("3 MB"), parse_device("3GB")) == (
        2_048, 2_000, 3_000_000, 3_000_000_000,
    )  # fmt: skip
    assert parse_device("l4") == 23_034 * 1_048_576
    assert usable(10_000_000_000) == 9_500_000_000 - 805_306_368  # a twentieth, and three quarters of a GiB
    assert [_gib(size) for size in (1_073_741_824, 10_737_419, 10_000_000, 0)] == [
        "1.00 GiB", "0.01 GiB", "9.54 MiB", "0.00 MiB",
    ]  # fmt: skip
