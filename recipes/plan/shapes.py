"""The sizes of a model, from its config.json: parameters and their bytes without loading a weight.

Counted are the parts of a Llama: embedding, attention with grouped keys, gated MLP, two norms a layer, head. Qwen2 adds
biases to q, k and v. Another architecture is planned as a Llama of its sizes, and `exact` is False.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.config.load import RunConfig

_EXACT = {"llama", "mistral", "qwen2"}
_TABLE = Path(__file__).with_name("model_shapes.yaml")


class UnknownShape(ValueError):
    """No config.json of the model is at hand; the message says what to do."""


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes. `dtype` is the checkpoint's, as torch names it."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    tied: bool
    qkv_bias: bool
    dtype: str
    exact: bool = True

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """From the keys of a config.json."""
        heads = config["num_attention_heads"]
        kind = config.get("model_type", "")
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        return cls(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            positions=config.get("max_position_embeddings", 2048),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
            dtype=str(dtype).removeprefix("torch."),
            exact=kind in _EXACT,
        )

    @property
    def attention_width(self) -> int:
        """All query heads side by side."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """All key heads side by side, or all value heads."""
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one transformer layer: name -> (inputs, outputs)."""
        h, i, q, kv = self.hidden, self.intermediate, self.attention_width, self.kv_width
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    def linear_parameters(self) -> int:
        """Weights of the transformer layers' linears: what is quantised."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears().values())

    def other_parameters(self) -> int:
        """Embedding, norms, biases, and the head unless it is the embedding."""
        biases = self.attention_width + 2 * self.kv_width if self.qkv_bias else 0
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (2 * self.hidden + biases) + self.hidden

    def parameters(self) -> int:
        """All of them, a tied head counted once."""
        return self.linear_parameters() + self.other_parameters()

    def lora_parameters(self, r: int, targets: list[str] | str) -> int:
        """Adapters of rank r: r × (inputs + outputs) for each adapted linear."""
        names = list(self.linears()) if targets == "all-linear" else targets
        pairs = [self.linears()[name] for name in names if name in self.linears()]
        return self.layers * r * sum(inputs + outputs for inputs, outputs in pairs)

    def module_parameters(self, names: list[str]) -> int:
        """Parameters of the modules with these names, found as PEFT finds `modules_to_save`: by how a path ends."""
        return sum(
            size
            for path, size in self._modules()
            if any(f"{name}." in f"{path}." for name in names)  # the module itself, or one around it
        )

    def _modules(self) -> Iterator[tuple[str, int]]:
        """The path of every module that has parameters, and how many."""
        yield "lm_head", self.vocab * self.hidden
        yield "model.embed_tokens", self.vocab * self.hidden
        yield "model.norm", self.hidden
        for layer in range(self.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}", self.hidden
            for name, (inputs, outputs) in self.linears().items():
                part = "self_attn" if name[0] in "qkvo" else "mlp"
                bias = outputs if self.qkv_bias and name[0] in "qkv" else 0
                yield f"model.layers.{layer}.{part}.{name}", inputs * outputs + bias


def shape_of(config: RunConfig) -> ModelShape:
    """The shape of the run's model: made from scratch, local, in the hub's cache, or in model_shapes.yaml.

    Raises UnknownShape if it is nowhere.
    """
    if config.model.loader == "scratch":
        return _scratch(config)
    name = config.model.name or ""
    local = Path(name).expanduser() / "config.json"
    if local.is_file():
        return ModelShape.from_config(json.loads(local.read_text(encoding="utf-8")))
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    if name in table:
        return ModelShape.from_config(table[name])
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=config.model.revision or "main")
    if isinstance(cached, str):
        return ModelShape.from_config(json.loads(Path(cached).read_text(encoding="utf-8")))
    raise UnknownShape(
        f"model.name: no config.json of {name!r} on this machine; fetch it: hf download {name} config.json, "
        "or give a local folder"
    )


def _scratch(config: RunConfig) -> ModelShape:
    from recipes.config.schema import ScratchConfig
    from recipes.tasks import get_task

    made = config.model.scratch or ScratchConfig()
    if config.model.tokenizer == "bpe":
        vocab = made.vocabulary
    elif config.model.tokenizer is not None:
        from transformers import AutoTokenizer

        vocab = len(AutoTokenizer.from_pretrained(config.model.tokenizer, local_files_only=True))
    else:
        vocab = len(get_task(config.task.name).characters) + 3  # <pad>, <eos>, <unk>
    return ModelShape(
        vocab=vocab,
        hidden=made.hidden_size,
        intermediate=made.intermediate_size,
        layers=made.layers,
        heads=made.heads,
        kv_heads=made.kv_heads or made.heads,
        head_dim=made.hidden_size // made.heads,
        positions=made.max_positions,
        tied=made.tie_embeddings,
        qkv_bias=False,
        dtype="float32",
    )
