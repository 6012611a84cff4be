"""What the report draws: the records of one run, or of several laid over each other, as charts.

A chart of one run may have several lines, coloured by what they are. With several runs every line becomes a chart of
its own, coloured by run. A chart whose figures were never logged is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.tracking.meters import HEADLINE, MEANING
from recipes.tracking.phases import PHASES, PLANNED
from recipes.tracking.rates import rollouts, together
from recipes.tracking.ratios import labels
from recipes.tracking.speed import TRAINING, WHOLE
from recipes.tracking.summary import summarize

Record = dict[str, Any]
Records = list[Record]
Read = Callable[[Record], float | None]
_PARTS = {"all": "mean", "head": "head", "rest": "rest"}  # of record["mismatch"]
_MOST = 400  # points of a smoothed curve
_THIN = 0.015  # share of the time below which a phase has no area of its own


@dataclass(frozen=True)
class Line:
    """Values over steps.

    low, high: the ends of a band around them, or of an error bar at each if they are `measured` only now and then.
    aside: the line accompanies the chart's other line, and is drawn fainter.
    """

    name: str
    colour: int
    steps: list[int]
    values: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    measured: bool = False
    aside: bool = False


@dataclass(frozen=True)
class Lines:
    """Lines over steps. unit: "" or "%", for shares between 0 and 1. named: the lines' names stand at their ends."""

    title: str
    note: str
    lines: list[Line]
    unit: str = ""
    named: bool = True


@dataclass(frozen=True)
class Areas:
    """Seconds per step by phase, stacked. top: the end of the axis, the same for every run beside it."""

    title: str
    note: str
    steps: list[int]
    seconds: dict[str, list[float]]
    top: float


@dataclass(frozen=True)
class Peaks:
    """MiB by phase: one value per run (None: not measured), and what was planned."""

    title: str
    note: str
    phases: list[str]
    measured: list[list[float | None]]
    planned: list[float | None]


@dataclass(frozen=True)
class Bars:
    """A histogram at one step or two: shares of the tokens, 0 to 1, in each bin."""

    title: str
    note: str
    bins: list[str]
    shares: dict[str, list[float]]  # by what they are of


Chart = Lines | Areas | Peaks | Bars


@dataclass(frozen=True)
class _Series:
    """How to read one line of a chart from a record; the other members are Line's."""

    name: str
    value: Read
    low: Read | None = None
    high: Read | None = None
    measured: bool = False
    aside: bool = False

    def line(self, name: str, colour: int, records: Records) -> Line | None:
        kept = [(record, value) for record in records if (value := self.value(record)) is not None]
        if not kept:
            return None
        steps, values = [record["step"] for record, _ in kept], [value for _, value in kept]
        low, high = (_ends(end, kept) for end in (self.low, self.high))
        return Line(name, colour, steps, values, low, high, self.measured, self.aside)


def _ends(read: Read | None, kept: list[tuple[Record, float]]) -> list[float]:
    """One end of a band, at the value itself where the end was not logged; empty without a band."""
    if read is None:
        return []
    return [value if (end := read(record)) is None else end for record, value in kept]


def _at(*keys: str | int) -> Read:
    """Reads a value below these keys; None where one is missing."""

    def read(record: Any) -> float | None:
        for key in keys:
            try:
                record = record[key]
            except (KeyError, IndexError, TypeError):
                return None
        return record

    return read


def _trl(name: str) -> Read:
    return _at("trl", name)


def charts(runs: dict[str, Records], plan: dict[str, Any] | None = None) -> list[Chart]:
    """What was learned, how the policy changed, what it cost.

    plan: a run folder's plan.json, the fields of `recipes.plan.plan.Memory`; drawn only for a single run.
    """
    records = [record for run in runs.values() for record in run]
    quantities = [*_rewards(records, spread=len(runs) == 1), *_accuracies(records)]
    quantities += _policy(alone=len(runs) == 1)
    ratios = _ratios(records) if len(runs) == 1 else ()
    by_rollout = {name: [together(group) for group in rollouts(run)] for name, run in runs.items()}
    return [
        *_drawn(runs, quantities),
        *ratios,
        *_times(runs),
        *_memory(runs, plan),
        *_drawn(by_rollout, _tokens()),
    ]


_Quantity = tuple[str, str, str, list[_Series]]  # title, note, unit, lines


def _rewards(records: Records, *, spread: bool) -> Iterator[_Quantity]:
    """The reward, and each reward function unless there is only one; with their spread over a batch."""
    names = dict.fromkeys(name for record in records for name in record.get("rewards") or {})
    whole = [name for name in names if all(_same(r.get("reward"), _at("rewards", name)(r)) for r in records)]
    note = "mean and spread (one deviation) of a batch" if spread else "mean of a batch"
    only = f"; only {whole[0]} counts" if len(whole) == 1 else ""
    found = [("Reward", note + only, _at("reward"), _at("reward_std"))]
    found += [
        (f"Reward by {name}", note, _at("rewards", name), _trl(f"rewards/{name}/std"))
        for name in names
        if name not in whole
    ]
    for title, said, value, deviation in found:
        beside = [_Series("spread", deviation, aside=True)] if spread else []
        yield title, said, "", [_Series("mean", value), *beside]


def _same(one: float | None, two: float | None) -> bool:
    return one == two if one is None or two is None else math.isclose(one, two, rel_tol=1e-6)


def _accuracies(records: Records) -> Iterator[_Quantity]:
    evaluated = dict.fromkeys(
        key
        for record in records
        for key in record
        if key.startswith(("accuracy", "pass@", "maj@")) and not key.endswith(("_interval", "_problems"))
    )
    if all(_same(record.get("accuracy"), record.get("accuracy_lenient")) for record in records):
        evaluated.pop("accuracy_lenient", None)  # one line over the other
    lines = [
        _Series(
            key.replace("accuracy_", ""),
            _at(key),
            low=_at(f"{key}_interval", 0),
            high=_at(f"{key}_interval", 1),
            measured=True,
        )
        for key in evaluated
    ]
    yield "Accuracy", "held-out problems, 95 % interval", "%", lines


def _policy(*, alone: bool) -> Iterator[_Quantity]:
    """alone: of one run, whose bands are drawn."""
    yield "Entropy", "of the policy, nats a token", "", [_Series("entropy", _at("entropy"))]
    yield "KL", "from the reference policy, nats a token", "", [_Series("KL", _at("kl"))]
    shortest, longest = _trl("completions/min_length"), _trl("completions/max_length")
    length = _Series("length", _at("completion_length"), shortest, longest)
    yield "Completion length", f"tokens: mean{', shortest to longest' * alone}", "", [length]
    shares = [_Series("cut off", _at("clipped_share")), _Series("no gradient", _at("zero_std_share"))]
    yield "Lost shares", "completions cut off, groups without a gradient", "%", shares
    clipped = [_Series(side, _trl(f"clip_ratio/{side}_mean")) for side in ("low", "high")]
    yield "Clipped ratios", "share of tokens, below and above the clip range", "%", clipped
    name = "sampling/importance_sampling_ratio"
    sampled = _Series("ratio", _trl(f"{name}/mean"), low=_trl(f"{name}/min"), high=_trl(f"{name}/max"))
    yield "Trainer to sampler", f"probability ratio: mean{', lowest to highest' * alone}", "", [sampled]
    parts = [_Series(part, _at("mismatch", key)) for part, key in _PARTS.items()]
    yield "Difference from vLLM", "nats a token: all, by the head's rounding, by the rest", "", parts


def _tokens() -> Iterator[_Quantity]:
    yield (
        "Tokens a second",
        "real ones, over whole rollouts",
        "",
        [_Series("tokens/s", _at("tokens", "per_second"))],
    )
    phases = {"generation": "generation", "scoring": "scoring", "training": TRAINING}
    rates = [_Series(name, _at("speed", phase, "per_second")) for name, phase in phases.items()]
    yield "Tokens a second by phase", "sampled; scored; trained on", "", rates
    phases["whole step"] = WHOLE
    shares = [_Series(name, _at("speed", phase, "share")) for name, phase in phases.items()]
    yield "Share of the matrix rate", "of this device, as measured at the start", "%", shares
    kinds = [_Series(kind, _at("tokens", kind)) for kind in ("computed", "real")]
    yield "Tokens a step", "of all rows; computed with a gradient", "", kinds
    share = _Series("left out", _at("tokens", "left_out_share"))
    yield "Left out", "share of completions without a gradient", "%", [share]


def _drawn(runs: dict[str, Records], quantities: Iterable[_Quantity]) -> Iterator[Lines]:
    """One run: a chart per quantity. Several: a chart for each of its lines."""
    for title, note, unit, series in quantities:
        if len(runs) == 1:
            (records,) = runs.values()
            lines = [line for i, one in enumerate(series) if (line := one.line(one.name, i, records))]
            if lines:
                yield Lines(title, note, lines, unit, named=len(lines) > 1)
            continue
        for one in series:
            lines = [line for i, (name, run) in enumerate(runs.items()) if (line := one.line(name, i, run))]
            if lines:
                alone = len(series) == 1 or one.name == title.lower()
                yield Lines(title if alone else f"{title}: {one.name}", note, lines, unit, named=False)


def _ratios(records: Records) -> Iterator[Bars]:
    """Histograms of the first and the last logged step."""
    notes = {"sampler": "trainer to vLLM, before it is cut", "policy": "new to old, before the loss clips it"}
    for kind, note in notes.items():
        found = [
            (record["step"], record["ratios"][kind]) for record in records if kind in record.get("ratios", {})
        ]
        ends = dict(found[:1] + found[-1:])
        if ends:
            shares = {f"step {step}": values for step, values in ends.items()}
            yield Bars(f"Ratios, {kind}", f"{note}; share of tokens", labels(), shares)


def smooth(values: Sequence[float], at: Sequence[int] | None = None) -> list[float]:
    """Centred means over about a tenth of the points, at these places; None: at every one."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in (range(len(values)) if at is None else at))
    return [sum(window) / len(window) for window in windows]


def shown(count: int) -> list[int]:
    """The places of so many points at which a smoothed curve is drawn: all, or as many as a picture can tell apart."""
    return (
        sorted({i * (count - 1) // (_MOST - 1) for i in range(_MOST)})
        if count > _MOST
        else list(range(count))
    )


def _times(runs: dict[str, Records]) -> list[Areas]:
    stacks = {name: _stack(records) for name, records in runs.items()}
    totals = [[sum(values) for values in zip(*seconds.values())] for _, seconds in stacks.values()]
    top = 1.05 * max((value for total in totals for value in smooth(total, shown(len(total)))), default=0.0)
    return [
        Areas(
            "Time by phase" if len(runs) == 1 else f"Time by phase: {name}",
            "seconds a step",
            steps,
            seconds,
            top,
        )
        for name, (steps, seconds) in stacks.items()
        if steps
    ]


def _stack(records: Records) -> tuple[list[int], dict[str, list[float]]]:
    """Steps and seconds per step by phase; a phase that takes hardly any time counts as other."""
    timed = [record for record in records if record.get("time")]
    seconds = {phase: [record["time"].get(phase, 0.0) for record in timed] for phase in PHASES}
    total = sum(map(sum, seconds.values()))
    thin = [phase for phase, values in seconds.items() if phase != "other" and sum(values) < _THIN * total]
    for phase in thin:
        seconds["other"] = [a + b for a, b in zip(seconds["other"], seconds.pop(phase))]
    kept = {phase: values for phase, values in seconds.items() if any(values)}
    return [record["step"] for record in timed], kept


def _memory(runs: dict[str, Records], plan: dict[str, Any] | None) -> Iterator[Peaks]:
    """A chart for each kind of figure: a CPU meter's figures cannot be compared with a GPU's."""
    summaries = [summarize(records) for records in runs.values()]
    for figure in dict.fromkeys(HEADLINE.values()):
        of = [s["memory"] if s["memory_figure"] == figure else {} for s in summaries]
        phases = [p for p in PHASES if any(figure in memory.get(p, {}) for memory in of)]
        if not phases:
            continue
        measured = [[memory.get(p, {}).get(figure) for p in phases] for memory in of]
        sizes = ((plan or {}).get("phases") or {}) if len(runs) == 1 else {}
        planned = [None if (size := sizes.get(PLANNED.get(p, ""))) is None else size / 2**20 for p in phases]
        note = MEANING[figure] + (", and the plan (◆)" if any(planned) else "")
        yield Peaks("Memory by phase", note, phases, measured, planned)
