"""How long a run will take: seconds a step by phase, and hours in all.

Each phase is its arithmetic (`recipes.plan.work`) over the part of the device's matrix rate that such a phase has been
seen to reach, and what does not shrink with the arithmetic: launches, and vLLM's work a token. The figures below are
fits to what `benchmarks/results` measured on an H100; docs/speed.md holds them against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from recipes.config.load import RunConfig
from recipes.plan.formulas import kv_cache_bytes, weight_bytes
from recipes.plan.rate import Rate
from recipes.plan.setting import Setting
from recipes.plan.work import Flow, Work

_SEEN_AT = 8e14  # operations a second of the card on which the shares were seen
_FULL_SHARE = 0.5  # the most of the matrix rate that a pass through layers was seen to reach
_HIDDEN = 10_000  # of hidden width: below half of it the share falls in proportion, at that card's rate
_UNSLOTH = 1.25  # times that share, in its layers
_NO_GRADIENT = 1.2  # times that share, where nothing is kept for a backward
_LAYER_PASS = 0.006  # seconds that a layer's launches take, forward and backward, however few the tokens
_COMPILED = 1.4  # times the share, in layers that torch.compile made (benchmarks/results/packed_h200.md)
_COMPILED_PASS = 0.0045  # seconds of one's launches
_COMPILING = 30.0  # before the first step; 60 with adapters
_LAUNCHING = 0.15  # of a bin's arithmetic: launches that take no more than that are not worth more memory
_VLLM_TOKEN = 50e-6  # seconds of vLLM's host a token, beside the device: scheduling, log-probabilities
_VLLM_TEXT = 27e-6  # more, where it also makes text (grpo.generation_kwargs.detokenize, true unless told)
_VLLM_STEP = 0.003  # a token of every sequence
_VLLM_START = 100.0  # seconds until the engine stands
_GRAPH_START = 46.0  # until transformers' sampling step is compiled
_START = 25.0  # imports, weights, the checks before the first step
_GENERATE_STEP, _GENERATE_LAYER = 0.010, 0.0014  # transformers' generate, a token of every sequence
_GRAPH_STEP = 0.005  # where such a step is one CUDA graph: what is around it
_CACHE_SHARE = 0.5  # of the bandwidth, there: attention reads the whole cache in every step
_MEMORY_SHARE = 0.7  # of the bandwidth, where weights are read
_OTHER = 0.05  # seconds a step outside of the phases
# On a CPU, fitted to three models on two cores (docs/speed.md):
_CPU_SHARE, _CPU_WIDTH = (
    0.6,
    512,
)  # the most of the matrix rate, and the hidden width over which a share is taken
_CPU_LAYER = 0.001  # seconds of a layer's calls in a pass, however few the tokens
_CPU_TOKEN_LAYER, _CPU_SEQUENCE = (
    0.002,
    9e-6,
)  # seconds a layer for a token of all sequences, and more for each of them
_CPU_READING = 3e9  # bytes of weights a second in a product of few rows
_CPU_START = 20.0


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one optimizer step by phase. total: of the run, with its evaluations; None without a last step."""

    phases: dict[str, float]
    total: float | None
    prompt: int
    completion: int
    rate: Rate

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.phases.values())

    def lines(self) -> list[str]:
        """As sentences."""
        how = "measured here" if self.rate.measured else "80 % of the published rate"
        parts = ", ".join(f"{phase} {_seconds(seconds)}" for phase, seconds in self.phases.items() if seconds)
        whole = "" if self.total is None else f"; {_hours(self.total)} in all, evaluations included"
        return [
            f"time: {_seconds(self.step)} a step ({parts}){whole}",
            f"time is planned for mean lengths of {self.prompt} + {self.completion} tokens and "
            f"{self.rate.operations / 1e12:.3g} TFLOP/s ({how}); rewards are not counted",
        ]


def plan_time(
    config: RunConfig, s: Setting, rate: Rate, lengths: tuple[int, int] | None = None
) -> TimePlan | None:
    """None where the arithmetic is not known: see Work.of.

    lengths: mean tokens of a prompt and of a completion; None for the longest, which gives a bound from above.
    """
    work = Work.of(s.shape, s.trained)
    if work is None:
        return None
    clock = _Clock(config, s, work, rate, *(lengths or (s.prompt, s.completion)))
    phases = {
        "generation": clock.sampling(s.sampled) / clock.steps_of_rollout,
        "scoring": clock.scoring(),
        "forward and backward": clock.training(),
        "optimizer": clock.optimizer(),
        "other": _OTHER,
    }
    steps = config.grpo["max_steps"]
    total = None
    if steps > 0:
        every = config.run.evaluation.every
        looks = 2 + (0 if every is None else max(0, ceil(steps / every) - 1))
        around = clock.starting() + clock.supervised() + looks * clock.looking()
        total = steps * sum(phases.values()) + around
    return TimePlan(phases, total, clock.prompt, clock.completion, rate)


@dataclass(frozen=True)
class _Clock:
    config: RunConfig
    s: Setting
    work: Work
    rate: Rate
    prompt: int
    completion: int

    @property
    def grpo(self) -> dict[str, Any]:
        return self.config.grpo

    @property
    def vllm(self) -> bool:
        return bool(self.config.model.fast_inference or self.grpo["use_vllm"])

    @property
    def window(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.grpo["gradient_accumulation_steps"]

    @property
    def micro_batches(self) -> int:
        """Of a rollout."""
        return self.grpo["steps_per_generation"] or self.window

    @property
    def steps_of_rollout(self) -> float:
        return self.micro_batches * self.grpo["num_iterations"] / self.window

    def flow(self, sequences: int, *, shared: bool) -> Flow:
        """Of completions of mean length; shared: a prompt once a group."""
        groups = [i // self.s.generations if shared else i for i in range(sequences)]
        return Flow.of_lengths([self.prompt] * sequences, [self.completion] * sequences, groups)

    @property
    def share(self) -> float:
        """Of the matrix rate, that a pass through the layers reaches."""
        if self.s.device_type == "cpu":
            return min(_CPU_SHARE, self.s.shape.hidden / _CPU_WIDTH)
        gain = _UNSLOTH if self.config.model.loader == "unsloth" else 1.0
        return gain * _share(self.s, self.rate.operations)

    @property
    def trained_share(self) -> float:
        """The same where the model trains, in which layers may be compiled."""
        return self.share * (_COMPILED if self.s.compiled else 1.0)

    @property
    def layers(self) -> float:
        """Seconds that launching a pass through the layers takes, forward and backward."""
        one = _COMPILED_PASS if self.s.compiled else _LAYER_PASS
        return self.s.shape.layers * (_CPU_LAYER if self.s.device_type == "cpu" else one)

    def passes(self, operations: float, tokens: int, launches: float) -> float:
        """Seconds of as many passes as bins, or micro-batches, there are. launches: seconds of one's."""
        bins = self.window if self.s.bin_tokens is None else max(1, ceil(tokens / self.s.bin_tokens))
        return max(operations / (self.rate.operations * self.trained_share), bins * launches)

    def training(self) -> float:
        rows = self.s.sequences * self.window
        flow = self.flow(rows, shared=self.s.bin_tokens is not None)
        return self.passes(_training(self.work, flow, self.s), flow.tokens, self.layers)

    def scoring(self) -> float:
        """Old log-probabilities of the windows after the first, of all of them in TRL's way; the reference's."""
        packed, grpo = self.s.bin_tokens is not None, self.grpo
        later = 1 - self.window / self.micro_batches if self.micro_batches > self.window else 0.0
        corrected = self.vllm and grpo["vllm_importance_sampling_correction"]
        aligned = self.window % (self.micro_batches * grpo["num_iterations"]) == 0
        old = later if packed else float(corrected or not aligned)
        times = (old + float(bool(grpo["beta"]))) / grpo["num_iterations"]
        flow = self.flow(self.s.sequences * self.window, shared=packed)
        operations = self.work.forward(flow) / _NO_GRADIENT
        return times * self.passes(operations, flow.tokens, self.layers / 3) if times else 0.0

    def sampling(self, sequences: int) -> float:
        """Seconds in which an engine completes as many prompts. The longest completion is as long as it may be."""
        operations = self.work.forward(self.flow(sequences, shared=True))
        arithmetic = operations / (self.rate.operations * self.share)
        held = weight_bytes(self.s.shape, self.s.precision)
        if self.s.device_type == "cpu":
            layer = _CPU_TOKEN_LAYER + sequences * _CPU_SEQUENCE
            return arithmetic + self.s.completion * (self.s.shape.layers * layer + held / _CPU_READING)
        if self.vllm:
            return self.by_vllm(sequences, arithmetic)
        weights = self.moving(held)
        step = _GENERATE_STEP + _GENERATE_LAYER * self.s.shape.layers
        if self.s.kept_cache:
            step = _GRAPH_STEP + self.reading()
        return self.s.completion * max(step, weights) + arithmetic

    def by_vllm(self, sequences: int, arithmetic: float) -> float:
        """The slower of its host and the device, which work beside each other."""
        text = (self.grpo["generation_kwargs"] or {}).get("detokenize", True)
        host = sequences * self.completion * (_VLLM_TOKEN + (_VLLM_TEXT if text else 0.0))
        held = weight_bytes(self.s.shape, self.s.precision)
        if self.s.precision.quantised.startswith(
            "4bit"
        ):  # made bfloat16 in memory, and read again, in every step
            held += 2 * 2 * self.s.shape.linear
        reading = self.s.completion * self.moving(held)
        return max(host, self.s.completion * _VLLM_STEP + max(reading, arithmetic))

    def moving(self, size: float) -> float:
        """Seconds in which as many bytes are read."""
        return size / (_MEMORY_SHARE * self.rate.bandwidth)

    def looking(self) -> float:
        """Seconds of one evaluation: a process completes its share of the problems, and samples them for pass@k."""
        run = self.config.run.evaluation
        share = ceil(run.size / self.config.processes)
        greedy = self.completing(share, run.batch_size)
        if not run.samples:
            return greedy
        return greedy + self.completing(share, max(1, run.batch_size // run.samples), run.samples)

    def completing(self, problems: int, at_once: int, samples: int = 1) -> float:
        """Seconds in which so many problems are completed, each `samples` times."""
        whole, rest = divmod(problems, at_once)
        return whole * self.sampling(at_once * samples) + (self.sampling(rest * samples) if rest else 0.0)

    def supervised(self) -> float:
        """Seconds of the warm start, if it takes all its steps; the main process looks at the accuracy alone."""
        start, run = self.config.run.warm_start, self.config.run.evaluation
        if start is None:
            return 0.0
        operations = _training(self.work, self.flow(start.batch_size, shared=False), self.s)
        step = max(operations / (self.rate.operations * self.trained_share), self.layers)
        looks = start.steps // start.check_every if start.check_every else 0
        return start.steps * step + looks * self.completing(run.size, run.batch_size)

    def starting(self) -> float:
        """Seconds until the first step, beside the evaluation: the process, the engine, whatever is compiled."""
        if self.s.device_type == "cpu":
            return _CPU_START
        compiling = _COMPILING * (2 if self.s.lora_rank else 1) if self.s.compiled else 0.0
        return _START + compiling + (_VLLM_START if self.vllm else _GRAPH_START if self.s.kept_cache else 0.0)

    def reading(self) -> float:
        """Seconds in which attention reads the kept cache once."""
        held = kv_cache_bytes(self.s.shape, self.s.sampled, self.s.length, self.s.precision.e)
        return held / (_CACHE_SHARE * self.rate.bandwidth)

    def optimizer(self) -> float:
        """Weights, gradients and two moments read and written once."""
        trained = self.s.trained.adapters + self.s.trained.whole
        return self.moving(trained * 4 * 7)


def filling_tokens(s: Setting) -> int | None:
    """Tokens of a bin from which on launching takes little beside the arithmetic, on the fastest card seen.

    A slower card is filled by fewer. None where the arithmetic is not known.
    """
    work, group = Work.of(s.shape, s.trained), s.generations
    if work is None:
        return None
    flow = Flow.of_lengths([s.prompt] * group, [s.completion] * group, [0] * group)
    token = _training(work, flow, s) / flow.tokens / (_SEEN_AT * _share(s, _SEEN_AT))
    return round(s.shape.layers * _LAYER_PASS / (_LAUNCHING * token))


def _training(work: Work, flow: Flow, s: Setting) -> float:
    """Operations of forward and backward; with checkpointing, of a second forward."""
    return work.training(flow) + (work.forward(flow) if s.checkpointing else 0.0)


def _share(s: Setting, rate: float) -> float:
    """Of a GPU's matrix rate, that a pass through the layers reaches."""
    return min(_FULL_SHARE, s.shape.hidden / _HIDDEN * _SEEN_AT / rate)


def _seconds(seconds: float) -> str:
    """Two figures, without an exponent."""
    if seconds < 1e-4:
        return "below 0.0001 s"
    rounded = float(f"{seconds:.2g}")
    return f"{rounded:g} s" if rounded < 1000 else f"{rounded:.0f} s"


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
