"""Several real processes over gloo: the same numbers as one, in one run."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import on_ranks
import pytest
import ready
import torch
from children import wait_for
from launched import torchrun
from safetensors.torch import load_file
from test_quickstart import CONFIG, TINY
from tiny import saved_llama

import train_grpo
from benchmarks import multi_gpu
from recipes import processes
from recipes.models.manifest import damage, seal
from recipes.tracking.run_folder import RunFolder


def run_cases(world, folder, names):
    """What each process found by case, and what one process finds on the whole batch."""
    process = torchrun(world, on_ranks.__file__, folder, *names)
    cases = {name: on_ranks.CASES[name] for name in names if name in on_ranks.CASES}
    alone = {name: on_ranks.ALONE[name] for name in dict.fromkeys(case.alone for case in cases.values())}
    expected = on_ranks.results(on_ranks.global_rollout(world), folder / "alone", alone)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(world)], expected, folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    names = [*on_ranks.CASES, *on_ranks.TOGETHER, on_ranks.BENCHMARK]
    folder = tmp_path_factory.mktemp("two")
    (folder / "multi.json").write_text('{"rows": [], "failed": {}}')
    on_ranks.benchmark(folder, "one")  # which the other compares with
    return run_cases(2, folder, names)


@pytest.mark.parametrize("case", on_ranks.CASES)
def test_two_processes_end_equal_and_as_one(ranks, case):
    compare(ranks[0], ranks[1], case)


def test_so_do_three(tmp_path):
    names = ["trl", "packed", "packed, split head"]
    found = run_cases(3, tmp_path, names)
    for name in names:
        compare(found[0], found[1], name)


def compare(together, alone, case):
    first, expected = together[0][case], alone[on_ranks.CASES[case].alone]
    for name, value in first["weights"].items():
        for other in together[1:]:
            assert torch.equal(other[case]["weights"][name], value), name
        torch.testing.assert_close(value, expected["weights"][name], rtol=0, atol=1e-8)  # float32 normalisers
    for log, one in zip(first["logs"], expected["logs"], strict=True):
        for name in ("loss", "grad_norm"):
            assert log[name] == pytest.approx(one[name], rel=1e-6, abs=1e-7), name
        assert log.get("step/tokens_real") == one.get("step/tokens_real")
        if one.get("step/left_out"):  # else it is the mean of micro-batches' means, which are others
            assert log["entropy"] == pytest.approx(one["entropy"], rel=1e-6)


def test_the_benchmark_compares_two_processes_with_one(ranks):
    """The stages of benchmarks.multi_gpu but for FSDP2, on a toy."""
    found = json.loads((ranks[2] / "multi.json").read_text())
    one, two = ([row for row in found["rows"] if row["stage"] == stage] for stage in ("one", "ddp"))
    assert [row["step"] for row in one] == ["packed", "trl", "full"]
    assert [row["step"] for row in two] == ["packed", "packed", "trl", "full"]
    for row in [*one[1:], *two]:
        assert row["gradient_error"] < 1e-5
        assert row["loss"] == pytest.approx(one[0]["loss"], abs=1e-6)
    assert multi_gpu.tables(found).count("| toy | 2 | ddp: ") == len(two)


def test_steps_change_the_weights(ranks):
    """So that the test above compares something."""
    start = on_ranks.new_model().state_dict()
    assert all(
        (value - start[name]).abs().max() > 1e-4 for name, value in ranks[0][0]["trl"]["weights"].items()
    )


def test_a_split_head_has_the_entropy_bonus_of_a_whole_one(ranks):
    split, whole = (ranks[0][1][f"entropy, {which} head"] for which in ("split", "whole"))
    for name, value in split["weights"].items():
        torch.testing.assert_close(value, whole["weights"][name], rtol=0, atol=1e-9)
    assert [log["entropy"] for log in split["logs"]] == pytest.approx(
        [log["entropy"] for log in whole["logs"]]
    )
    assert split["logs"][-1]["loss"] != pytest.approx(ranks[0][1]["packed"]["logs"][-1]["loss"], abs=1e-3)


@pytest.mark.parametrize("step", ["trl", "packed"])
def test_bfloat16_in_parts_is_bfloat16_whole(ranks, step):
    """Log-probabilities come in float32, and gradients add up in it: accelerate's own policy is off by a hundredth."""
    whole, parts = (ranks[0][0][f"{step}, bfloat16{sharded}"] for sharded in ("", ", sharded"))
    for log, other in zip(whole["logs"], parts["logs"], strict=True):
        assert other["grad_norm"] == pytest.approx(log["grad_norm"], rel=1e-5)
    for name, value in parts["weights"].items():
        torch.testing.assert_close(value, whole["weights"][name], rtol=0, atol=1e-6)


def test_what_fsdp_saves_is_whole(ranks):
    together, _, folder = ranks
    place = folder / "saved, sharded" / "checkpoints"
    saved = load_file(place / "final" / "model.safetensors")
    assert all(
        torch.equal(saved[name], value) for name, value in together[0]["saved, sharded"]["weights"].items()
    )
    for step in (2, on_ranks.STEPS):
        assert damage(place / f"checkpoint-{step}") == ""
        assert (place / f"checkpoint-{step}" / "optimizer.bin").is_file()
    assert load_file(place / "checkpoint-3" / "model.safetensors").keys() == saved.keys()


@pytest.mark.parametrize("case", ["trl, sharded", "packed, sharded", "lora, sharded"])
def test_fsdp_gathers_the_weight_of_the_head_once_for_each_of_its_calls(ranks, case):
    """With the last norm by FSDP2, or alone by TRL, where PEFT's wrapper hides the norm from accelerate. Never a part
    of it, nor again for the backward pass, as the embedding is, which has its size."""
    found = ranks[0][0][case]
    rows, width = on_ranks.new_model().lm_head.weight.shape
    whole = 2 * math.ceil(rows / 2) * width  # FSDP2 makes the parts equal
    gathers, calls = Counter(found["gathers"]), found["calls"]
    with_norm, alone, norm = (gathers.pop(n, 0) for n in (whole + width, whole, width))
    (layers,) = gathers.values()  # of two, forward and backward; nothing of another size is gathered
    others, rest = divmod(layers - 2 * 2 * calls, 2)  # forward passes that look whether the model is finite
    assert rest == 0
    assert others >= 0
    if case == "lora, sharded":
        assert (with_norm, norm) == (0, calls)
        assert (2 + 1) * calls <= alone <= (2 + 1) * calls + 2 * others
    else:
        assert (with_norm, norm) == (calls + others, 0)
        assert alone == 2 * calls + others


def ranks_of(launcher):
    """Their process ids."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def start_run(folder, *more, start=ready.python):
    """A run in two processes, and its arguments."""
    arguments = arguments_of(folder, *more)
    return torchrun(2, "train_grpo.py", *arguments, start=start), arguments


def arguments_of(folder, *more):
    """Of a run that checks, saves and evaluates much."""
    changed = ("grpo.max_steps", "run.warm_start.", "run.evaluation.", "grpo.per_device")
    kept = [setting for setting in TINY if not setting.startswith(changed)]
    given = {setting.partition("=")[0] for setting in more}
    common = [
        "grpo.max_steps=200", "grpo.per_device_train_batch_size=8", "run.save_every=1",
        "run.evaluation.size=15", "run.evaluation.every=1", "run.evaluation.samples=2", f"run.output_root={folder}",
    ]  # fmt: skip
    common = [setting for setting in common if setting.partition("=")[0] not in given]
    return ["--config", CONFIG, *kept, *common, *more]


def test_a_run_is_one_and_ends_by_ctrl_c_with_a_checkpoint(tmp_path, capsys):
    warm = ["run.warm_start.steps=2", "run.warm_start.batch_size=8", "run.warm_start.check_every=2"]
    process, arguments = start_run(tmp_path, *warm, start=ready.anew)
    begun = wait_for(process, "step 2: accuracy")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    lines = "".join([*begun, output])
    for once in (
        "warm start  step 2",
        "step: packed",
        "worst case",
        "Stopping after",
        "Stopped at step",
        "torchrun --npr",
    ):
        assert lines.count(once) == 1, (once, lines)

    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    folder = RunFolder(tmp_path / "tiny")
    records = [record for record in folder.metrics.read() if "warm_start" not in record]
    last = records[-1]["step"]
    assert [record["step"] for record in records] == list(range(last + 1))
    assert folder.step == last >= 2
    assert records[1]["accuracy_problems"] == 15
    assert records[1]["trl"]["num_tokens"] > 2 * 8 * 6  # of both
    for phase, figures in records[1]["memory"].items():
        for name, value in figures.items():
            assert value == max(own[phase][name] for own in records[1]["memory_by_process"])
    assert len(records[1]["memory_by_process"]) == 2
    assert folder.read_json("environment.json")["processes"] == 2
    assert sorted(path.name for path in folder.checkpoint.glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]

    longer = [argument.replace("max_steps=200", f"max_steps={last + 1}") for argument in arguments]
    assert train_grpo.main([*longer, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "processes: 1 from here on, 2 before" in printed
    assert folder.metrics.read()[-1]["step"] == last + 1


WHO_CHECKS = """
import os, sys, train_grpo
from recipes.training import head_check, rewards
def told(module, name):
    original = getattr(module, name)
    def call(*args, **options):
        print(name, "by", os.environ["RANK"], file=sys.stderr, flush=True)
        return original(*args, **options)
    setattr(module, name, call)
told(head_check, "check_head")
told(rewards, "check")
sys.exit(train_grpo.main(sys.argv[1:]))
"""


def test_a_run_goes_on_in_more_processes(tmp_path):
    """One of them checks the head and the rewards' contract, each time."""
    short = ["run.warm_start=null", "run.evaluation.samples=0"]
    script = tmp_path / "who.py"
    script.write_text(WHO_CHECKS)
    for count, steps in ((2, 2), (3, 3)):
        arguments = [*arguments_of(tmp_path, *short), *["--resume"] * (count == 3)]
        arguments = [argument.replace("max_steps=200", f"max_steps={steps}") for argument in arguments]
        process = torchrun(count, script, *arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        for what in ("check_head by ", "check by "):
            assert output.count(what) == output.count(f"{what}0") == 1, output
    assert (
        output.count("checkpoint-2 has random states of 2 process(es): sampling goes on from the seed") == 1
    )
    folder = RunFolder(tmp_path / "tiny")
    assert [record["step"] for record in folder.metrics.read()] == [0, 1, 2, 3]
    assert len(folder.metrics.read()[-1]["memory_by_process"]) == 3
    assert folder.step == 3
    assert (folder.final / "tokenizer.json").is_file()
    assert damage(folder.final, parts={}) == ""


def test_a_pilot_is_for_one_process(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        train_grpo.main(["--config", CONFIG, "--pilot"])
    assert "--pilot: is for one process, and a launcher started 2; start it" in capsys.readouterr().err


WHO_READS = """
import hashlib, os, sys, train_grpo
digest = hashlib.file_digest
def told(file, name):
    print("read by", os.environ["RANK"], os.path.basename(file.name), file=sys.stderr, flush=True)
    return digest(file, name)
hashlib.file_digest = told
sys.exit(train_grpo.main(sys.argv[1:]))
"""


def test_one_process_reads_a_sealed_model_for_all_and_says_what_is_wrong(tmp_path):
    place, script = tmp_path / "model", tmp_path / "who.py"
    script.write_text(WHO_READS)
    saved_llama(place)
    seal(place)
    for change, status in ((lambda data: data, 0), (lambda data: data[:-1] + bytes([data[-1] ^ 1]), 1)):
        weights = place / "model.safetensors"
        weights.write_bytes(change(weights.read_bytes()))
        words = [*arguments_of(tmp_path, "run.warm_start=null"), "--evaluate", place]
        process = torchrun(2, script, *words)
        output, _ = process.communicate(timeout=100)
        assert process.returncode == status, output
        assert output.count("read by 0 model.safetensors") == 1, output
        assert output.count("read by 1 model.safetensors") == 0, output
        refused = f"{place}: model.safetensors is not what was written (another sha256); put back what was"
        assert output.count(refused) == status


HELD_IN_A_CYCLE = """
import sys
from pathlib import Path
import torch.distributed as dist
from trl import GRPOConfig
from recipes import processes
GRPOConfig(output_dir=sys.argv[1], use_cpu=True, bf16=False, report_to="none")  # makes the group
held = [dist.distributed_c10d._get_default_group()]
held.append(held)  # as DDP holds it
del held
assert processes.by_main(lambda: 1) == 1
processes.end()
sys.exit("gloo" in " ".join(map(Path.read_text, Path("/proc/self/task").glob("*/comm"))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that lets go of a tensor when Python has begun to end aborts the process."""
    (tmp_path / "held.py").write_text(HELD_IN_A_CYCLE)
    process = torchrun(2, tmp_path / "held.py", tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


def test_what_its_threads_hold_is_let_go_before_the_group(monkeypatch):
    """Else both wait for ever: the thread for the interpreter, who drops the group for the thread's lock."""
    left, done = threading.Event(), []
    worker = threading.Thread(target=lambda: (left.wait(), done.append("let go")))
    worker.start()
    monkeypatch.setattr(processes, "_together", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", left.set)
    monkeypatch.setattr(gc, "collect", lambda: done.append("dropped"))
    usual = sys.getswitchinterval()
    sys.setswitchinterval(30)  # seconds that one keeps the interpreter unless it gives it away
    try:
        processes.end()
    finally:
        sys.setswitchinterval(usual)
    worker.join()
    assert done == ["let go", "dropped"]


IN_FLIGHT = """
import atexit, sys, time, torch
import torch.distributed as dist
from trl import GRPOConfig
from recipes import processes
from recipes.stops import leave, stopped_in_a_line
GRPOConfig(output_dir=sys.argv[1], use_cpu=True, bf16=False, report_to="none")  # makes the group
processes.gathered(1)
if processes.rank() == 0:
    time.sleep(100)

@stopped_in_a_line
def main(how):
    dist.all_reduce(torch.ones(1), async_op=True)  # as DDP's in a backward pass
    if how == "a fault":
        raise KeyError(how)
    processes.complain("error: alone")
    if how == "in order":
        processes.end()
    return 1

atexit.register(print, "left in order")
leave(main(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("how", "said", "start"),
    [
        ("in order", "error: alone", ready.python),
        ("at once", "error: alone", ready.anew),  # others end without taking their modules apart
        ("a fault", "KeyError: 'a fault'", ready.anew),
    ],
)
def test_a_process_that_ends_alone_waits_for_nothing_in_flight(tmp_path, how, said, start):
    """Python would take the group apart, which waits for the others."""
    (tmp_path / "flight.py").write_text(IN_FLIGHT)
    process = torchrun(2, tmp_path / "flight.py", tmp_path, how, start=start)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.count(said) == output.count("left in order") == 1, output


NEVER_COMES = """
import os, sys, time
if os.environ["RANK"] == "1":
    time.sleep(100)
import train_grpo
from recipes.training import preflight
check = preflight.check
def told(config):
    print("waiting", flush=True)
    check(config)
preflight.check = told
sys.exit(train_grpo.main(sys.argv[1:]))
"""


def test_ctrl_c_ends_a_process_that_waits_for_one_that_never_comes(tmp_path):
    """The launcher would kill it after half a minute, without a word."""
    (tmp_path / "never.py").write_text(NEVER_COMES)
    process = torchrun(2, tmp_path / "never.py", *arguments_of(tmp_path))
    wait_for(process, "waiting")
    time.sleep(3)  # until it is in torch's hands; before, it ends in another sentence
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert output.count("Stopped before all processes of this run were there") == 1, output


AGREED = """
import contextlib, io, os, sys, time
import torch.distributed as dist
from trl import GRPOConfig
from recipes import processes
from recipes.processes import anywhere, by_main, first, gathered, is_first_with, mine, smallest, whole
GRPOConfig(output_dir=sys.argv[1], use_cpu=True, bf16=False, report_to="none")  # makes the group
rank, others = processes.rank(), range(5)

assert gathered(10 * rank) == [0, 10]
assert (smallest(3 - rank), anywhere(rank == 1), anywhere(False)) == (2, True, False)
assert (first("" if rank else None), first(None), first(rank)) == ("", None, 0)
assert whole([7 * number for number in mine(others)], 5) == [7 * number for number in others]

assert (by_main(processes.count), processes.count()) == (1, 2)  # inside it one is alone, and only there
for _ in range(2):
    try:
        by_main(lambda: 1 / 0)
    except processes.MainFailed:
        assert rank == 1
    except ZeroDivisionError:
        assert rank == 0
    else:
        raise AssertionError("nothing was raised")
    assert gathered(rank) == [0, 1]

def in_turn(action):  # the second process first
    found = [action()] if rank == 1 else []
    gathered(None)
    found += [action()] if rank == 0 else []
    gathered(None)
    return found[0]

def said(action):
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        began = time.monotonic()
        action()
    assert time.monotonic() - began < 2  # nobody waits for who has spoken
    return heard.getvalue()

def raised(error):
    try:
        processes.blame(error, "go on")
    except ValueError as found:
        return found is error
    return False

assert in_turn(lambda: is_first_with("made up")) is (rank == 1)
assert is_first_with("made up") is (rank == 1)  # asked again
if rank == 0:
    assert is_first_with("something else")  # which nobody has asked
assert in_turn(lambda: raised(ValueError("a fault of our own"))) is (rank == 1)
gone = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")
text = "error: another process of this run has ended; go on\\n" * (rank == 1)
assert in_turn(lambda: said(lambda: processes.blame(gone, "go on"))) == text
assert processes.lost_another(RuntimeError("Timed out waiting 3000ms for recv operation to complete"))
assert processes.lost_another(dist.DistError("NCCL")) and not processes.lost_another(ValueError("x"))

processes._PATIENCE = 0.3
began = time.monotonic()
processes.let_the_first_speak()
assert time.monotonic() - began >= 0.3
os.environ["LOCAL_RANK"] = "0"  # the first of its machine
with processes.only_main_speaks():
    print("heard", rank, flush=True)
gathered(None)
"""


def test_what_processes_tell_each_other(tmp_path):
    (tmp_path / "agreed.py").write_text(AGREED)
    process = torchrun(2, tmp_path / "agreed.py", tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (output.count("heard 0"), output.count("heard 1")) == (1, 0)


BROKEN = """
import sys, train_grpo
train_grpo.begin = lambda *_, **__: 1 / 0
sys.exit(train_grpo.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("more", "once"),
    [
        (["--nope"], "error: unrecognized arguments: --nope"),
        (["--plan"], "tiny: a bin of"),
        (["--evaluate", "nowhere"], "nowhere: there is no such folder"),
        (
            ["grpo.learning_rate=1e30", "grpo.warmup_steps=0", "grpo.max_grad_norm=0"],
            "error: evaluation: the model has diverged",
        ),
        ([], "ZeroDivisionError: "),
    ],
    ids=["usage", "plan", "evaluation", "divergence", "a fault of our own"],
)
def test_what_all_processes_find_is_said_once(tmp_path, more, once):
    (tmp_path / "broken.py").write_text(BROKEN)
    script = "train_grpo.py" if more else tmp_path / "broken.py"
    process = torchrun(2, script, *arguments_of(tmp_path, "run.warm_start=null"), *more)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (1 if more != ["--plan"] else 0)
    assert output.count(once) == 1, output


FAULTS = {
    "a judge": """
def measured(config, place):
    config.grpo_config(place)  # makes the group
    return processes.by_main(lambda: int("judge"))
evaluation.evaluate_checkpoint = measured
""",
    "a lost process": """
def measured(config, place):
    config.grpo_config(place)
    if processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return processes.gathered(1)
evaluation.evaluate_checkpoint = measured
""",
    "a late process": """
def measured(config, place):
    config.grpo_config(place)
    if processes.rank() == 1:
        time.sleep(100)
    return processes.gathered(1)
evaluation.evaluate_checkpoint = measured
""",
    "SIGTERM": """
def measured(config, place):
    config.grpo_config(place)
    if processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return processes.gathered(1)
evaluation.evaluate_checkpoint = measured
""",
    "a long evaluation": """
def measured(config, place):
    config.grpo_config(place)
    if processes.is_main():
        print("measuring", flush=True)
    time.sleep(100)
evaluation.evaluate_checkpoint = measured
""",
    "sampling": """
sample = torch.multinomial
def multinomial(probabilities, **options):
    at_fault = processes.rank() == 1 and (out / "tiny/checkpoints/checkpoint-1/manifest.json").is_file()
    return sample(probabilities * math.nan if at_fault else probabilities, **options)
torch.multinomial = multinomial
""",
    "a reward": """
from recipes.tasks.countdown import Countdown
def correct(self, completions, trainer_state, **_):
    if trainer_state is not None and (processes.rank() == 1 or trainer_state.global_step >= 2):
        raise KeyError("answer")
    return [0.0] * len(completions)
Countdown.correct = correct
""",
    "Ctrl-C": """
compute = trl.GRPOTrainer._compute_loss
def interrupted(self, *arguments, **options):
    if processes.rank() == 1 and self.state.global_step == 1:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    return compute(self, *arguments, **options)
trl.GRPOTrainer._compute_loss = interrupted
""",
}
FAULTY = """
import math, os, signal, sys, time, torch, trl, train_grpo
from pathlib import Path
from recipes import processes
from recipes.training import evaluation
out = Path(__file__).parent
{fault}
sys.exit(train_grpo.main(sys.argv[1:]))
"""


def start_faulty(folder, fault, *more):
    (folder / "faulty.py").write_text(FAULTY.format(fault=FAULTS[fault]))
    short = ["run.warm_start=null", "run.evaluation.samples=0", "run.checks=false"]
    return torchrun(2, folder / "faulty.py", *arguments_of(folder, *short), *more)


def faulty(folder, fault, *more):
    """What a run in two processes says, in which one of them has met the fault."""
    process = start_faulty(folder, fault, *more)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "[rank" not in output  # a traceback of torch's, for each process
    assert "gloo" not in output
    return output


@pytest.mark.parametrize(
    ("fault", "once"),
    [
        ("a judge", "error: invalid literal for int() with base 10: 'judge'"),
        ("a lost process", "error: another process of this run has ended; run the same command again"),
        (
            "SIGTERM",
            "Stopped, by a signal or since another process of this run has ended; the same command begins",
        ),
    ],
)
def test_an_evaluation_that_fails_in_one_process_is_one_line(tmp_path, fault, once):
    assert faulty(tmp_path, fault, "--evaluate", "final").count(once) == 1


def test_a_process_that_hangs_is_waited_for_as_long_as_was_said(tmp_path):
    output = faulty(tmp_path, "a late process", "grpo.ddp_timeout=3", "--evaluate", "final")
    assert output.count("error: another process of this run has ended") == 1, output


def test_a_model_that_one_process_alone_cannot_sample_from_is_not_resumed_from(tmp_path):
    output = faulty(tmp_path, "sampling")
    assert output.count("error: step 2, generation: the model has diverged") == 1, output
    assert "diverged from there" in damage(tmp_path / "tiny" / "checkpoints" / "checkpoint-1")
    assert (tmp_path / "tiny" / "report.html").is_file()


def test_a_rewards_failures_are_those_of_all_processes(tmp_path):
    """In the first two steps a half fails, that of one process, of which 0.6 allows; then all do."""
    output = faulty(tmp_path, "a reward", "task.reward_failures=0.6")
    assert output.count("error: reward correct: failed on 32 of 48 completions") == 1, output
    steps = [record for record in RunFolder(tmp_path / "tiny").metrics.read() if record["step"] > 0]
    assert [record["trl"]["reward_failures/correct"] for record in steps] == [8.0, 8.0]


def test_a_second_ctrl_c_ends_a_process_without_the_others(tmp_path):
    """What they do together would meet something else in them."""
    output = faulty(tmp_path, "Ctrl-C")
    assert output.count("Stopped at once. To go on: the same command --resume") == 1, output
    assert RunFolder(tmp_path / "tiny").step == 1
    assert (tmp_path / "tiny" / "report.html").is_file()


@pytest.mark.parametrize(
    ("which", "once"),
    [
        (0, "error: another process of this run has ended; run the same command again"),
        (
            1,
            "Stopped before training began, by a signal or since another process of this run has ended; run the same",
        ),
    ],
    ids=["the one that trains", "one that waits"],
)
def test_a_process_killed_in_the_warm_start_ends_the_others_in_a_sentence(tmp_path, which, once):
    process, _ = start_run(
        tmp_path, "run.warm_start.steps=100000", "run.warm_start.batch_size=8", "run.warm_start.check_every=2"
    )
    wait_for(process, "warm start  step 2")
    os.kill(ranks_of(process)[which], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.count(once) == 1, output
    assert "gloo" not in output


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="where a process hears of its parent's end")
def test_a_launcher_that_is_killed_takes_the_run_with_it_in_order(tmp_path):
    """Its processes are in sessions of their own, and would go on unseen."""
    process, _ = start_run(tmp_path, "run.warm_start=null", "grpo.max_steps=100000")
    wait_for(process, "step 2: accuracy")
    process.kill()
    output, _ = process.communicate(timeout=60)  # until all of them have closed it
    assert "Stopped at step" in output, output
    folder = RunFolder.to_resume(tmp_path, "tiny")
    assert folder.step == folder.metrics.read()[-1]["step"] >= 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="where a process hears of its parent's end")
def test_a_launcher_that_is_killed_takes_an_evaluation_with_it(tmp_path):
    process = start_faulty(tmp_path, "a long evaluation", "--evaluate", "final")
    wait_for(process, "measuring")
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert "Stopped, by a signal or since another process of this run has ended" in output, output


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_leaves_its_checkpoints(tmp_path):
    process, _ = start_run(tmp_path, "run.warm_start=null")
    wait_for(process, "step 2: accuracy")
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: another process of this run has ended; To go on: the same command --resume" in output
    folder = RunFolder.to_resume(tmp_path, "tiny")
    assert folder.step >= 1
    json.dumps(folder.metrics.read())
