"""What each of several processes holds: by hand, for a model whose sizes are round."""

from dataclasses import replace

import pytest

import train_grpo
from recipes.config.load import load_config
from recipes.plan.plan import GIB, Memory, plan
from recipes.plan.processes import by_way, ddp, sharded
from recipes.plan.setting import Setting

RUN = """\
model: {loader: scratch, scratch: {hidden_size: 64, layers: 4, heads: 4, intermediate_size: 128}}
task: {name: countdown}
grpo: {per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 6}
"""


@pytest.fixture
def found(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return plan(load_config(path, processes=4))


def test_ddp_holds_the_gradients_twice(found):
    phases = ddp(found.memory)
    parameters = 4 * found.setting.shape.parameters
    assert phases["optimizer"] - found.memory.phases["optimizer"] == parameters


def test_fsdp_rests_in_parts_and_computes_with_two_whole_layers(found):
    phases, before = sharded(found.setting, found.memory, 4), found.memory.phases
    parameters = 4 * found.setting.shape.parameters
    adam, gradients = 2 * parameters, parameters
    layer = 4 * 64 * 64 + 3 * 64 * 128
    vocabulary = found.setting.shape.vocab
    whole = 4 * (2 * layer + 2 * vocabulary * 64 + (2 * 4 + 1) * 64)  # with embedding, head and every norm
    assert before["optimizer"] - phases["optimizer"] == (parameters + adam + gradients) * 3 // 4
    assert before["generation"] - phases["generation"] == (parameters + adam) * 3 // 4 - whole


def test_on_a_gpu_what_fsdp_gathers_is_what_autocast_would_cast(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    found = plan(load_config(path, processes=4), 8 * GIB)
    phases, before = sharded(found.setting, found.memory, 4), found.memory.phases
    parameters, layer = 4 * found.setting.shape.parameters, 4 * 64 * 64 + 3 * 64 * 128
    parts = parameters * 4 * 3 // 4  # weights, two moments, gradients: three quarters are elsewhere
    whole = 2 * (2 * layer + 2 * found.setting.shape.vocab * 64 + (2 * 4 + 1) * 64)  # now in half precision
    copies = 2 * 4 * layer
    backward = "forward, loss and backward"
    assert found.memory.parts["weights cast by autocast"] == copies
    assert before[backward] - phases[backward] == parts + copies - whole


def test_every_phase_by_hand(found):
    """Of 400 resting bytes 300 are elsewhere, of 80 of gradients 60; what is gathered is there while it computes."""
    parts = {"parameters": 160, "reference model": 120, "adapter and saved modules": 40, "optimizer": 80}
    parts |= {"gradients": 80, "weights cast by autocast": 7, "activations": 5000}
    names = ("generation", "scoring without gradient", "forward, loss and backward", "optimizer")
    memory = Memory(parts, {name: GIB * size for name, size in zip(names, (4, 3, 2, 1))}, {})
    layer, vocabulary = 4 * 64 * 64 + 3 * 64 * 128, found.setting.shape.vocab
    whole = 4 * (2 * layer + 2 * vocabulary * 64 + (2 * 4 + 1) * 64)
    assert sharded(found.setting, memory, 4) == {
        "generation": 4 * GIB - 300 + whole,
        "scoring without gradient": 3 * GIB - 300 + whole,
        "forward, loss and backward": 2 * GIB - 360 + whole - 7,
        "optimizer": GIB - 360,
    }
    assert ddp(memory) == {name: GIB * size + 80 for name, size in zip(names, (4, 3, 2, 1))}


def test_the_table_of_a_process_has_both_ways_and_their_peaks(found):
    parts = dict.fromkeys(found.memory.parts, 0) | {"parameters": 8 * GIB, "gradients": 4 * GIB}
    phases = {name: size * GIB for size, name in enumerate(found.memory.phases, 20)}
    found = replace(found, memory=Memory(parts, phases, {}))
    both = [way.values() for way in (ddp(found.memory), sharded(found.setting, found.memory, 4))]
    assert max(both[0]) - max(both[1]) > GIB
    table = by_way(found, 4)
    assert table.header == ("each of 4 processes, GiB", "DDP", "FSDP2 or ZeRO-3")
    shown = [tuple(f"{size / 1_073_741_824:.3f}" for size in sizes) for sizes in zip(*both)]
    assert [row[1:] for row in table.rows] == [
        *shown,
        tuple(f"{max(way) / 1_073_741_824:.3f}" for way in both),
    ]
    assert [row[0] for row in table.rows] == [*found.memory.phases, "peak"]


@pytest.mark.parametrize(
    ("told", "sampled"), [("generation_batch_size=64", 16), ("steps_per_generation=3", 24)]
)
def test_each_process_samples_its_part_of_a_generation(tmp_path, told, sampled):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    config = load_config(path, [f"grpo.{told}"], processes=4)
    assert Setting.of(config, device=False).sampled == sampled


def test_what_a_plan_could_not_look_at_is_said(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    model = "{loader: scratch, tokenizer: bpe, scratch: {hidden_size: 64, layers: 1, heads: 4}}"
    path.write_text(f"model: {model}\ntask: {{name: gsm8k}}\n")
    assert train_grpo.main(["--config", str(path), "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "note: NOT looked at: the problems of openai/gsm8k, which are on the hub" in shown
    assert "note: prompts of 256 tokens are assumed; model.max_seq_length would say it" in shown


def test_the_command_line_shows_both_and_counts_whole_groups_over_all(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    small = ["--config", str(path), "grpo.per_device_train_batch_size=1", "grpo.num_generations=8"]
    assert train_grpo.main([*small, "--plan", "--processes", "8"]) == 0
    printed = capsys.readouterr().out
    assert "each of 8 processes, GiB" in printed
    assert "FSDP2 or ZeRO-3" in printed
    assert train_grpo.main([*small, "--plan", "--processes", "3"]) == 2
    assert "× 3 process(es)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_grpo.main([*small, "--processes", "8"])
    capsys.readouterr()
    for none in ("0", "-1"):
        with pytest.raises(SystemExit):
            train_grpo.main([*small, "--plan", "--processes", none])
        assert f"--processes {none}: is no number of processes; give 1 or more" in capsys.readouterr().err
