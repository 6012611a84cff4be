"""train_grpo.py under FSDP2 with vLLM's server, whose stand-in the first process serves: vllm_on_ranks.py FOLDER …"""

import os
import sys
import time
from pathlib import Path

from accelerate.state import AcceleratorState
from fsdp_on_cpu import make_sharding
from trl.generation import vllm_client, vllm_generation
from vllm_stand_in import StandIn, weight_transfer

import train_grpo
from recipes.models import load
from recipes.training.preflight import Machine

MACHINE = Machine(cuda=True, bfloat16=True, packages=frozenset({"vllm"}))


def address(folder: Path, server: StandIn) -> str:
    """Of the first process's server."""
    place = folder / "url"
    if os.environ["RANK"] == "0":
        (folder / "written").write_text(server.url)
        (folder / "written").rename(place)
    while not place.is_file():
        time.sleep(0.05)
    return place.read_text()


def main(folder: Path, arguments: list[str]) -> int:
    with StandIn() as server:
        for module in (vllm_client, vllm_generation):
            module.is_vllm_available = lambda *_: True
        vars(vllm_client).update(weight_transfer(server))
        vllm_client.VLLMClient.init_communicator = lambda self, device: None
        Machine.here = lambda: MACHINE  # type: ignore[method-assign]
        AcceleratorState.__init__ = make_sharding  # type: ignore[method-assign]
        load.load = server.model_of(load.load)
        return train_grpo.main([*arguments, f"grpo.vllm_server_base_url={address(folder, server)}"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
