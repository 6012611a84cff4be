"""Where a configuration's values arrive: what TRL, transformers, Unsloth, PEFT, head, evaluation, warm start are told.

    reach(config, patch)     {"trl.learning_rate": 1e-6, "head.chunk": None, …}

The run's own code runs up to each border; what lies behind is tested where it lies.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig

import memhead.integrations.transformers
import memhead.integrations.trl
import recipes.tracking.tracker
from recipes.config.load import RunConfig
from recipes.models import load
from recipes.tasks.countdown import Countdown
from recipes.tracking.run_folder import RunFolder
from recipes.training import evaluation, head_check, step_choice, trainer, warm_start, worst_case
from recipes.training.rewards import Rewards
from recipes.training.session import Session

MOVES = {"output_dir", "logging_dir"}  # with the run folder


class Small(Countdown):
    """Countdown with a dozen problems, which take no time to make."""

    train = Dataset.from_dict({"prompt": ["1>"] * 6, "numbers": [[1]] * 6, "target": [1] * 6})
    held_out = Dataset.from_dict({"prompt": [f"{n}=" for n in range(600)], "target": list(range(600))})

    def is_correct(self, completion, row):
        return False

    def warm_start_examples(self, count):
        return [("1>", "1")] * count


def reach(config: RunConfig, patch: Any) -> dict[str, Any]:
    """Every value, by where it arrives; `patch`: pytest's monkeypatch."""
    found: dict[str, Any] = {}
    arguments = config.grpo_config("checkpoints")
    found |= {f"trl.{name}": value for name, value in arguments.to_dict().items() if name not in MOVES}
    _model(config, patch, found)
    found["folder"] = f"{config.run.output_root}/{config.run.name}"
    task = Small(config.task.options, config.run.seed)
    session = Session(
        config, task, Rewards(["a reward"], [1.0]), _Folder(), arguments, _Model(), _Tokenizer()
    )
    _head(session, patch, found)
    _trainer(session, patch, found)
    _tracking(session, patch, found)
    _evaluation(session, patch, found)
    if config.run.warm_start is not None:
        _warm_start(session, patch, found)
    return found


class _Folder(RunFolder):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.metrics = SimpleNamespace(append=lambda line: None, write=lambda line: None)

    def write_json(self, name: str, obj: Any) -> Any:
        return self.path / name

    def read_json(self, name: str) -> Any:
        return None


NOTHING_MISSING = {"missing_keys": [], "mismatched_keys": []}  # as `output_loading_info` tells it


class _Model(torch.nn.Module):
    device = torch.device("cpu")
    name_or_path = ""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.config = PretrainedConfig()

    def forward(self, **batch: Any) -> Any:
        self.rows = [*getattr(self, "rows", []), len(batch["input_ids"])]
        return SimpleNamespace(loss=0.1 * self.weight.sum())

    def save_pretrained(self, place: Any) -> None:
        pass


class _Tokenizer:
    eos_token_id, pad_token_id, padding_side = 1, 0, "right"
    pad_token = "p"

    def __call__(self, texts: Any, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[[5] for _ in texts])

    def __len__(self) -> int:
        return 20

    def save_pretrained(self, place: Any) -> None:
        pass


def _recorder(found: dict[str, Any], place: str, answer: Any = None) -> Any:
    """Puts the arguments of a call into `found`."""

    def record(*given: Any, **named: Any) -> Any:
        plain = [value for value in given if isinstance(value, (str, int, float, bool, type(None)))]
        found.update({f"{place}.{index}": value for index, value in enumerate(plain)})
        found.update({f"{place}.{name}": _plain(value) for name, value in named.items()})
        return answer() if answer is not None else None

    return record


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _model(config: RunConfig, patch: Any, found: dict[str, Any]) -> None:
    """What the loader asks for."""
    tokenizer = SimpleNamespace(from_pretrained=_recorder(found, "tokenizer", lambda: _Tokenizer()))
    patch.setattr(load, "AutoTokenizer", tokenizer)
    patch.setattr(
        load,
        "AutoModelForCausalLM",
        SimpleNamespace(from_pretrained=_recorder(found, "model", lambda: (_Model(), NOTHING_MISSING))),
    )
    patch.setattr(load, "AutoConfig", SimpleNamespace(from_pretrained=lambda *_, **__: PretrainedConfig()))
    patch.setattr(
        load, "bpe_tokenizer", lambda texts, size: found.update({"tokenizer.bpe": size}) or _Tokenizer()
    )

    def scratch(shape: Any, tokens: Any, seed: int) -> Any:
        made = load.scratch_config(shape, len(tokens)).to_dict()
        found.update({f"llama.{name}": value for name, value in made.items()})
        found["llama.seed"] = seed
        return _Model()

    patch.setattr(load, "set_dtype", lambda model, dtype: found.update({"llama.dtype": dtype}))
    patch.setattr(load, "scratch_llama", scratch)
    unsloth = SimpleNamespace(
        from_pretrained=_recorder(found, "unsloth", lambda: (_Model(), _Tokenizer())),
        get_peft_model=_recorder(found, "unsloth.lora", _Model),
    )
    patch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=unsloth))
    task = Small(config.task.options, config.run.seed)
    patch.setattr(Small, "characters", config.make_task().characters)
    _, loaded = load.load(config.model, task, config.run.seed, lora=config.lora)
    if config.model.loader == "unsloth":
        found["tokenizer.side"] = loaded.padding_side


def _head(session: Session, patch: Any, found: dict[str, Any]) -> None:
    """What computes log-probabilities in training, in the warm start and in the check."""
    from contextlib import nullcontext

    patch.setattr(memhead.integrations.trl, "install", _recorder(found, "head"))
    unsloths = SimpleNamespace(install=_recorder(found, "head"))
    patch.setitem(sys.modules, "memhead.integrations.unsloth", unsloths)
    patch.setattr(memhead.integrations, "unsloth", unsloths, raising=False)
    trainer.install_head(session.config, "arguments")
    patch.setattr(
        memhead.integrations.transformers, "patch", _recorder(found, "head of warm start", nullcontext)
    )
    trainer.head_of_warm_start(session.config, session.model)
    checked = _recorder(found, "check", lambda: {"passed": True, "vocabulary": 20, "prompt_nats": 3.0})
    patch.setattr(head_check, "check_head", checked)
    head_check.require_exact_head(session)

    def longest(*_: Any) -> None:
        found["worst case"] = True
        raise LookupError

    patch.setattr(worst_case, "worst_case", longest)
    try:
        worst_case.require_room(session, SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False))
    except LookupError:
        pass


def _trainer(session: Session, patch: Any, found: dict[str, Any]) -> None:
    """What the trainer is made of."""
    import recipes.training.packed_attention
    import recipes.training.packed_step
    import recipes.training.packed_support

    def made(kind: str) -> Any:
        def make(**given: Any) -> Any:
            found["trainer"] = kind
            adapters = given.pop("peft_config")
            if adapters is not None:
                found.update({f"peft.{name}": value for name, value in adapters.to_dict().items()})
            for name in ("model", "processing_class", "args", "train_dataset", "reward_funcs"):
                given.pop(name)
            found.update({f"trainer.{name}": value for name, value in given.items()})
            return SimpleNamespace(accelerator=SimpleNamespace(state=None))

        return make

    patch.setattr(step_choice, "guarded", lambda kind: made(kind if isinstance(kind, str) else "trl"))
    patch.setattr(recipes.training.packed_step, "packed", lambda kind: "packed")
    patch.setattr(recipes.training.packed_support, "why_not", lambda given, varlen: None)
    patch.setattr(recipes.training.packed_support, "half_precision", lambda *_: False)
    patch.setattr(recipes.training.packed_attention, "varlen_available", lambda *_, **__: False)
    patch.setattr(step_choice, "measured", lambda kind, every: found.update({"ratios.every": every}) or kind)
    patch.setattr(step_choice, "ahead", lambda kind: found.update({"ahead": True}) or kind)
    patch.setattr(step_choice, "_check", lambda *_: None)
    trainer.make_trainer(session)


def _tracking(session: Session, patch: Any, found: dict[str, Any]) -> None:
    """Meter and sample."""
    patch.setattr(recipes.tracking.tracker, "attach", lambda *_: None)
    patch.setattr(
        recipes.tracking.tracker, "make_meter", lambda device, every: found.update({"meter.every": every})
    )
    ten = [str(number) for number in range(10)]
    logs = {"prompt": ten, "completion": ten, "rewards": {}, "advantages": ten}
    trained = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        log=None,
        _logs=logs,
        is_world_process_zero=lambda: True,
    )
    tracker = recipes.tracking.tracker.Tracker(trained, session.folder, session.config.tracking, None, False)
    found["sample"] = len(tracker._sample())


def _evaluation(session: Session, patch: Any, found: dict[str, Any]) -> None:
    """How many completions, how they are drawn, and from which seed."""
    patch.setattr("recipes.tasks.judge_all", lambda judge, texts, *_: [False for _ in texts])
    patch.setattr(evaluation, "judge_all", lambda judge, texts, *_: [False for _ in texts])
    asked: list[Any] = []

    def generate(prompts: list[Any], sampling: Any) -> list[list[str]]:
        greedy = sampling.samples == 1 and not sampling.temperature
        kind = "greedy" if greedy else "sampled"
        asked.append((kind, len(prompts)))
        found[f"{kind}.length"] = sampling.max_new_tokens
        if not greedy:
            found.update({"sampled.count": sampling.samples, "sampled.temperature": sampling.temperature})
            found["sampled.seed"] = torch.initial_seed()
        return [["0"] * sampling.samples for _ in prompts]

    evaluation.evaluator(session.config, session.task, generate)()
    for kind in dict.fromkeys(kind for kind, _ in asked):
        sizes = [size for name, size in asked if name == kind]
        found[f"{kind}.problems"], found[f"{kind}.batch"] = sum(sizes), sizes[0]


def _warm_start(session: Session, patch: Any, found: dict[str, Any]) -> None:
    """Its steps as the optimizer takes them."""
    rates: list[float] = []
    looks: list[int] = []

    class Watched(torch.optim.AdamW):
        def __init__(self, parameters: Any, *, lr: float, betas: Any, weight_decay: float) -> None:
            found["warm start.betas"], found["warm start.weight_decay"] = betas, weight_decay
            super().__init__(parameters, lr=lr, betas=betas, weight_decay=weight_decay)

        def step(self, closure: Any = None) -> Any:
            rates.append(round(self.param_groups[0]["lr"], 9))

    def probing(*_: Any) -> Any:
        def measure(**options: Any) -> Any:
            looks.append(len(rates))
            return {"accuracy": len(looks) / 10}

        return measure

    with patch.context() as inner:
        inner.setattr(torch.optim, "AdamW", Watched)
        inner.setattr(warm_start, "evaluator", probing)
        inner.setattr(warm_start, "unusable_for", lambda _: None)
        inner.setattr(warm_start, "seal", lambda place: None)  # nothing is saved
        limit = _recorder(found, "warm start.bad steps", lambda: SimpleNamespace(good=lambda step: None))
        inner.setattr(warm_start, "BadSteps", lambda most, remedy: limit(most))
        warm_start.begin_supervised(session, session.config.run.warm_start)
    found |= {"warm start.rates": rates, "warm start.looks": looks, "warm start.rows": session.model.rows[0]}
