"""The contract of a reward function: a breach is named before training, and costs single completions during it."""

import asyncio
import functools
import inspect
import math
import re
import signal
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_trainer

from recipes.problems import ConfigError
from recipes.rewards.call import Fault, call, one_line, said, show
from recipes.rewards.contract import (
    FIRST_VERDICT,
    AsyncGuarded,
    ColumnNames,
    Failures,
    Guarded,
    RewardError,
    RewardOptions,
    check,
    choose,
    guard,
    problems,
    too_many,
)
from recipes.rewards.signs import Signs
from recipes.rewards.stuck import watched
from recipes.rewards.time_limit import TimeLimitReached, time_limit
from recipes.rewards.verdicts import judge_all
from recipes.tasks.gsm8k import Gsm8k
from recipes.training.callbacks import SaySigns

ROWS = [{"prompt": f"p{i}", "answer": str(i)} for i in range(3)]
KNOWN = Gsm8k(Gsm8k.Options(), 0).rewards
TEXTS = ["zero", "one", "two"]


def one(completions, **_):
    return [1.0] * len(completions)


def test_the_weighed_functions_in_the_order_of_their_weights():
    known = {"one": one, "two": len, "three": max}
    assert list(choose({"three": 2.0, "one": 0.0}, known).items()) == [("three", max), ("one", one)]


@pytest.mark.parametrize(
    ("rewards", "line"),
    [
        (
            {"correct": 1.0},
            "task.rewards.correct: is no reward of this task (value 1); use tag_count, soft_format, strict_format",
        ),
        ({"correctness": 0.0}, "task.rewards: weighs nothing (value {'correctness': 0.0}); give one"),
        ({}, "task.rewards: weighs nothing (value {}); give one"),
        (
            {"tag_count": 1.0, "correctness": -1e30},
            "task.rewards.correctness: is so large that float32 leaves no other reward a gradient (value -1e+30); give",
        ),
    ],
)
def test_a_wrong_choice_is_one_problem(rewards, line):
    (problem,) = problems(rewards, KNOWN)
    assert problem.line("").startswith(line)


def test_a_function_that_is_not_there_is_a_config_error():
    with pytest.raises(
        ConfigError, match=r"task\.rewards: cannot be imported .*\(value 'nowhere.found'\); put a fun"
    ):
        choose({"nowhere.found": 1.0}, KNOWN)


def test_a_function_of_the_user_from_where_the_run_is_started(tmp_path, monkeypatch):
    source = "def brevity(completions, **columns):\n    return [{} * len(text) for text in completions]\n"
    (tmp_path / "installed").mkdir()
    (tmp_path / "my_own_rewards.py").write_text(source.format(-0.01))
    (tmp_path / "installed" / "my_own_rewards.py").write_text(source.format(7))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    for _ in range(2):
        functions = choose({"my_own_rewards.brevity": 0.1}, KNOWN)
        assert check(functions, ROWS, TEXTS, 5.0) == {"my_own_rewards.brevity": [-0.04, -0.03, -0.03]}
    assert sys.path.count(str(tmp_path)) == 1


def test_what_is_used_where_nothing_is_given():
    options = RewardOptions()
    assert (options.rewards, options.reward_seconds, options.reward_failures) == (None, 10.0, 0.05)
    for key in ("reward_seconds", "reward_failures"):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(options, key, 1.0)


class Columns(ColumnNames):
    answer: str = "answer"


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (RewardOptions, {"reward_seconds": 0.5}, {"reward_seconds": 0.0}),
        (RewardOptions, {"reward_seconds": 3600}, {"reward_seconds": math.inf}),
        (RewardOptions, {"reward_seconds": 1e6}, {"reward_seconds": 1e10}),
        (RewardOptions, {"reward_failures": 0.0}, {"reward_failures": -0.01}),
        (RewardOptions, {"reward_failures": 1.0}, {"reward_failures": 1.01}),
        (RewardOptions, {"reward_failures": 0.5}, {"reward_failures": "0.5"}),
        (RewardOptions, {"rewards": {"one": 2.0}}, {"rewards": {"one": {"two": 2.0}}}),
        (RewardOptions, {}, {"patience": 1.0}),
        (Columns, {"answer": "solution"}, {"answer": b"solution"}),
        (Columns, {}, {"question": "problem"}),
    ],
)
def test_options_that_are_taken_and_refused(kind, taken, refused):
    kind(**taken)
    with pytest.raises(ValidationError):
        kind(**refused)


def test_the_names_of_columns_stay():
    with pytest.raises(ValidationError, match="frozen"):
        Columns().answer = "another"


def test_every_function_is_tried():
    functions = {"one": one, "two": lambda completions, **_: [2.0, None, 0.0]}
    assert check(functions, ROWS, TEXTS, 5.0) == {"one": [1.0] * 3, "two": [2.0, None, 0.0]}
    with pytest.raises(RewardError, match=r"reward two: returned 1\.0"):
        check({"one": one, "two": lambda completions, **_: 1.0}, ROWS, TEXTS, 5.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda completions, **_: [1.0],
            r"reward it: returned 1 values for 3 .*; the first completion was 'zero'",
        ),
        (
            lambda completions, **_: 1.0,
            r"reward it: returned 1\.0; return a list .*; the completion was 'zero'",
        ),
        (lambda completions, **_: ["a"] * len(completions), r"return a list"),
        (lambda completions, **_: [float("nan") if t == "one" else 0 for t in completions], r"nan; .* 'one'"),
        (
            lambda completions, **_: [1 / (t != "two") for t in completions],
            r"raised ZeroDivisionError.*'two'",
        ),
        (
            lambda completions, **_: [time.sleep(9 * (t == "one")) for t in completions],
            r"within 0\.2 s .*'one'",
        ),
    ],
)
def test_every_breach_names_function_and_completion(function, message):
    with pytest.raises(RewardError, match=message):
        check({"it": function}, ROWS, TEXTS, 0.2)


def test_columns_and_none_pass():
    def judge(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
        log_metric("x", 1.0)
        return [None if given == "0" else float(given) for given in answer]

    assert check({"judge": judge}, ROWS, TEXTS, 1.0) == {"judge": [None, 1.0, 2.0]}


def spin():
    while True:
        pass


def test_the_limit_ends_a_busy_loop_and_nothing_after_it():
    with pytest.raises(TimeLimitReached), time_limit(0.1):
        spin()
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_the_limit_holds_where_no_thread_can_be_started():
    """Memory is short: the error was the reward's, or a traceback, and the alarm stayed set."""
    before = threading.stack_size(2**46)  # for which there is no memory
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threading.Thread(target=print).start()
        with pytest.raises(TimeLimitReached), time_limit(0.1):
            spin()
        with watched("the judge", 60.0), time_limit(0.05):
            pass
    finally:
        threading.stack_size(before)
    time.sleep(0.6)
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0.0  # ours would repeat


def test_a_failure_costs_its_completion_and_is_counted():
    def fragile(completions, answer, **_):
        assert len(completions) == len(answer)
        return [1.0 / (len(text) - 3) for text in completions]

    logged = {}
    guarded = Guarded("fragile", fragile, 1.0, share=0.7)
    columns = {"answer": ["a", "b", "c"], "log_metric": logged.__setitem__}
    assert guarded(completions=["four", "one", "two"], **columns) == [1.0, None, None]
    assert (guarded.scored, guarded.failed, logged) == (3, 2, {"reward_failures/fragile": 2.0})
    with pytest.raises(RewardError, match=r"failed on 5 of 6 completions, .*reward_failures 0\.7.*'two'"):
        guarded(completions=["one", "one", "two"], **columns)


def test_the_failures_of_processes_are_added_up():
    """The words about the last one are those of a process that has some."""
    ours, theirs, nobodys = Failures(8, 3, 2, None), Failures(6, 4, 1, "raised"), Failures(4, 0, 0, None)
    assert Failures.of_all([ours, theirs, nobodys]) == (18, 7, 3, "raised")
    assert Failures.of_all([nobodys, nobodys]) == (8, 0, 0, None)


def test_an_early_failure_does_not_stop_the_run():
    def fragile(completions, **_):
        return [1.0 / (text != "bad") for text in completions]

    guarded = Guarded("fragile", fragile, 1.0, share=0.05)
    assert guarded(completions=["bad", *["good"] * 7])[0] is None
    for _ in range(FIRST_VERDICT):
        guarded(completions=["good"] * 8)
    assert guarded.failures == (8 + 8 * 64, 1, 0, None)  # the words are about the last batch
    assert guarded(completions=["bad", *["good"] * 7])[0] is None


def test_trl_trains_on_with_a_reward_that_fails_now_and_then(tmp_path, memhead_in_trl):
    calls = []

    def fragile(completions, **_):
        calls.append(len(completions))
        return [1.0 / (not text.startswith("0")) for text in completions]

    def length(completions, **_):
        return [float(len(text)) for text in completions]

    options = RewardOptions(reward_failures=1.0)
    trainer = tiny_trainer(tmp_path, steps=4)
    trainer.reward_funcs = guard({"fragile": fragile, "length": length}, options)
    trainer.reward_func_names = ["fragile", "length"]
    trainer.train()
    lines = [line for line in trainer.state.log_history if "rewards/fragile/mean" in line]
    assert len(lines) == 4
    failed = sum(line["reward_failures/fragile"] for line in lines)
    assert failed == trainer.reward_funcs[0].failed
    assert failed > 0


class Loud:
    def __float__(self):
        raise RuntimeError("no")

    def __repr__(self):
        raise RuntimeError("never")


def endless(completions, **_):
    while True:
        yield 1.0


def raising(completions, **_):
    yield 1.0
    raise KeyError("late")


def leave(completions, **_):
    sys.exit(3)


def shout(completions, **_):
    raise ValueError("\x1b[31m" + "x" * 200_000 + "\n")


def swallow(completions, **_):
    length = len(completions.pop(0))
    completions.clear()
    return [length] * 3


def stuck_in_c(completions, **_):
    return [float(bool(re.match(r"(a|aa)+$", "a" * 60 + "b"))) for _ in completions]


def retry(completions, **_):
    while True:
        try:
            time.sleep(60)
        except:  # noqa: E722
            continue


class Leaving(Exception):
    def __str__(self):
        sys.exit(4)


def leave_later(completions, **_):
    raise Leaving


async def late(completions, **_):
    await asyncio.sleep(60)


async def own_limit(completions, **_):
    raise TimeoutError("the judge's server is busy")


async def own_cancelled(completions, **_):
    request = asyncio.ensure_future(asyncio.sleep(60))
    request.cancel()
    await request


def log_text(completions, log_metric, **_):
    log_metric("kind", "prose")
    return [1.0] * len(completions)


async def leave_awaited(completions, **_):
    sys.exit(0)


async def cancels_itself(completions, **_):
    asyncio.current_task().cancel()
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (own_limit, r"raised TimeoutError: the judge's server is busy.*'zero'"),
        (own_cancelled, r"raised CancelledError: .*'zero'"),
        (cancels_itself, r"raised CancelledError: .*'zero'"),
        (endless, r"returned more than 1 values for 1 .*'zero'"),
        (raising, r"raised KeyError: 'late'.*'zero'"),
        (leave, r"called sys\.exit\(3\).*'zero'"),
        (log_text, r"raised TypeError: log_metric\('kind', …\) takes a number, not 'prose'; .*'zero'"),
        (leave_awaited, r"called sys\.exit\(0\).*'zero'"),
        (shout, r"raised ValueError: \\x1b\[31mx+….*'zero'"),
        (stuck_in_c, r"did not return within 0\.5 s"),
        (late, r"did not return within 0\.5 s"),
        (retry, r"did not return within 0\.5 s"),
        (leave_later, r"raised Leaving: .*'zero'"),
        (lambda completions, **_: None, r"returned None; return a list"),
        (lambda completions, **_: "111", r"returned '111'; return a list"),
        (lambda completions, **_: dict.fromkeys(completions, 1.0), r"returned \{.*; return a list"),
        (lambda completions, **_: {1.0, 2.0, 3.0}, r"returned \{.*; return a list"),
        (lambda completions, **_: late(completions), r"returned a coroutine; declare .* async def"),
        (lambda completions, **_: [0, "0.5", 0], r"returned the text '0\.5'; return a list .*'one'"),
        (lambda completions, **_: [0, 0, 10**400], r"returned <int>|returned 1000.*; return a list .*'two'"),
        (lambda completions, **_: [0, 1e20, 0], r"returned 1e\+20, beside which float32 .*'one'"),
        (lambda completions, **_: [0, -1e300, 0], r"returned -1e\+300, .*'one'"),
        (lambda completions, **_: [0, float("inf"), 0], r"returned inf; .*'one'"),
        (lambda completions, **_: [0, 1j, 0], r"returned 1j; .*'one'"),
        (lambda completions, **_: numpy.array([0, 1j, 0]), r"returned np.complex128\(.*'zero'"),
        (lambda completions, **_: bytearray(b"111"), r"returned bytearray\(b'111'\); return a list"),
        (lambda completions, **_: [0, [1.0], 0], r"returned \[1\.0\]; .*'one'"),
        (lambda completions, **_: [0, Loud(), 0], r"returned <Loud.*; return a list .*'one'"),
    ],
)
def test_whatever_a_function_does_is_one_line(function, message):
    started = time.monotonic()
    with pytest.raises(RewardError, match=message) as raised:
        check({"it": function}, ROWS, TEXTS, 0.5)
    assert time.monotonic() - started < 5
    line = str(raised.value)
    assert line.startswith("reward it: ")
    assert line.isprintable()
    assert len(line) < 1000


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (lambda completions, **_: (float(len(text)) for text in completions), [4.0, 3.0, 3.0]),
        (lambda completions, **_: numpy.array([1, 2, 3], dtype=numpy.float32), [1.0, 2.0, 3.0]),
        (lambda completions, **_: torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [1.0, 2.0, 3.0]),
        (lambda completions, **_: (True, Fraction(1, 2), None), [1.0, 0.5, None]),
        (lambda completions, **_: [None] * 3, [None] * 3),
        (swallow, [4.0] * 3),
    ],
)
def test_what_is_a_list_of_numbers_passes(function, values):
    assert check({"it": function}, ROWS, TEXTS, 5.0) == {"it": values}
    (guarded,) = guard({"it": function}, RewardOptions())
    assert guarded(completions=TEXTS, answer=["0"] * 3) == values


def test_a_function_that_empties_its_columns_takes_nothing_from_the_next():
    answers = ["0", "1", "2"]
    (guarded,) = guard(
        {"it": lambda completions, answer, **_: [float(answer.pop()) for _ in completions]}, RewardOptions()
    )
    assert guarded(completions=TEXTS, answer=answers) == [2.0, 1.0, 0.0]
    assert answers == ["0", "1", "2"]


def test_what_a_function_sets_for_all_of_the_process_is_undone(tmp_path, monkeypatch):
    changes = "import os, torch\nos.chdir('/')\ntorch.set_grad_enabled(False)\n"
    as_function = "".join(f"    {line}\n" for line in changes.splitlines())
    source = f"{changes}def one(completions, **_):\n{as_function}    return [1.0] * len(completions)\n"
    (tmp_path / "that_sets_much.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    functions = choose({"that_sets_much.one": 1.0}, KNOWN)

    def stands():
        return torch.is_grad_enabled() and Path.cwd() == tmp_path

    try:
        assert stands()
        check(functions, ROWS, TEXTS, 5.0)
        assert stands()
        assert guard(functions, RewardOptions())[0](completions=TEXTS) == [1.0] * 3
        assert stands()
    finally:
        torch.set_grad_enabled(True)


def test_a_hanging_completion_costs_twice_the_limit_and_no_other_completion():
    def hangs(completions, **_):
        return [time.sleep(60 * (text == "bad")) or 1.0 for text in completions]

    guarded = Guarded("hangs", hangs, 0.8, share=1.0)
    started = time.monotonic()
    texts = ["good", "bad", *["good"] * 6]
    assert guarded(completions=texts) == [1.0, None, *[1.0] * 6]
    assert time.monotonic() - started < 4
    guarded = Guarded("hangs", hangs, 0.8, share=1.0)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"failed on 32 of 32 .*did not return within 0\.8 s"):
        Guarded("hangs", hangs, 0.8, share=0.1)(completions=["bad"] * 32)
    assert time.monotonic() - started < 8


def test_a_coroutine_is_guarded_too():
    async def fragile(completions, **_):
        return [1.0 / (text != "one") for text in completions]

    options = RewardOptions(reward_failures=1.0)
    guarded, partly = guard({"fragile": fragile, "partly": functools.partial(fragile, x=1)}, options)
    assert isinstance(partly, AsyncGuarded)
    assert inspect.iscoroutinefunction(type(guarded).__call__)
    assert asyncio.run(guarded(completions=TEXTS)) == [1.0, None, 1.0]
    assert (guarded.scored, guarded.failed) == (3, 1)
    with pytest.raises(RewardError, match=r"raised ZeroDivisionError.*'one'"):
        check({"fragile": fragile}, ROWS, TEXTS, 5.0)


def test_ctrl_c_passes_through():
    def interrupted(completions, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard({"it": interrupted}, RewardOptions())[0](completions=TEXTS)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            "import nowhere_at_all\n",
            r"it raised ModuleNotFoundError: .*; mend broken_rewards, which is there",
        ),
        ("def brevity(:\n", r"it raised SyntaxError: .*; mend broken_rewards"),
        ("1 / 0\n", r"it raised ZeroDivisionError: .*; mend broken_rewards"),
        ("raise SystemExit(0)\n", r"it called sys\.exit\(0\)\).*; mend broken_rewards"),
        ("brevity = 3\n", r"is no function"),
        (
            "class brevity: ...\n",
            r"is a class, no function .*; make one there, .* name broken_rewards\.judge",
        ),
        ("", r"it raised AttributeError: .*; put a function brevity into broken_rewards\.py"),
    ],
)
def test_a_module_that_fails_on_import_is_a_config_error(tmp_path, monkeypatch, source, line):
    (tmp_path / "broken_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_rewards", raising=False)
    with pytest.raises(ConfigError, match=line) as raised:
        choose({"broken_rewards.brevity": 1.0}, KNOWN)
    assert len(raised.value.lines) == 1


def test_the_limit_gives_an_alarm_of_the_caller_back():
    rang = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(TimeLimitReached), time_limit(0.1):
        spin()
    time.sleep(0.8)
    signal.signal(signal.SIGALRM, previous)
    assert rang == [1]


def test_the_limit_ends_what_keeps_the_interpreter():
    with pytest.raises(TimeLimitReached), time_limit(0.3):
        re.match(r"(a|aa)+$", "a" * 60 + "b")


def test_code_that_catches_the_limit_and_goes_on_is_told_again():
    caught = []
    with time_limit(0.2):
        while len(caught) < 2:
            try:
                spin()
            except BaseException as error:
                caught.append(type(error))
    assert caught == [TimeLimitReached] * 2


def test_an_evaluation_has_the_limits_of_training():
    rows = [{"answer": "a"}] * 100

    def judge(completion, row):
        return spin() if completion == "hangs" else completion == row["answer"]

    options = RewardOptions(reward_seconds=0.1, reward_failures=0.02)
    texts = ["a", "hangs", "b", *["a"] * 97]
    assert judge_all(judge, texts, rows, options) == [True, False, False, *[True] * 97]
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"judge: did not return within 0\.1 s .* on 2 of 50 .*was 'hangs'"):
        judge_all(judge, [*["a"] * 48, *["hangs"] * 52], rows, options)
    assert time.monotonic() - started < 5


def logs(**figures):
    return {"loss": 0.1, "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.0, **figures}


def test_signs_are_said_once_and_only_where_they_stand():
    signs = Signs()
    assert signs.read(1, logs()) == []
    assert "cancel out" in Signs().read(1, logs(loss=0.0))[0]
    assert signs.read(2, logs(loss=0.0)) == []
    (equal,) = signs.read(3, logs(frac_reward_zero_std=1.0))
    assert equal.startswith("Step 3: within each group")
    assert signs.read(4, logs(frac_reward_zero_std=1.0)) == []
    (cut,) = signs.read(5, logs(**{"completions/clipped_ratio": 1.0}))
    assert "grpo.max_completion_length" in cut
    assert signs.read(6, {"completions/clipped_ratio": 1.0}) == []  # an evaluation's log


def test_a_reward_constant_from_the_start_is_named():
    signs = Signs()
    for step in range(1, 8):
        figures = {
            "rewards/flat/mean": 0.5,
            "rewards/flat/std": 0.0,
            "rewards/moves/mean": 0.1 * step,
            "rewards/moves/std": 0.0,
            "rewards/spread/mean": 0.5,
            "rewards/spread/std": 0.2,
            "rewards/silent/mean": float("nan"),
            "rewards/silent/std": float("nan"),
        }
        said = signs.read(step, logs(**figures))
        assert [sentence.split(" up to")[0] for sentence in said] == (
            ["Reward flat gave every completion 0.5", "Reward silent gave every completion None"]
            if step == 5
            else []
        )


def test_the_trainers_logs_reach_the_terminal_of_the_main_process(capsys):
    for main, count in ((True, 1), (False, 0)):
        callback, state = SaySigns(), SimpleNamespace(is_world_process_zero=main, global_step=2)
        for _ in range(2):
            callback.on_log(None, state, None, logs=logs(frac_reward_zero_std=1.0))
        said = capsys.readouterr().out.count("within each group all completions earned the same")
        assert said == count


def test_completions_that_never_end_are_told_from_a_few_that_are_cut():
    signs, cut = Signs(), logs(**{"completions/clipped_ratio": 1.0})
    said = [signs.read(step, cut) for step in range(2, 8)]
    assert [len(sentences) for sentences in said] == [1, 0, 0, 0, 1, 0]
    assert "end token" in said[4][0]
    signs = Signs()
    for step in range(2, 20):  # one that ends now and then
        found = signs.read(step, logs(**{"completions/clipped_ratio": 0.9 if step % 4 == 0 else 1.0}))
        assert not any("ended by itself" in sentence for sentence in found)


@pytest.mark.parametrize("value", [1e9, -1e9, 0, True, 1e-300])
def test_the_largest_reward_that_is_taken(value):
    assert call(lambda completions: [value], ["x"], {}, 1.0) == [float(value)]


@pytest.mark.parametrize(
    "value", [1_000_000_001, -1_000_000_001, 1e18, math.inf, -math.inf, math.nan, 10**400]
)
def test_a_reward_that_is_too_large_or_no_number_is_a_fault(value):
    found = call(lambda completions: [0.5, value], ["x", "y"], {}, 1.0)
    assert isinstance(found, Fault)
    assert found.index == 1


@pytest.mark.parametrize(
    ("failed", "scored", "share", "stops"),
    [
        (3, 10, 0.05, False), (4, 10, 0.05, True),  # of 64 at least: 3.2
        (1, 1, 0.05, True), (1, 2, 0.05, False), (2, 3, 0.05, True),  # more than half at any time
        (10, 60, 0.155, True), (10, 60, 0.157, False),  # of 64, 9.92 and 10.05 are allowed
        (5, 100, 0.05, False), (6, 100, 0.05, True),
        (32, 64, 0.5, False), (33, 64, 0.5, True), (50, 100, 0.5, False), (51, 100, 0.5, True),
        (0, 10, 0.0, False), (1, 1000, 0.0, True), (10, 10, 1.0, False),
    ],
)  # fmt: skip
def test_how_many_failures_are_too_many(failed, scored, share, stops):
    assert too_many(failed, scored, share) is stops


def test_what_is_shown_has_300_characters_at_most():
    assert one_line("x" * 300) == "x" * 300
    assert one_line("x" * 301) == "x" * 299 + "…"
    assert show("x" * 298) == repr("x" * 298)
    assert show("x" * 299) == ("'" + "x" * 298) + "…"
    assert one_line("\x1b" * 100) == "\\x1b" * 74 + "\\x1…"  # of what is shown in their place
    assert said(SystemExit("x" * 100)) == "called sys.exit('" + "x" * 58 + "…)"
    assert show(10**5000).startswith("<int")


@pytest.mark.parametrize(
    ("given", "count"),
    [([1.0], "1"), ([1.0] * 5, "5"), (iter([1.0]), "1"), (iter([1.0] * 3), "more than 2")],
)
def test_how_many_values_were_returned(given, count):
    fault = f"returned {count} values for 2 completion(s); return one for each"
    assert call(lambda completions: given, ["x", "y"], {}, 1.0) == Fault(fault)
