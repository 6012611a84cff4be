"""Rewards that no exception, alarm or await ends: the run ends, keeps its state, and says which reward it was."""

import subprocess
import sys

from children import ROOT, start
from test_finite import command

import train_grpo
from recipes.tracking.run_folder import RunFolder

SOON = "import recipes.rewards.stuck\nrecipes.rewards.stuck.PATIENCE = 1.2\n"
NESTED = """
def swallows_all():
    while True:
        try:
            while True:
                try:
                    while True:
                        pass
                except:
                    pass
        except:
            pass
"""
OWN = """
def brevity(completions, trainer_state, **_):
    if trainer_state is not None and trainer_state.global_step == 2:
        swallows_all()
    return [float(-len(text)) for text in completions]
"""


def test_a_reward_that_swallows_every_exception_ends_the_run_which_goes_on_without_it(
    tmp_path, monkeypatch, capsys
):
    own = tmp_path / "stuck_rewards.py"
    own.write_text(NESTED + OWN)
    rewards = "task.rewards={correct: 1.0, stuck_rewards.brevity: 0.1}"
    arguments = command(tmp_path, rewards, "task.reward_seconds=0.3", "grpo.max_steps=4", "run.checks=false")
    run = start(arguments, f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{SOON}")
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 1, errors
    said, kept = errors.strip().splitlines()[-2:]
    assert said.startswith(
        "error: reward stuck_rewards.brevity has not come back after 1.8 s, and no exception ends it: the run ends"
    )
    place = tmp_path / "tiny" / "checkpoints" / "checkpoint-2"
    assert kept == f"Checkpoint: {place}; the same command with --resume and a change goes on from it"
    assert "Everything is kept in" in output
    assert [line["step"] for line in RunFolder(tmp_path / "tiny").metrics.read() if "loss" in line] == [1, 2]

    own.write_text(OWN.replace("swallows_all()", "pass"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train_grpo.main([*arguments, "--resume"]) == 0
    assert f"Resuming from {place}" in capsys.readouterr().out


ALONE = f"""
import asyncio, time
from recipes.rewards.contract import RewardOptions, check, guard
from recipes.rewards.verdicts import judge_all
{SOON}
{NESTED}
async def never_awaits(completions, **_):
    while True:
        pass
def late(completions, **_):
    time.sleep(0.5)
    return [1.0 for _ in completions]
def swallows(completions, **_):
    swallows_all()
def judge(completion, row):
    swallows_all()
options = RewardOptions(reward_seconds=0.2, reward_failures=1.0)
rows, texts = [{{"prompt": "a"}}], ["b"]
assert guard({{"late": late}}, options)[0](completions=texts) == [None]
time.sleep(2)  # what was ended in time is not ended again
print("alive", flush=True)
"""


CALLS = {
    "reward never_awaits": 'asyncio.run(guard({"never_awaits": never_awaits}, options)[0](completions=texts))',
    "reward swallows": 'check({"swallows": swallows}, rows, texts, 0.2)',
    "judge on 'b'": "judge_all(judge, texts, rows, options)",
}


def test_so_do_coroutines_the_check_before_training_and_judges():
    begun = {
        whose: subprocess.Popen(
            [sys.executable, "-c", ALONE + call], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for whose, call in CALLS.items()
    }  # fmt: skip
    try:
        for whose, process in begun.items():
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, output) == (1, "alive\n"), errors
            (line,) = errors.splitlines()
            assert line.startswith(f"error: {whose} has not come back after 1.")
    finally:
        for process in begun.values():
            process.kill()
