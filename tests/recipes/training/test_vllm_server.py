"""grpo.vllm_mode: server, with TRL's real client and a stand-in for vLLM's server."""

import re
from threading import Event
from time import sleep
from types import SimpleNamespace

import pytest
import requests
import torch
import vllm_stand_in
from test_quickstart import CONFIG, TINY
from trl.generation import vllm_client, vllm_generation
from vllm_stand_in import StandIn, weight_transfer

import train_grpo
from recipes.models import load
from recipes.tracking.run_folder import RunFolder
from recipes.training import vllm_server
from recipes.training.preflight import Machine
from recipes.training.session import RunError
from recipes.training.vllm_server import say_where_it_fails


@pytest.fixture
def server(monkeypatch):
    """The stand-in, whose model is the run's as it is loaded; vLLM and its NCCL seem to be there."""
    with StandIn() as server:
        for module in (vllm_client, vllm_generation):
            monkeypatch.setattr(module, "is_vllm_available", lambda *_: True)
        for name, value in weight_transfer(server).items():
            monkeypatch.setattr(vllm_client, name, value, raising=False)
        monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)
        machine = Machine(cuda=True, bfloat16=True, packages=frozenset({"vllm"}))
        monkeypatch.setattr(Machine, "here", lambda: machine)
        monkeypatch.setattr(load, "load", server.model_of(load.load))
        yield server


def test_a_run_samples_and_evaluates_on_the_server_with_its_own_weights(tmp_path, server):
    kept = [setting for setting in TINY if not setting.startswith("run.warm_start.")]
    changes = ["grpo.use_vllm=true", "grpo.vllm_mode=server", f"grpo.vllm_server_base_url={server.url}"]
    changes += ["run.warm_start=null", "grpo.learning_rate=1e-2", f"run.output_root={tmp_path}"]
    assert train_grpo.main(["--config", CONFIG, *kept, *changes]) == 0

    records = RunFolder(tmp_path / "tiny").metrics.read()
    for record in records[
        1:
    ]:  # the server's log-probabilities are the trainer's: its weights were those of the step
        assert record["trl"]["sampling/sampling_logp_difference/max"] < 1e-4
        assert record["trl"]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    greedy = [request for request in server.asked if request["temperature"] == 0]
    sampled = [request for request in server.asked if request["temperature"] == 1]
    assert sum(len(request["prompt"]) for request in greedy) == 3 * 16  # after steps 0, 2 and 3
    assert [(len(request["prompt"]), request["n"]) for request in sampled] == [(4, 4)] * 3
    updates = server.paths.count("/update_weights")
    assert updates == 4  # before every step and after the last, once each
    assert (
        server.paths.count("/start_weight_update") == server.paths.count("/finish_weight_update") == updates
    )


def run_ahead(root, server, ahead, *more):
    """Four steps on the server; the requests of training, and the records of the steps."""
    kept = [setting for setting in TINY if not setting.startswith(("run.warm_start.", "grpo.max_steps"))]
    changes = ["grpo.use_vllm=true", "grpo.vllm_mode=server", f"grpo.vllm_server_base_url={server.url}"]
    changes += [
        "run.warm_start=null",
        "grpo.learning_rate=3e-2",
        "grpo.warmup_steps=0",
        f"run.output_root={root}",
    ]
    changes += [
        "grpo.lr_scheduler_type=constant", "grpo.entropy_coef=1.0",
        "grpo.vllm_importance_sampling_mode=token_truncate", "grpo.vllm_importance_sampling_clip_max=1000.0",
        f"step.ahead={ahead}",
    ]  # fmt: skip
    steps = [] if any(setting.startswith("grpo.max_steps") for setting in more) else ["grpo.max_steps=4"]
    server.asked.clear()
    first = server.updates
    assert train_grpo.main(["--config", CONFIG, *kept, *changes, *steps, *more]) == 0
    asked = [request for request in server.asked if request["temperature"] == 1]
    for request in asked:
        request["versions"] = tuple(version - first for version in request["versions"])
    records = RunFolder(root / "tiny").metrics.read()
    return asked, [record for record in records if record["step"] > 0]


@pytest.mark.parametrize("step", ["packed", "trl"])
def test_ahead_samples_from_the_weights_of_one_rollout_before(tmp_path, server, step):
    impl = f"step.impl={step}"
    now, records = run_ahead(tmp_path / "now", server, "false", impl)
    before, others = run_ahead(tmp_path / "ahead", server, "true", impl, "run.save_every=2")
    assert [request["versions"] for request in now] == [(n, n) for n in (1, 2, 3, 4)]
    assert [request["versions"] for request in before] == [(n, n) for n in (1, 1, 2, 3)]
    assert [request["prompt"] for request in before] == [request["prompt"] for request in now]
    assert before[0]["choices"] == now[0]["choices"]
    assert others[0]["loss"] == pytest.approx(records[0]["loss"], rel=1e-6)

    gap, ratio = "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/mean"
    assert all(record["trl"][gap] < 1e-4 for record in [*records, others[0]])
    assert all(record["trl"][gap] > 1e-2 for record in others[1:])
    assert all(abs(record["trl"][ratio] - 1) > 1e-5 for record in others[1:])

    resumed, more = run_ahead(tmp_path / "ahead", server, "true", impl, "grpo.max_steps=6", "--resume")
    assert [record["step"] for record in more] == [1, 2, 3, 4, 5, 6]
    assert [request["versions"] for request in resumed] == [(1, 1), (1, 1)]
    assert more[4]["trl"][gap] < 1e-4 < 1e-2 < more[5]["trl"][gap]


def no_json(handler):
    answer(handler, 200, b"<html>")


def not_found(handler):
    answer(handler, 404, b"no such route \x1b[31m")


def too_few(handler):
    answer(handler, 200, b'{"choices": []}')


def answer(handler, status, text):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text)


@pytest.mark.parametrize(
    ("fault", "path", "what", "ahead"),
    [
        (no_json, "/v1/completions", "to sample", "false"),
        (too_few, "/v1/completions", "to sample", "true"),
        (not_found, "/update_weights", "to take new weights", "false"),
    ],
)
def test_a_server_that_fails_is_a_line_and_the_run_goes_on_when_it_is_there_again(
    tmp_path, server, capsys, monkeypatch, fault, path, what, ahead
):
    """It fails from the second update on: what the first one trained is kept."""
    post = vllm_stand_in._Handler.do_POST

    def failing(handler):
        if handler.path == path and server.updates >= 2 + (ahead == "true"):
            handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
            fault(handler)
        else:
            post(handler)

    monkeypatch.setattr(vllm_stand_in._Handler, "do_POST", failing)
    kept = [
        setting for setting in TINY if not setting.startswith(("run.warm_start.", "run.evaluation.every"))
    ]
    changes = ["grpo.use_vllm=true", "grpo.vllm_mode=server", f"grpo.vllm_server_base_url={server.url}"]
    changes += ["run.warm_start=null", "run.evaluation.every=null", f"step.ahead={ahead}"]
    command = ["--config", CONFIG, *kept, *changes, f"run.output_root={tmp_path}"]
    assert train_grpo.main(command) == 1
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"the vLLM server at {server.url} was asked {what} and failed (" in line
    assert "Checkpoint: " in line
    assert "Traceback" not in said
    assert "\x1b" not in line
    monkeypatch.setattr(vllm_stand_in._Handler, "do_POST", post)
    assert train_grpo.main([*command, "--resume"]) == 0
    assert RunFolder(tmp_path / "tiny").metrics.read()[-1]["step"] == 3


class Hanging:
    """While it is a context, the stand-in takes requests and never answers, from a moment on."""

    def __init__(self, monkeypatch, hangs):
        self.patch, self.hangs, self.over = monkeypatch, hangs, Event()

    def __enter__(self):
        handler = vllm_stand_in._Handler
        self.usual = {name: getattr(handler, name) for name in ("do_GET", "do_POST")}
        for name, usual in self.usual.items():
            self.patch.setattr(handler, name, self.instead_of(usual))

    def instead_of(self, usual):
        def answer(handler):
            if self.hangs(handler.path):
                self.over.wait()
            else:
                usual(handler)

        return answer

    def __exit__(self, *_):
        self.over.set()
        for name, usual in self.usual.items():
            self.patch.setattr(vllm_stand_in._Handler, name, usual)


@pytest.mark.parametrize(
    ("paths", "updates", "what", "key", "changes"),
    [
        ({"/v1/completions", "/health"}, 2, "to sample", "vllm_server_timeout", []),
        ({"/v1/completions", "/health"}, 3, "to sample", "vllm_server_timeout", []),  # by the evaluation
        ({"/v1/completions"}, 2, "to sample", "ddp_timeout", ["step.ahead=true"]),
        ({"/start_weight_update", "/health"}, 2, "to take new weights", "vllm_server_timeout", []),
    ],
)
def test_a_server_that_never_answers_is_given_up_and_the_work_is_kept(
    tmp_path, server, capsys, monkeypatch, paths, updates, what, key, changes
):
    """It hangs after so many updates of its weights: the second is for a step, the third for an evaluation."""
    monkeypatch.setattr(vllm_server, "_LEAST", 0.1)
    kept = [setting for setting in TINY if not setting.startswith("run.warm_start.")]
    changes = [*changes, "grpo.use_vllm=true", "grpo.vllm_mode=server", "run.warm_start=null"]
    changes += [f"grpo.vllm_server_base_url={server.url}", f"run.output_root={tmp_path}"]
    command = ["--config", CONFIG, *kept, *changes]
    with Hanging(monkeypatch, lambda path: server.updates >= updates and path in paths):
        assert train_grpo.main([*command, f"grpo.{key}=2"]) == 1
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"the vLLM server at {server.url} was asked {what} and failed (Unanswered: no answer " in line
    assert re.search(rf"for [23] s\b.* raise grpo\.{key}\)", line)
    assert re.search(r"Checkpoint: .*/checkpoint-[12]; ", line)
    assert "Traceback" not in said
    assert train_grpo.main([*command, "--resume"]) == 0
    assert RunFolder(tmp_path / "tiny").metrics.read()[-1]["step"] == 3


def unready(handler):
    answer(handler, 503, b"")


@pytest.mark.parametrize("silent_at", ["/health", "/v1/models", None])
def test_a_server_that_is_never_ready_is_one_line(tmp_path, server, capsys, monkeypatch, silent_at):
    """It takes a question and is silent, or answers that it is not ready, again and again."""
    monkeypatch.setattr(vllm_server, "_LEAST", 0.1)
    changes = ["grpo.use_vllm=true", "grpo.vllm_mode=server", f"grpo.vllm_server_base_url={server.url}"]
    changes += ["run.warm_start=null", "grpo.vllm_server_timeout=1", "grpo.ddp_timeout=3"]
    kept = [setting for setting in TINY if not setting.startswith("run.warm_start.")]
    with Hanging(monkeypatch, lambda path: path == silent_at):
        if silent_at is None:
            monkeypatch.setattr(vllm_stand_in._Handler, "do_GET", unready)
        assert train_grpo.main(["--config", CONFIG, *kept, *changes, f"run.output_root={tmp_path}"]) == 1
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"the vLLM server at {server.url} is not ready: no answer " in line
    assert "Traceback" not in said


def test_a_server_that_is_at_work_is_waited_for(monkeypatch):
    """Longer than it may be silent, as long as it answers that it lives."""
    looks = iter([True, False, True, True, False] * 9)
    patience = vllm_server.Patience(silent=0.4, busy=60.0)
    waited = patience.wait_for(lambda: sleep(1.5) or "answer", lambda _: next(looks))
    assert waited == "answer"


def test_no_request_has_less_than_ten_seconds():
    for given, has in (((0.0, 0), (10.0, 10.0)), ((240.0, 1800), (240.0, 1800.0))):
        grpo = dict(zip(("vllm_server_timeout", "ddp_timeout"), given, strict=True))
        assert vllm_server.Patience.of(SimpleNamespace(grpo=grpo)) == has


def test_a_process_that_was_suspended_has_not_waited(monkeypatch):
    clock = iter([0.0, *[1000.0] * 99])
    monkeypatch.setattr(vllm_server, "monotonic", lambda: next(clock))
    patience = vllm_server.Patience(silent=0.4, busy=0.4)
    assert patience.wait_for(lambda: sleep(0.3) or "answer", lambda _: False) == "answer"


def test_an_answer_that_comes_during_the_last_look_is_taken():
    asked, looks = Event(), []

    def look(_):
        looks.append(None)
        if len(looks) == 2:
            asked.set()
        sleep(0.3)
        return False

    assert (
        vllm_server.Patience(silent=0.2, busy=0.2).wait_for(lambda: asked.wait() and "answer", look)
        == "answer"
    )


class Client:
    """TRL's, as far as a server is looked at."""

    base_url = "http://x"

    def __init__(self):
        self.session = SimpleNamespace(request=None)

    def check_server(self, total_timeout, retry_interval):
        sleep(total_timeout + retry_interval)
        raise ConnectionError("by itself")


def test_trls_client_may_give_up_by_itself():
    """It says then that nothing listens. A long answer to come is no matter here."""
    client = vllm_server.patient(Client, vllm_server.Patience(silent=0.3, busy=0.1))()
    with pytest.raises(ConnectionError, match="by itself"):
        client.check_server(0.3, 0.2)


@pytest.mark.parametrize(
    ("answer", "alive"),
    [(200, True), (503, False), (requests.ConnectionError(), False), (requests.Timeout(), False)],
)
def test_a_server_lives_that_says_so(monkeypatch, answer, alive):
    def get(url, timeout):
        assert (url, timeout) == ("http://x/health", 2.0)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status_code=answer)

    monkeypatch.setattr(requests, "get", get)
    client = vllm_server.patient(Client, vllm_server.Patience(silent=1.0, busy=1.0))()
    assert client._is_alive(2.0) is alive


def test_every_request_says_what_it_was_about(monkeypatch):
    """Shortened, and without what a terminal would obey."""
    monkeypatch.setattr(vllm_server, "save_last_step", lambda trainer, phase: f"Kept in {phase}.")

    def fail(*_, **__):
        raise OSError("\x1b" + "long " * 200)

    requests = {"generate": "to sample", "update_named_params": "to take new weights",
                "reset_prefix_cache": "to forget its cache"}  # fmt: skip
    client = SimpleNamespace(base_url="http://x\x1b", **dict.fromkeys(requests, fail))
    say_where_it_fails(SimpleNamespace(vllm_generation=SimpleNamespace(vllm_client=client)))
    for name, what in requests.items():
        with pytest.raises(vllm_server.ServerFailed) as error:
            getattr(client, name)()
        said = str(error.value)
        assert f"was asked {what} and failed (OSError: " in said
        assert said.endswith("Kept in generation.")
        assert "\x1b" not in said
        assert len(said) < 500


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RunError("said")]
)
def test_what_is_no_fault_of_the_server_is_not_laid_to_it(error):
    """A card that is full while it sends the weights: the plan's advice is for that."""

    def send(*_, **__):
        raise error

    client = SimpleNamespace(
        base_url="http://x", generate=send, update_named_params=send, reset_prefix_cache=send
    )
    say_where_it_fails(SimpleNamespace(vllm_generation=SimpleNamespace(vllm_client=client)))
    with pytest.raises(type(error)) as raised:
        client.update_named_params([])
    assert raised.value is error
