"""What a run will need, before anything of it is loaded: memory by part and by phase, and whether it fits.

    plan = plan(load_config("configs/llama3.1_8b_gsm8k.yaml"), device_bytes=parse_size("24 GiB"))
    plan.print()

Reads config files only: no weights, no network. The formulas are in recipes/plan/formulas.py and docs/memory.md.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from memhead.planning import Chunk
from recipes.config.load import EXIT_STATUS, RunConfig
from recipes.plan import formulas as memory
from recipes.plan.formulas import DTYPE_BYTES, Precision
from recipes.plan.shapes import ModelShape, shape_of

GIB, MIB = 2**30, 2**20
RESERVE = 0.75 * GIB  # CUDA's context and the libraries' workspaces: an estimate, it differs by driver
FRAGMENTATION = 0.05  # share of the device that the allocator cannot use: an estimate
PROMPT = 256  # tokens, where the config gives no total length to take it from
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "24 GiB" or "16GB". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise ValueError(f"--device: {text!r} is no size; write it as 24 GiB or 16 GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class Setting:
    """The sizes of a run that decide its memory."""

    shape: ModelShape
    precision: Precision
    trainable: int  # parameters
    saved: int  # parameters trained in full beside adapters
    head_trained: bool
    lora_rank: int  # 0: every weight is trained
    optim: str
    sequences: int  # of one forward pass
    sampled: int  # sequences generated at a time
    prompt: int
    completion: int
    checkpointing: bool
    offloaded: bool  # layer inputs in host memory
    reference: bool  # a second copy of the weights: beta above 0 without an adapter to switch off
    head: str
    chunk_rows: int | None
    device_type: str

    @property
    def length(self) -> int:
        """Prompt and completion, in tokens."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Plan:
    """Bytes by part and by phase (what is live at that phase's height), and what follows from them."""

    name: str
    setting: Setting
    parts: dict[str, int]
    phases: dict[str, int]
    chunk: Chunk
    device_bytes: int | None
    longest_completion: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The largest phase, in bytes."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the device with its reserve; None without a device."""
        return None if self.device_bytes is None else self.peak <= usable(self.device_bytes)

    def print(self, console: Console | None = None) -> None:
        """The tables, in the terminal."""
        console = console or Console()
        for title, rows in (("part", self.parts), ("phase, with all that is live in it", self.phases)):
            table = Table(title=None)
            table.add_column(title)
            table.add_column("GiB", justify="right")
            for name, size in rows.items():
                mark = "  ← peak" if rows is self.phases and size == self.peak else ""
                table.add_row(name + mark, f"{size / GIB:.3f}")
            console.print(table)
        for line in self.lines():
            # A terminal wraps by itself, a notebook cuts.
            console.print(line, soft_wrap=not console.is_jupyter, highlight=False, markup=False)

    def lines(self) -> list[str]:
        """The conclusions in words."""
        s, rows = self.setting, self.setting.sequences * self.setting.completion
        tile = self.chunk.rows * self.chunk.columns * 4 / MIB
        why = (
            "head.chunk asks for its rows"
            if s.chunk_rows
            else f"memhead's tile for {s.device_type}, the size that was fastest when measured"
        )
        found = [
            f"{self.name}: {s.sequences} sequences of {s.prompt} + {s.completion} tokens a forward pass, "
            f"{s.sampled} sampled at a time",
            f"chunk: {self.chunk.rows} rows × {self.chunk.columns} vocabulary entries = {tile:.1f} MiB of logits in "
            f"place of {rows} × {s.shape.vocab} = {rows * s.shape.vocab * 4 / MIB:.1f} MiB: {why}",
        ]
        if self.device_bytes is not None:
            verdict = "fits" if self.fits else "does NOT fit"
            found.append(
                f"peak {self.peak / GIB:.2f} GiB {verdict} {self.device_bytes / GIB:.1f} GiB, of which "
                f"{usable(self.device_bytes) / GIB:.1f} are counted as usable"
            )
            longest = self.longest_completion
            found.append(f"longest completion that fits: {f'{longest} tokens' if longest else 'none'}")
        return found + [f"note: {note}" for note in self.notes]


def usable(device_bytes: int) -> int:
    """What of a device a run may count on."""
    return int(device_bytes * (1 - FRAGMENTATION) - RESERVE)


def plan(config: RunConfig, device_bytes: int | None = None) -> Plan:
    """The plan of a run; `device_bytes` None takes the GPU that is here, if any.

    Raises recipes.plan.shapes.UnknownShape if the model's sizes are not at hand.
    """
    if device_bytes is None:
        device_bytes = _device_here()
    setting, notes = _setting(config, device_bytes)
    parts, phases, chunk = measure(setting)
    longest = None if device_bytes is None else longest_completion(setting, usable(device_bytes))
    return Plan(config.run.name, setting, parts, phases, chunk, device_bytes, longest, notes)


def show(config: RunConfig, device: str | None) -> int:
    """The command line's `--plan --device`: prints the plan; the exit status is 2 for a mistake, else 0."""
    try:
        plan(config, None if device is None else parse_size(device)).print()
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    return 0


def measure(s: Setting) -> tuple[dict[str, int], dict[str, int], Chunk]:
    """Bytes by part, bytes by phase, and the head's chunk."""
    shape, e, rows = s.shape, s.precision.e, s.sequences * s.completion
    size = s.precision.adapter if s.lora_rank else s.precision.weights
    chunk = memory.head_chunk(shape, rows, e, s.device_type, s.chunk_rows)
    states, temporaries = (
        beside + full
        for beside, full in zip(
            memory.optimizer_bytes(s.trainable, size, s.optim),
            memory.optimizer_bytes(s.saved, s.precision.weights, s.optim),
            strict=True,
        )
    )
    weights = memory.weight_bytes(shape, s.precision)
    saved = s.saved * s.precision.weights
    adapter = s.trainable * size + saved if s.lora_rank else 0
    gradients = s.trainable * size + saved
    kv = memory.kv_cache_bytes(shape, s.sampled, s.length, e) + memory.sampling_bytes(shape, s.sampled)
    activations = {
        way: memory.activation_bytes(
            shape,
            s.precision,
            s.sequences,
            s.length,
            r=s.lora_rank,
            checkpointing=way,
            offloaded=s.offloaded,
        )
        for way in (False, True)
    }
    full = memory.full_logits_bytes(shape, rows, e)
    ours = memory.memhead_bytes(shape, rows, e, chunk, trained=s.head_trained)
    copies = shape.linear_parameters() * e if s.precision.autocast and s.precision.weights == 4 else 0
    head = full if s.head == "full" else ours
    parts = {
        "parameters": weights,
        "reference model": weights if s.reference else 0,
        "adapter and saved modules": adapter,
        "gradients": gradients,
        "optimizer": states,
        "KV cache and sampling": kv,
        "weights cast by autocast": copies,
        "activations without checkpointing": activations[False],
        "activations with checkpointing": activations[True],
        "head with full logits": full,
        "head with memhead": ours,
    }
    resting = weights * (2 if s.reference else 1) + adapter + states
    inference = memory.inference_bytes(shape, s.precision, s.sequences, s.length)
    if s.offloaded:
        inference = activations[True]  # as measured: Unsloth's scoring takes what its forward pass takes
    graph = resting + gradients + activations[s.checkpointing] + copies
    scoring = memory.memhead_bytes(shape, rows, e, chunk, trained=False) if s.head != "full" else full
    phases = {
        "generation": resting + kv + memory.inference_bytes(shape, s.precision, s.sampled, s.prompt),
        "scoring without gradient": resting + inference + scoring + copies,
        "forward, loss and backward": graph + head,
        "optimizer": resting + gradients + temporaries,
    }
    return parts, phases, chunk


def longest_completion(s: Setting, available: int) -> int:
    """The longest completion whose peak stays within `available` bytes, 0 if none; at most what the model takes."""
    low, high = 0, max(0, s.shape.positions - s.prompt)
    while low < high:
        middle = (low + high + 1) // 2
        peak = max(measure(replace(s, completion=middle))[1].values())
        low, high = (middle, high) if peak <= available else (low, middle - 1)
    return low


def _setting(config: RunConfig, device_bytes: int | None) -> tuple[Setting, list[str]]:
    shape, grpo, model = shape_of(config), config.grpo, config.model
    notes = [] if shape.exact else ["this architecture is planned as a Llama of its sizes"]
    cuda = device_bytes is not None or model.loader != "scratch"
    precision = _precision(config, shape, cuda)
    completion = config.completion_length
    if model.max_seq_length is not None:
        prompt = model.max_seq_length - completion
    else:
        prompt = max(1, min(PROMPT, shape.positions - completion))
        notes.append(f"prompts of {prompt} tokens are assumed; model.max_seq_length would say it")
    batch = grpo.get("per_device_train_batch_size", 8)
    steps = grpo.get("steps_per_generation") or grpo.get("gradient_accumulation_steps", 1)
    rank = config.lora.r if config.lora is not None else 0
    targets = config.lora.target_modules if config.lora is not None else []
    saved = config.lora.modules_to_save or [] if config.lora is not None else []
    if model.loader == "unsloth":
        batch = max(batch, grpo.get("num_generations", 8))
        notes.append(
            "Unsloth raises the batch to one group and keeps checkpointed layer inputs in host memory; that it scores "
            "a few sequences at a time where memory is short is not counted"
        )
    if model.fast_inference or grpo.get("use_vllm"):
        share = model.gpu_memory_utilization or grpo.get("vllm_gpu_memory_utilization") or 0.3
        sleeps = model.vllm_standby or grpo.get("vllm_enable_sleep_mode")
        meanwhile = "it frees the cache" if sleeps else "it keeps both: training must fit beside them"
        notes.append(
            f"vLLM takes up to {share:.0%} of the device for weights and KV cache, under Unsloth the weights that are "
            f"trained on; while the model trains {meanwhile}. Counted here is the cache that one batch needs"
        )
    if config.head.impl == "trl":
        notes.append("head.impl: trl is counted as memhead; both hold one chunk of logits")
    setting = Setting(
        shape=shape,
        precision=precision,
        trainable=shape.lora_parameters(rank, targets) if rank else shape.parameters(),
        saved=shape.module_parameters(saved),
        head_trained=not rank or any("lm_head".endswith(name) for name in saved),
        lora_rank=rank,
        optim=str(grpo.get("optim", "adamw_torch_fused")),
        sequences=batch,
        sampled=grpo.get("generation_batch_size") or batch * steps,
        prompt=prompt,
        completion=completion,
        checkpointing=model.gradient_checkpointing,
        offloaded=model.loader == "unsloth" and model.gradient_checkpointing and cuda,
        reference=bool(grpo.get("beta", 0.0)) and not rank,
        head=config.head.impl,
        chunk_rows=config.head.chunk,
        device_type="cuda" if cuda else "cpu",
    )
    return setting, notes


def _precision(config: RunConfig, shape: ModelShape, cuda: bool) -> Precision:
    model = config.model
    dtype = shape.dtype if model.dtype == "auto" else model.dtype
    weights = DTYPE_BYTES.get(dtype, 4)
    four = "4bit-double" if model.loader == "unsloth" else "4bit"
    quantised = four if model.load_in_4bit else "8bit" if model.load_in_8bit else ""
    return Precision(
        weights=2 if quantised else weights, e=2 if cuda else weights, quantised=quantised, autocast=cuda
    )


def _device_here() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
