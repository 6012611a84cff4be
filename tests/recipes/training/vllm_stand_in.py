"""A small server that speaks what TRL 1.15's client says to `vllm serve`: a stand-in, since vLLM needs a GPU.

It samples with a model of its own, whose weights are those that it was sent; tokens are those of the policy itself, so
that the trainer must find the same log-probabilities.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class StandIn(ThreadingHTTPServer):
    """Serves on a free port of this machine while it is a context.

    Args:
        model: a causal language model; None until `begin` has been given one.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model: Any = None
        self.sent: Queue = Queue()  # what stands for NCCL: tensors by name
        self.asked: list[dict[str, Any]] = []  # requests for completions
        self.paths: list[str] = []
        self.updates = 0  # of the weights, so far

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def model_of(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """`load` of recipes.models, a copy of whose model is served from then on, of no use until weights arrive."""

        def keep(*args: Any, **options: Any) -> Any:
            model, tokenizer = load(*args, **options)
            self.model = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.zero_()
            return model, tokenizer

        return keep

    @torch.no_grad()
    def complete(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """`n` choices for each prompt, prompt by prompt."""
        ends = self.model.generation_config.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        choices = []
        for prompt in request["prompt"]:
            for _ in range(request["n"]):
                ids, logprobs = list(prompt), []
                for _ in range(request["max_tokens"]):
                    logits = self.model(torch.tensor([ids])).logits[0, -1].float()
                    logp = (logits / (request["temperature"] or 1.0)).log_softmax(-1)
                    greedy = request["temperature"] == 0
                    token = int(logp.argmax() if greedy else torch.multinomial(logp.exp(), 1))
                    ids.append(token)
                    logprobs.append(float(logp[token]))
                    if token == end:
                        break
                made = ids[len(prompt) :]
                names = [f"token_id:{token}" for token in made]
                tops = [{name: value} for name, value in zip(names, logprobs, strict=True)]
                shown = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops}
                choices.append({"prompt_token_ids": prompt, "token_ids": made, "logprobs": shown})
        return choices

    def receive(self, info: dict[str, Any]) -> None:
        """The tensors that were announced, in their order."""
        weights = self.model.state_dict()
        for name, shape in zip(info["names"], info["shapes"], strict=True):
            sent, value = self.sent.get(timeout=30)
            assert (sent, list(value.shape)) == (name, shape)
            weights[name].copy_(value)
        self.updates += 1


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = {
            "/health": {},
            "/v1/models": {"data": [{"id": "stand-in"}]},
            "/get_world_size": {"world_size": 1},
        }
        self._answer(found[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.server.paths.append(self.path)
        if self.path == "/v1/completions":
            before = self.server.updates
            choices = self.server.complete(body)
            versions = (before, self.server.updates)  # of the weights, at its beginning and end
            self.server.asked.append(body | {"versions": versions, "choices": choices})
            self._answer({"choices": choices})
            return
        if self.path == "/update_weights":
            self.server.receive(body["update_info"])
        self._answer({"success": True})

    def _answer(self, found: dict[str, Any]) -> None:
        text = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def weight_transfer(server: StandIn) -> dict[str, Any]:
    """What TRL's client imports from vLLM, by name: the trainer's end of the transfer of weights."""

    def send(iterator: Any, trainer_args: Any) -> None:
        for name, value in iterator:
            server.sent.put((name, Tensor.clone(value.detach())))

    engine = SimpleNamespace(trainer_send_weights=send)
    return {"NCCLWeightTransferEngine": engine, "NCCLTrainerSendWeightsArgs": lambda **given: given}
