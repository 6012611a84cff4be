"""SmolLM2 on `char_count` on two cards of one host: vLLM's server on one and training on the other, or both on each.

    python -m benchmarks.server_gpu --model FOLDER --output DIR        # 7 to 9 minutes, if all goes well
    python -m benchmarks.server_gpu --model FOLDER --output DIR --ways server ahead --rollouts 4

server      a vLLM server on card 1, training on card 0, which wait for each other
ahead       the same with step.ahead: the server samples the next rollout while this one trains
colocated   two processes, each with vLLM on its own card; half of every rollout each

Each is a run of configs/smollm2_135m_char_count_published.yaml without its supervised start: rollouts of 128 prompts
× 8, eight updates each. FOLDER: best what that start left, RUN/warm_start, since completions that earn nothing are not
computed. Ways in processes of their own, each with a port and a share of the card, can run at once: their accuracies
are as good, their rollouts a minute are not. Written after each: server.json and server.md, beside the servers' and the
runs' logs. Rollouts a minute are taken from the end of the first to the end of the last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.table import Table
from recipes.tracking.files import MetricsFile

CARDS = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")  # to train on, and the server's
ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "smollm2_135m_char_count_published.yaml"
WAYS = ("server", "ahead", "colocated")
UPDATES = 8  # of a rollout in that configuration
SEQUENCES = 512  # that vLLM computes at once
LENGTH = 256  # of a prompt with its completion
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "NCCL_NVLS_ENABLE": "0",  # multicast over NVLink can put a host's cards out of service for others
    "VLLM_HOST_IP": "127.0.0.1",  # where trainer and server meet to exchange weights
    "VLLM_NO_USAGE_STATS": "1",
}


def url(port: int) -> str:
    """Where a server listens."""
    return f"http://127.0.0.1:{port}"


def overrides(way: str, options: argparse.Namespace) -> list[str]:
    """Of the configuration, for one way."""
    place = options.output.resolve() / "runs"
    common = [
        f"model.name={options.model}", f"grpo.max_steps={UPDATES * options.rollouts}", "grpo.cache_implementation=null",
        "grpo.use_vllm=true", "grpo.vllm_importance_sampling_mode=token_truncate", "run.warm_start=null",
        "run.save_every=null", "run.evaluation.every=null", f"run.name={way}", f"run.output_root={place}",
    ]  # fmt: skip
    if way == "colocated":
        return [
            *common, "grpo.vllm_mode=colocate", f"grpo.vllm_gpu_memory_utilization={options.memory or 0.3}",
            f"grpo.vllm_max_model_length={LENGTH}", f"model.vllm_engine={{max_num_seqs: {SEQUENCES}}}",
            "grpo.gradient_accumulation_steps=2", "grpo.steps_per_generation=16",
        ]  # fmt: skip
    ahead = str(way == "ahead").lower()
    return [
        *common,
        "grpo.vllm_mode=server",
        f"grpo.vllm_server_base_url={url(options.port)}",
        f"grpo.vllm_group_port={options.port + 10_000}",
        f"step.ahead={ahead}",
    ]


@contextmanager
def server(options: argparse.Namespace, log: Path, seconds: float) -> Iterator[None]:
    """vLLM's own on card 1, as TRL 1.15 asks for it. Raises RuntimeError if it does not answer in time.

    By its module: the command `vllm serve` imports every other command first, of which a trimmed vLLM has not all.
    """
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model,
        "--port", str(options.port),
        "--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs",
        "--max-logprobs", "-1", "--max-model-len", str(LENGTH), "--max-num-seqs", str(SEQUENCES),
        "--gpu-memory-utilization", str(options.memory or 0.8), "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    environment = os.environ | QUIET | {"CUDA_VISIBLE_DEVICES": CARDS[1], "VLLM_SERVER_DEV_MODE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)

    def start() -> subprocess.Popen[bytes]:
        with log.open("a") as text:
            return subprocess.Popen(command, env=environment, stdout=text, stderr=subprocess.STDOUT)

    until, process = time.time() + seconds, start()
    try:
        again = True  # the first start fails where another process gives memory back while vLLM measures it
        while not answers(options.port):
            ended = process.poll() is not None
            if time.time() > until or (ended and not again):
                raise RuntimeError(f"the server does not answer; {log.name} says why")
            if ended:
                process, again = start(), False
            time.sleep(1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    """Whether the server is up."""
    try:
        with urllib.request.urlopen(f"{url(port)}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def train(way: str, options: argparse.Namespace, seconds: float) -> None:
    """The run of one way. Raises RuntimeError if it fails or takes too long."""
    log = options.output / f"{way}.log"
    processes = 2 if way == "colocated" else 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes == 2 else []
    settings = overrides(way, options)
    command = [sys.executable, *launcher, str(ROOT / "train_grpo.py"), "--config", str(CONFIG), *settings]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | QUIET | {"PYTHONPATH": path}
    if processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = CARDS[0]
    else:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
            "0"  # under torchrun vLLM's engine stays in the process
        )
    with log.open("w") as text:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=text, stderr=subprocess.STDOUT)
    try:
        status = process.wait(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.terminate()  # the step in hand ends, and the run says how far it came
        process.wait(timeout=60)
        raise RuntimeError("ran out of its time") from None
    if status != 0:
        raise RuntimeError(f"exit status {status}; {log.name} says why")


def figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's metrics: rollouts a minute, seconds by phase and rollout, the ratio to the sampler, accuracies."""
    steps = [record for record in records if record.get("step", 0) > 0]
    ends = [record for record in steps if record["step"] % UPDATES == 0]
    found: dict[str, Any] = {
        "rollouts": len(ends),
        "reward": [record["reward"] for record in steps if "reward" in record],
        "accuracy": [record["accuracy"] for record in records if record.get("accuracy") is not None],
    }
    if len(ends) < 2:
        return found
    later = [record for record in steps if UPDATES < record["step"] <= ends[-1]["step"]]
    count = len(ends) - 1
    found["rollouts_a_minute"] = 60 * count / (ends[-1]["at"] - ends[0]["at"])
    phases = dict.fromkeys(phase for record in later for phase in record["time"])
    found["seconds"] = {
        phase: sum(record["time"].get(phase, 0.0) for record in later) / count for phase in phases
    }
    for name in ("sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean"):
        seen = [record["trl"][name] for record in later if name in record["trl"]]
        found[name.split("/")[1]] = sum(seen) / len(seen) if seen else None
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a way."""
    header = (
        "way",
        "rollouts a minute",
        "generation, s",
        "all, s",
        "mean |Δ log p|",
        "accuracy, before and after",
    )
    lines = []
    for row in rows:
        seconds, gap = row.get("seconds", {}), row.get("sampling_logp_difference")
        accuracy = ", ".join(f"{value:.3f}" for value in row.get("accuracy", []))
        rate = f"{row['rollouts_a_minute']:.2f}" if "rollouts_a_minute" in row else row.get("error", "–")
        times = (f"{seconds.get('generation', 0.0):.2f}", f"{sum(seconds.values()):.2f}")
        lines.append((row["way"], rate, *times, "–" if gap is None else f"{gap:.4f}", accuracy))
    return Table(header, lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct, a folder or hub id")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rollouts", type=int, default=6)
    parser.add_argument("--port", type=int, default=8000, help="the server's")
    parser.add_argument(
        "--memory", type=float, help="share of its card that vLLM takes; 0.8 for a server, else 0.3"
    )
    parser.add_argument(
        "--limit", type=float, default=520, help="seconds in all, shared evenly by what is left"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Status 1 if a way failed; its figures are those of the steps that it took."""
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    until, rows = time.time() + options.limit, []
    for place, way in enumerate(options.ways):
        mine = time.time() + (until - time.time()) / (len(options.ways) - place)
        row: dict[str, Any] = {"way": way}
        try:
            if way == "colocated":
                train(way, options, mine - time.time())
            else:
                with server(options, options.output / f"{way}-server.log", mine - time.time()):
                    train(way, options, mine - time.time())
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            row["error"] = str(error)
        metrics = options.output / "runs" / way / "metrics.jsonl"
        rows.append(row | (figures(MetricsFile(metrics).read()) if metrics.is_file() else {}))
        print(json.dumps(rows[-1]), flush=True)
        (options.output / "server.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (options.output / "server.md").write_text(table(rows).markdown() + "\n", encoding="utf-8")
    print(table(rows).markdown())
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
