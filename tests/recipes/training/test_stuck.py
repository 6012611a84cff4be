"""Rewards that no exception, alarm or await ends: the run ends, keeps what it can, and says which reward it was."""

import signal
import subprocess
import sys
import time

from children import start, wait_for
from ready import ROOT
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
import itertools
def brevity(completions, trainer_state, **_):
    step = trainer_state.global_step if trainer_state is not None else 0
    if step == 2:
        swallows_all()
    if step == 3:
        sum(itertools.count())  # no other line of Python runs until it returns
    return [float(-len(text)) for text in completions]
"""


def test_a_reward_that_nothing_ends_ends_the_run_which_goes_on_without_it(tmp_path, monkeypatch, capsys):
    own = tmp_path / "stuck_rewards.py"
    own.write_text(NESTED + OWN)
    rewards = "task.rewards={correct: 1.0, stuck_rewards.brevity: 0.1}"
    arguments = command(tmp_path, rewards, "task.reward_seconds=0.3", "grpo.max_steps=4", "run.checks=false")
    before = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{SOON}"
    run = start(arguments, before)
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
    run = start([*arguments, "run.save_every=1", "--resume"], before)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == -signal.SIGUSR2, errors
    assert f"Resuming from {place}" in output
    assert "error: reward stuck_rewards.brevity has not come back after 3 s, from code that keeps" in errors
    assert 'stuck_rewards.py", line 8 in brevity' in errors

    own.write_text(OWN.replace("sum(itertools.count())", "pass").replace("swallows_all()", "pass"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert train_grpo.main([*arguments, "--resume"]) == 0
    assert f"Resuming from {place.with_name('checkpoint-3')}" in capsys.readouterr().out


ALONE = f"""
import asyncio, itertools, multiprocessing, re, time
from recipes.rewards.contract import RewardOptions, check, guard
from recipes.rewards.stuck import watched
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
async def matches(completions, **_):
    re.match("(a+)+$", "a" * 40 + "b")
def sums(completion, row):
    return sum(itertools.count()) > 0
options = RewardOptions(reward_seconds=0.2, reward_failures=1.0)
rows, texts = [{{"prompt": "a"}}], ["b"]
assert guard({{"late": late}}, options)[0](completions=texts) == [None]
time.sleep(0.6)  # what was ended in time is not ended again
print("alive", flush=True)
"""


FIRST = """
with watched("slow", seconds=0.5):
    time.sleep(1.4)  # neither the seconds nor the patience alone
# It holds the output open, and so this test, until it is ended with the run.
multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,)).start()
"""
IN_PYTHON = "and no exception ends it: the run ends"
IN_C = "from code that keeps Python's interpreter to itself"
CALLS = {
    "reward never_awaits": (
        'asyncio.run(guard({"never_awaits": never_awaits}, options)[0](completions=texts))',
        IN_PYTHON,
    ),
    "reward swallows": ('check({"swallows": swallows}, rows, texts, 0.2)', IN_PYTHON),
    "judge on 'b'": ("judge_all(judge, texts, rows, options)", IN_PYTHON),
    "reward matches": ('check({"matches": matches}, rows, texts, 0.2)', IN_C),
    "sums on 'b'": ("judge_all(sums, texts, rows, options)", IN_C),
}


def test_so_do_coroutines_the_check_before_training_and_judges():
    begun = {
        whose: subprocess.Popen(
            [sys.executable, "-c", ALONE + FIRST * (how is IN_PYTHON) + call],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for whose, (call, how) in CALLS.items()
    }  # fmt: skip
    try:
        for whose, process in begun.items():
            how = CALLS[whose][1]
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, output) == (1 if how is IN_PYTHON else -signal.SIGUSR2, "alive\n"), (
                errors
            )
            first, *where = errors.splitlines()
            assert first.startswith(f"error: {whose} has not come back after ")
            assert how in first
            assert ("most recent call first" in "".join(where)) == (how is IN_C)
    finally:
        for process in begun.values():
            process.kill()


def test_a_run_that_is_suspended_is_not_late():
    """kill -STOP for longer than the process beside it waits."""
    slow = 'print("now", flush=True) or time.sleep(0.4) or [1.0]'
    call = f'print(guard({{"slow": lambda completions, **_: {slow}}}, options)[0](completions=texts))'
    script = ALONE.replace("PATIENCE = 1.2", "PATIENCE = 0.8").replace(
        "reward_seconds=0.2", "reward_seconds=0.6"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script.replace("== [None]", "") + call], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        wait_for(process, "now")
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.3)
        process.send_signal(signal.SIGCONT)
        assert "[1.0]" in process.communicate(timeout=60)[0]
    finally:
        process.kill()


def test_a_call_that_ends_the_process_is_named():
    script = (
        "import os\nfrom recipes.rewards.outside import seen_from_outside\n"
        "with seen_from_outside('reward that came back', 60.0):\n    pass\n"
        "with seen_from_outside('reward own.leaves', 60.0):\n    os._exit(0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: the run has ended inside of reward own.leaves: by os._exit")
