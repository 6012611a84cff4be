"""What each of several processes holds: by hand, for a model whose sizes are round."""

import pytest

import train_grpo
from recipes.config.load import load_config
from recipes.plan.plan import plan
from recipes.plan.processes import ddp, sharded

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
