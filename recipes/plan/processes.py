"""What each of several processes holds on its device, by how the model is spread over them.

DDP             the whole model in each, and the gradients a second time: in the buckets by which they are exchanged
FSDP2, ZeRO-3   its part of everything that rests; while it computes, embedding and head whole, and two layers: the one
                at work and the one after it
"""

from __future__ import annotations

from dataclasses import replace

from recipes.plan.plan import GIB, Memory, Plan
from recipes.plan.setting import Setting
from recipes.table import Table

SHARDED = ("parameters", "reference model", "adapter and saved modules", "optimizer")
BACKWARD, OPTIMIZER = "forward, loss and backward", "optimizer"


def by_way(found: Plan, processes: int) -> Table:
    """The phases of one process, in GiB, a column for each way."""
    replicated = ddp(found.memory)
    parts = sharded(found.setting, found.memory, processes)
    rows = [(name, f"{size / GIB:.3f}", f"{parts[name] / GIB:.3f}") for name, size in replicated.items()]
    rows.append(("peak", f"{max(replicated.values()) / GIB:.3f}", f"{max(parts.values()) / GIB:.3f}"))
    return Table((f"each of {processes} processes, GiB", "DDP", "FSDP2 or ZeRO-3"), rows)


def in_each(found: Plan, processes: int, parts: str) -> Plan:
    """With the phases of one process in place of one GPU's. parts: what keeps the model in parts, "" for DDP."""
    memory = found.memory
    phases = sharded(found.setting, memory, processes) if parts else ddp(memory)
    return replace(found, memory=replace(memory, phases=phases))


def ddp(memory: Memory) -> dict[str, int]:
    """Bytes by phase."""
    return {name: size + memory.parts["gradients"] for name, size in memory.phases.items()}


def sharded(s: Setting, memory: Memory, processes: int) -> dict[str, int]:
    """Bytes by phase."""

    def elsewhere(size: int) -> int:
        return size - size // processes

    parts, found = memory.parts, {}
    resting = elsewhere(sum(parts[name] for name in SHARDED))
    gradients = elsewhere(parts["gradients"])
    for name, size in memory.phases.items():
        size -= resting
        if name in (BACKWARD, OPTIMIZER):
            size -= gradients
        if name != OPTIMIZER:
            size += whole_while_computing(s)
        if name == BACKWARD:
            size -= parts["weights cast by autocast"]  # gathered in that dtype
        found[name] = size
    return found


def whole_while_computing(s: Setting) -> int:
    """Bytes of weights that a process has whole at a time, in the dtype of its products."""
    shape = s.shape
    layers = 2 * shape.linear // max(1, shape.layers)
    return (shape.parameters - shape.linear + layers) * s.precision.e
