"""A stand-in of what this repository and TRL use of vLLM 0.26, which does not run without a GPU.

The signatures are vLLM's: LLM(model=…, enable_lora=…), generate, sleep, wake_up, reset_prefix_cache,
llm_engine.add_lora, LoRARequest, SamplingParams; a call with another keyword fails. An adapter is read from its files
as vLLM reads them (rank, alpha, rslora; pairs lora_A, lora_B) and added to a base of its own, which a test can look at.
Log-probabilities are those after temperature and truncation (logprobs_mode: processed_logprobs, which TRL asks for).
"""

import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    tensorizer_config_dict: dict | None = None
    load_inplace: bool = False


@dataclass
class Model:
    """`driver_worker.model_runner.model`."""

    module: torch.nn.Module

    def named_parameters(self):
        return self.module.named_parameters()

    def load_weights(self, weights):
        parameters = dict(self.module.named_parameters())
        for name, value in weights:
            if name in parameters:  # a tied head has none
                parameters[name].data.copy_(value)


@dataclass
class LLM:
    """vLLM's class; `round_head` makes its head one of bfloat16."""

    model: str
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    enable_sleep_mode: bool = False
    model_impl: str = "auto"
    enforce_eager: bool = False
    distributed_executor_backend: str | None = None
    seed: int = 0
    max_num_batched_tokens: int | None = None
    logprobs_mode: str = "raw_logprobs"
    quantization: str | None = None
    trust_remote_code: bool = False
    enable_lora: bool = False
    max_lora_rank: int = 16
    max_loras: int = 1
    max_cpu_loras: int | None = None
    dtype: str = "auto"
    revision: str | None = None
    hf_overrides: dict | None = None
    calls: list = field(default_factory=list)

    def __post_init__(self):
        self.base = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).eval()
        self.loaded = {}  # number -> {weight's name: what is added to it}
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=Model(self.base)))
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(dtype=self.base.dtype, max_model_len=self.max_model_len),
            model_executor=SimpleNamespace(driver_worker=worker),
            add_lora=self._add_lora,
        )
        self.asleep = None

    def round_head(self):
        self.llm_engine.model_config.dtype = torch.bfloat16
        self.base.get_output_embeddings().register_forward_hook(
            lambda module, given, _: given[0].bfloat16() @ module.weight.bfloat16().T
        )

    def _add_lora(self, request):
        assert self.enable_lora
        place = Path(request.lora_path)
        config = json.loads((place / "adapter_config.json").read_text())
        assert config["r"] <= self.max_lora_rank
        assert not config["modules_to_save"]
        assert config["bias"] == "none"
        assert not config["use_dora"]
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        tensors = load_file(place / "adapter_model.safetensors")
        added = {}
        for name, a in tensors.items():
            if ".lora_A." not in name:
                continue
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            added[f"{module}.weight"] = scale * b.float() @ a.float()
        assert len(added) * 2 == len(tensors)
        self.loaded[request.lora_int_id] = added
        while len(self.loaded) > (self.max_cpu_loras or self.max_loras):
            self.loaded.pop(next(iter(self.loaded)))
        self.calls.append(("add_lora", request.lora_name))
        return True

    def sleep(self, level=1, mode="abort"):
        self.calls.append(("sleep", level))
        self.asleep = level
        if level == 2:
            for parameter in self.base.parameters():
                parameter.data.fill_(float("nan"))

    def wake_up(self, tags=None):
        self.calls.append(("wake_up", tags))

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        return True

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        parameters = dict(self.base.named_parameters())
        added = {} if lora_request is None else self.loaded[lora_request.lora_int_id]
        weights = {
            name: w + added[name].to(w.dtype) if name in added else w for name, w in parameters.items()
        }
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        return [
            SimpleNamespace(
                prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs)]
            )
            for ids, (tokens, logprobs) in zip(
                rows, self._sample(weights, rows, sampling_params), strict=True
            )
        ]

    def _sample(self, weights, rows, wanted):
        """Tokens and log-probabilities of each row, without a cache."""
        width, pad = max(map(len, rows)), self.base.config.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        end, filters = self.base.config.eos_token_id, _filters(wanted)
        drawn = [([], []) for _ in rows]
        alive = torch.ones(len(rows), dtype=torch.bool)
        for _ in range(wanted.max_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            states = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            logits = torch.func.functional_call(self.base, weights, (), states).logits[:, -1]
            logits = logits.float()
            if wanted.temperature == 0.0:
                logprobs, token = logits.log_softmax(-1), logits.argmax(-1)
            else:
                logprobs = filters(ids, logits).log_softmax(-1)
                token = torch.multinomial(logprobs.exp(), 1)[:, 0]
            for row, one in enumerate(token.tolist()):
                if alive[row]:
                    drawn[row][0].append(one)
                    value = SimpleNamespace(logprob=float(logprobs[row, one]), rank=1)
                    drawn[row][1].append({one: value})
            alive &= token != end
            if not alive.any():
                break
            ids = torch.cat([ids, token[:, None]], 1)
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
        return drawn


def _filters(wanted):
    found = LogitsProcessorList()
    if wanted.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(wanted.temperature))
    if wanted.min_p:  # vLLM's order: first
        found.append(MinPLogitsWarper(wanted.min_p))
    if wanted.top_k:
        found.append(TopKLogitsWarper(wanted.top_k))
    if wanted.top_p < 1.0:
        found.append(TopPLogitsWarper(wanted.top_p))
    return found


@contextmanager
def vllm_stand_in():
    """TRL finds this in the place of vLLM; gives the list of the engines that are made meanwhile."""
    from trl.generation import vllm_generation

    made = []
    names = {
        "is_vllm_available": lambda *_: True,
        "LLM": lambda **given: made.append(one := LLM(**given)) or one,
        "SamplingParams": SamplingParams,
        "ensure_master_addr_port": lambda: None,
    }
    missing = object()
    before = {name: getattr(vllm_generation, name, missing) for name in names}
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    modules["vllm.lora.request"].LoRARequest = LoRARequest
    kept = {name: sys.modules.get(name, missing) for name in modules}
    environment = dict(os.environ)  # TRL tells vLLM of its process there
    vars(vllm_generation).update(names)
    sys.modules.update(modules)
    try:
        yield made
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for name, value in before.items():
            delattr(vllm_generation, name) if value is missing else setattr(vllm_generation, name, value)
        for name, value in kept.items():
            sys.modules.pop(name) if value is missing else sys.modules.update({name: value})
