"""What a run will need, before anything is loaded: memory by part and by phase, whether it fits, and disk.

    plan = plan(load_config("configs/llama3.1_8b_gsm8k.yaml"), device_bytes=parse_device("L4"))
    plan.print()

Reads no weights and asks no network. The formulas are in recipes/plan/formulas.py and docs/memory.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil

from rich.console import Console

from memhead.planning import Chunk
from recipes.config.load import RunConfig
from recipes.plan import formulas as memory
from recipes.plan.setting import Setting, notes, vllm_share
from recipes.plan.time import filling_tokens
from recipes.problems import ConfigError, Problem, place_of
from recipes.table import Table

GIB, MIB = 2**30, 2**20
RESERVE = 0.75 * GIB  # CUDA's context and the libraries' workspaces: an estimate, it differs by driver
MOST_TOKENS = 16_384  # of a planned bin, as far as larger ones were seen to be of use (packed_h100.md)
SAMPLING = "generation"
FRAGMENTATION = 0.05  # share of the device that the allocator cannot use: an estimate
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CARDS = {  # MiB, as nvidia-smi gives the total
    "T4": 15360,
    "L4": 23034,
    "4090": 24564,
    "A100-40": 40960,
    "A100-80": 81920,
    "H100": 81559,
    "H200": 143771,
}


def parse_device(text: str) -> int:
    """Bytes of a card ("L4") or of a size ("24 GiB", "16GB"). Raises ConfigError for anything else."""
    if (card := text.strip().upper()) in CARDS:
        return CARDS[card] * MIB
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        remedy = f"write it as 24 GiB or 16 GB, or name a card: {', '.join(CARDS)}"
        raise ConfigError([Problem("--device", "no size and no card", text, remedy)])
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    parts: of this run. phases: what is live at each phase's peak. instead: the parts with the other choice of
    checkpointing and head.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    instead: dict[str, int]

    @property
    def peak(self) -> int:
        """The largest phase, in bytes."""
        return max(self.phases.values())

    @property
    def step(self) -> int:
        """The largest phase but for sampling."""
        return max(size for phase, size in self.phases.items() if phase != SAMPLING)


@dataclass(frozen=True)
class Storage:
    """Bytes of disk and of main memory."""

    download: int  # weights that the hub sends; 0 for a model made here or lying here
    download_4bit: int  # the same where Unsloth keeps a 4-bit copy; 0 unless it is asked for
    checkpoint: int  # one on the way
    kept: int | None  # how many of them stay; None: the number of steps is not given
    final: int  # the model, or the adapter, at the end
    warm_start: int  # the model after it
    merge: int  # main memory of recipes.export's merge; 0 without adapters
    host: int  # main memory of the layer inputs that Unsloth moves there

    def lines(self) -> list[str]:
        """As sentences: disk, then main memory if any is needed."""
        parts = []
        if self.download_4bit:
            parts.append(
                f"{_gib(self.download_4bit)} to download if Unsloth has a 4-bit copy, else {_gib(self.download)}"
            )
        elif self.download:
            parts.append(f"{_gib(self.download)} to download")
        if self.warm_start:
            parts.append(f"{_gib(self.warm_start)} for the model after the warm start")
        parts.append(f"{_gib(self.final)} for the final {'adapter' if self.merge else 'model'}")
        number = "each checkpoint" if self.kept is None else f"{self.kept} checkpoints of"
        parts.append(f"{number} {_gib(self.checkpoint)}" if self.kept != 0 else "no checkpoints")
        found = [f"disk: {'; '.join(parts)}"]
        uses = [f"{_gib(self.merge)} to merge the adapter into the unquantised base"] if self.merge else []
        uses += [f"{_gib(self.host)} for layer inputs while it trains"] if self.host else []
        return [*found, f"main memory: {'; '.join(uses)}"] if uses else found


@dataclass(frozen=True)
class Plan:
    """What a run needs, and whether a device of `device_bytes` is enough."""

    name: str
    setting: Setting
    memory: Memory
    storage: Storage
    chunk: Chunk
    device_bytes: int | None
    longest_completion: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The largest phase, in bytes; the least that it can be, unless `setting.complete`."""
        return self.memory.peak

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the device with its reserve; None if that is not known, as without a device."""
        if self.device_bytes is None:
            return None
        within = self.peak <= usable(self.device_bytes)
        return within if self.setting.complete or not within else None

    def print(self, console: Console | None = None) -> None:
        """The tables, in the terminal."""
        console = console or Console()
        for title, rows in (
            ("part", self.memory.parts),
            ("phase, with all that is live in it", self.memory.phases),
            ("instead, with another choice", self.memory.instead),
        ):
            peak = self.peak if rows is self.memory.phases else None
            shown = [
                (name + "  ← peak" * (size == peak), f"{size / GIB:.3f}")
                for name, size in rows.items()
                if size
            ]
            console.print(Table((title, "GiB"), shown).terminal())
        for line in self.lines():
            # A terminal wraps by itself, a notebook cuts.
            console.print(line, soft_wrap=not console.is_jupyter, highlight=False, markup=False)

    def lines(self) -> list[str]:
        """The conclusions in words."""
        s, rows = self.setting, self.setting.batch.scored
        tile = self.chunk.rows * self.chunk.columns * 4 / MIB
        why = (
            "head.chunk asks for its rows"
            if s.chunk_rows
            else f"memhead's tile for {s.device_type}, the size that was fastest when measured"
        )
        passes = (
            f"{s.sequences} sequences"
            if s.bin_tokens is None
            else f"a bin of {s.bin_tokens} tokens, prompts shared by {s.generations} completions,"
        )
        found = [
            f"{self.name}: {passes} of {s.prompt} + {s.completion} tokens a forward pass, "
            f"{s.sampled} sampled at a time",
            f"chunk: {self.chunk.rows} rows × {self.chunk.columns} vocabulary entries = {tile:.1f} MiB of logits in "
            f"place of {rows} × {s.shape.vocab} = {rows * s.shape.vocab * 4 / MIB:.1f} MiB: {why}",
            *self._smaller_bins(),
            *self._verdict(),
            *self.storage.lines(),
        ]
        return found + [f"note: {note}" for note in self.notes]

    def _smaller_bins(self) -> list[str]:
        """How to stay within the memory of TRL's step, where bins of the size that is fastest do not."""
        s = self.setting
        if s.bin_tokens is None or not s.varlen or not s.complete:
            return []
        within = tokens_as_trl(s)
        if not s.packed <= within < s.bin_tokens:
            return []
        return [
            f"step.token_budget={within} would take no more memory than TRL's own step; larger bins are faster"
        ]

    def _verdict(self) -> list[str]:
        peak = f"peak {'' if self.setting.complete else 'at least '}{self.peak / GIB:.2f} GiB"
        if self.device_bytes is None:
            return [] if self.setting.complete else [f"{peak}: not everything could be counted"]
        of = f"{self.device_bytes / GIB:.1f} GiB, of which {usable(self.device_bytes) / GIB:.1f} are counted as usable"
        if self.fits is None:
            return [
                f"{peak}, more with what is not counted (see below): whether it fits is not known; there are {of}"
            ]
        found = [f"{peak} {'fits' if self.fits else 'does NOT fit'} {of}"]
        if self.setting.complete:
            longest = self.longest_completion
            found.append(f"longest completion that fits: {f'{longest} tokens' if longest else 'none'}")
        return found


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / MIB:.2f} MiB"


def usable(device_bytes: int) -> int:
    """The bytes of a device that a run may count on."""
    return int(device_bytes * (1 - FRAGMENTATION) - RESERVE)


def plan(config: RunConfig, device_bytes: int | None = None) -> Plan:
    """The plan of a run; `device_bytes` None takes the GPU that is here, if any.

    Raises ConfigError if the model's sizes are not at hand, or its adapters do not fit it.
    """
    if device_bytes is None:
        device_bytes = _device_here()
    setting = Setting.of(config, device=device_bytes is not None)
    longest = None
    if device_bytes is not None and setting.complete:
        longest = longest_completion(config, setting, usable(device_bytes))
    setting = in_bins(config, setting, token_budget(config, setting, device_bytes))
    return Plan(
        name=config.run.name,
        setting=setting,
        memory=measure(setting),
        storage=store(config, setting),
        chunk=_chunk(setting, setting.batch),
        device_bytes=device_bytes,
        longest_completion=longest,
        notes=notes(config, setting),
    )


def measure(s: Setting, batch: memory.Batch | None = None) -> Memory:
    """Bytes on the device, by part and by phase; `batch` in place of the setting's own."""
    shape, trained, precision, e = s.shape, s.trained, s.precision, s.precision.e
    batch = batch or s.batch
    chunk = _chunk(s, batch)
    weights = memory.weight_bytes(shape, precision)
    gradients = _trained_bytes(s)
    states, temporaries = _optimizer_bytes(s)
    cache = memory.kv_cache_bytes(shape, s.sampled, s.length, 4 if s.wide_cache else e)
    kv = cache + memory.sampling_bytes(shape, s.sampled)
    activations = {
        way: memory.activation_bytes(
            shape,
            precision,
            batch,
            r=s.lora_rank,
            checkpointing=way,
            offloaded=s.offloaded,
            compiled=s.compiled,
        )
        for way in (False, True)
    }
    full = memory.full_logits_bytes(shape, batch.scored, e)
    ours = memory.memhead_bytes(shape, batch.scored, e, chunk, trained=trained.head)
    copies = shape.linear * e if precision.autocast and precision.weights == 4 else 0
    parts = {
        "parameters": weights,
        "reference model": weights if s.reference else 0,
        "adapter and saved modules": gradients if s.lora_rank else 0,
        "gradients": gradients,
        "optimizer": states,
        "sleeping vLLM": memory.asleep_bytes(shape, precision.quantised) if s.asleep else 0,
        "KV cache and sampling": kv,
        "weights cast by autocast": copies,
        "activations": activations[s.checkpointing],
        "head": full if s.head == "full" else ours,
    }
    otherwise = "with memhead" if s.head == "full" else "with full logits"
    instead = {f"head {otherwise}": ours if s.head == "full" else full}
    if shape.layer is not None:
        way = "without" if s.checkpointing else "with"
        instead[f"activations {way} checkpointing"] = activations[not s.checkpointing]
    at_rest = ("parameters", "reference model", "adapter and saved modules", "optimizer", "sleeping vLLM")
    resting = sum(parts[part] for part in at_rest)
    inference = memory.inference_bytes(shape, precision, batch.tokens)
    if s.offloaded:
        inference = activations[True]  # as measured: Unsloth's scoring takes what its forward pass takes
    scoring = memory.memhead_bytes(shape, batch.scored, e, chunk, trained=False) if s.head != "full" else full
    kept = cache if s.kept_cache else 0
    phases = {
        SAMPLING: resting + kv + memory.inference_bytes(shape, precision, s.sampled * s.prompt),
        "scoring without gradient": resting + kept + inference + scoring + copies,
        "forward, loss and backward": resting
        + kept
        + gradients
        + copies
        + parts["activations"]
        + parts["head"],
        "optimizer": resting + kept + gradients + temporaries,
    }
    return Memory(parts, phases, instead)


def store(config: RunConfig, s: Setting) -> Storage:
    """Bytes on the disk, and of main memory."""
    shape, model = s.shape, config.model
    as_it_comes = replace(
        s.precision, weights=memory.DTYPE_BYTES.get(shape.dtype, 4), quantised=shape.quantised
    )
    here = model.loader == "scratch" or place_of("model.name", model.name or "").is_dir()
    unsloths = model.loader == "unsloth" and model.load_in_4bit and not shape.quantised
    trained = _trained_bytes(s)
    steps, every, limit = (
        config.grpo["max_steps"],
        config.run.save_every,
        config.grpo["save_total_limit"],
    )
    kept = 0 if every is None else ceil(steps / every) if steps > 0 else None
    layer_inputs = s.batch.tokens * s.precision.e * shape.hidden
    return Storage(
        download=0 if here else memory.weight_bytes(shape, as_it_comes),
        download_4bit=memory.weight_bytes(shape, s.precision) if unsloths and not here else 0,
        checkpoint=trained + _optimizer_bytes(s)[0],
        kept=kept if kept is None or limit is None else min(kept, limit),
        final=trained,
        warm_start=0 if config.run.warm_start is None else memory.weight_bytes(shape, s.precision),
        merge=memory.merge_bytes(shape, s.trained, as_it_comes.weights) if s.lora_rank else 0,
        host=max(0, shape.layers - memory.OFFLOADED_INPUTS) * layer_inputs if s.offloaded else 0,
    )


def longest_completion(config: RunConfig, s: Setting, available: int) -> int:
    """The longest completion whose peak stays within `available` bytes, in the smallest bins that the run can have.

    0 if none; at most what the model takes.
    """

    def peak(completion: int) -> int:
        return measure(in_bins(config, replace(s, completion=completion), config.step.token_budget or 1)).peak

    return _largest(max(0, s.shape.positions - s.prompt), lambda completion: peak(completion) <= available)


def token_budget(config: RunConfig, s: Setting, device_bytes: int | None) -> int | None:
    """Tokens of the packed step's bins: `step.token_budget`, or as many as are of use and fit beside vLLM.

    None where nothing is planned: then a bin has as many tokens as a micro-batch has slots when padded.
    """
    if config.step.token_budget is not None:
        return config.step.token_budget
    if device_bytes is None:
        return None
    return planned_tokens(s, device_bytes - round(vllm_share(config) * device_bytes))


def planned_tokens(s: Setting, device_bytes: int) -> int | None:
    """Tokens of a bin that are of use and fit; never less than a micro-batch. None on a CPU and without a formula.

    Of use are those that keep the device at work, and those that take no more memory than TRL's micro-batches.
    """
    if not s.varlen or not s.complete:
        return None
    fits = plan_token_budget(s, device_bytes)
    of_use = max(tokens_as_padded(s), min(MOST_TOKENS, filling_tokens(s) or MOST_TOKENS))
    return max(s.packed, min(of_use, fits))


def in_bins(config: RunConfig, s: Setting, budget: int | None) -> Setting:
    """The setting with the bins of the packed step, where the run takes it. A micro-batch is never divided."""
    if not config.packs:
        return s
    wanted = s.slots if budget is None else budget
    return replace(s, bin_tokens=max(s.packed, min(s.rollout, wanted)))


def plan_token_budget(s: Setting, device_bytes: int) -> int:
    """The largest bin of the packed step, in tokens, that fits the device, if sampling does; 0 if none does.

    At most the rollout. It fits however short the completions are.

    Raises ValueError for a setting that the formulas do not cover.
    """
    if not s.complete:
        raise ValueError(f"no formula covers the layers of {s.shape.kind}; set step.token_budget")
    return _largest(
        s.rollout,
        lambda tokens: measure(s, s.group.most(tokens, varlen=s.varlen)).step <= usable(device_bytes),
    )


def tokens_as_padded(s: Setting) -> int:
    """The largest bin with which a step takes no more than with TRL's padded micro-batches."""
    return _tokens_within(s, _padded_step(s))


def tokens_as_trl(s: Setting) -> int:
    """The same, beside TRL's step as it comes, whose layers are not compiled."""
    return _tokens_within(s, _padded_step(replace(s, compiled=False)))


def _padded_step(s: Setting) -> int:
    return measure(s, memory.Batch.padded(s.sequences, s.prompt, s.completion, mask=False)).step


def _tokens_within(s: Setting, size: int) -> int:
    """The largest bin whose step takes at most `size` bytes."""
    return _largest(
        2 * s.slots, lambda tokens: measure(s, s.group.most(tokens, varlen=s.varlen)).step <= size
    )


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, where every smaller one does; 0 if none."""
    low = 0
    while low < limit:
        middle = (low + limit + 1) // 2
        low, limit = (middle, limit) if fits(middle) else (low, middle - 1)
    return low


def _chunk(s: Setting, batch: memory.Batch) -> Chunk:
    return memory.head_chunk(s.shape, batch.scored, s.precision.e, s.device_type, s.chunk_rows)


def _trained_bytes(s: Setting) -> int:
    """Bytes of the trained parameters, and so of their gradients."""
    return s.trained.adapters * s.precision.adapter + s.trained.whole * s.precision.weights


def _optimizer_bytes(s: Setting) -> tuple[int, int]:
    """States that stay, and temporaries of the step, of all that is trained."""
    beside = memory.optimizer_bytes(s.trained.adapters, s.precision.adapter, s.optim)
    whole = memory.optimizer_bytes(s.trained.whole, s.precision.weights, s.optim)
    return beside[0] + whole[0], beside[1] + whole[1]


def _device_here() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
