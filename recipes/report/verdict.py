"""The outcome of a run in a sentence: whether it learned, by how much, and how certain that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes.tracking.summary import logged_steps, summarize

Records = list[dict[str, Any]]
Interval = tuple[float, float]
_Z_95 = statistics.NormalDist().inv_cdf(0.975)
_FEW = 5  # logged steps on each side; with fewer, their scatter says nothing


@dataclass(frozen=True)
class Verdict:
    """kind: "better", "worse", or "open" where the interval contains zero or there is none. note: how it is known."""

    kind: str
    sentence: str
    note: str = ""


def verdict(records: Records) -> Verdict:
    """By the accuracy on held-out problems where it was measured before and after, by the reward otherwise."""
    summary = summarize(records)
    if None in (summary["accuracy_before"], summary["accuracy_after"]):
        return _by_reward(records)
    return _by_accuracy(summary["before"], summary["after"])


def _by_accuracy(before: dict[str, Any], after: dict[str, Any]) -> Verdict:
    first, last = before["accuracy"], after["accuracy"]
    problems, earlier = after.get("accuracy_problems"), before.get("accuracy_problems")
    what = f"accuracy on {problems} held-out problems" if problems else "accuracy on held-out problems"
    same = earlier == problems  # a resumed run may have another run.evaluation.size
    if not same and earlier:
        what += f" ({earlier} before)"
    change = f"from {100 * first:.1f} % to {100 * last:.1f} %"
    first_limits, last_limits = before.get("accuracy_interval"), after.get("accuracy_interval")
    if first_limits is None or last_limits is None:
        return Verdict("open", f"{what[0].upper()}{what[1:]} went {change}; no interval was recorded.")
    interval = difference_of_shares(first, first_limits, last, last_limits)
    points, low, high = (_signed(100 * value, 1) for value in (last - first, *interval))
    note = "The interval is Newcombe's for independent samples."
    if same:
        note += " Both evaluations take the same problems, so that it is rather too wide than too narrow."
    kind = _kind(interval)
    if kind == "open":
        said = f"the 95 % interval of the change, {low} to {high}, contains zero."
        return Verdict(
            kind, f"Not shown to have learned: {what} went {change}, by {points} points; {said}", note
        )
    opening, verb = ("It learned", "rose") if kind == "better" else ("It got worse", "fell")
    said = f"{what} {verb} {change}, by {points[1:]} points (95 % interval {low} to {high})."
    return Verdict(kind, f"{opening}: {said}", note)


def _by_reward(records: Records) -> Verdict:
    """The mean reward of the first steps against that of the last, with the scatter of both."""
    rewards = [r["reward"] for r in logged_steps(records) if r.get("reward") is not None]
    missing = "Accuracy was not measured before and after."
    count = max(len(rewards) // 10, min(10, len(rewards) // 2))
    if count < _FEW:
        return Verdict("open", f"Too few steps to judge: {len(rewards)} with a reward. {missing}")
    first, last = rewards[:count], rewards[-count:]
    change = statistics.fmean(last) - statistics.fmean(first)
    half = welch_half_width(first, last)
    interval = (change - half, change + half)
    kind = _kind(interval)
    opening = {
        "better": "Reward rose",
        "worse": "Reward fell",
        "open": "Reward is not shown to have changed",
    }[kind]
    means = " to ".join(f"{statistics.fmean(side):.3f}".replace("-", "−") for side in (first, last))
    by, low, high = (_signed(value, 3) for value in (change, *interval))
    return Verdict(
        kind,
        f"{opening}: from {means}, by {by} (95 % interval {low} to {high}). {missing}",
        f"Means of the first and of the last {count} logged steps; the interval is Welch's, from the scatter of those "
        "steps.",
    )


def welch_half_width(one: Sequence[float], two: Sequence[float]) -> float:
    """Of the 95 % interval of the difference of the means of two samples, each of two values at least.

    By Student's t: of a handful of steps the scatter is itself uncertain, and a normal's quantile would find a change
    where there is none nearly twice as often as one time in twenty. B. L. Welch, The generalization of 'Student's'
    problem when several different population variances are involved, 1947.
    """
    squared = [statistics.variance(sample) / len(sample) for sample in (one, two)]
    error = sum(squared)
    if not error:
        return 0.0
    degrees = error**2 / sum(part**2 / (len(s) - 1) for part, s in zip(squared, (one, two), strict=True))
    return student_quantile(degrees) * math.sqrt(error)


def student_quantile(degrees: float) -> float:
    """The quantile 0.975 of Student's t, within 0.3 % from 4 degrees of freedom on.

    M. Abramowitz, I. Stegun, Handbook of Mathematical Functions, 1964, 26.7.5.
    """
    z = _Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def difference_of_shares(
    first: float, first_interval: Interval, last: float, last_interval: Interval
) -> Interval:
    """The interval of `last - first`, both shares of 0 to 1, from the Wilson interval of each.

    R. G. Newcombe, Interval estimation for the difference between independent proportions, 1998, method 10.
    """
    (first_low, first_high), (last_low, last_high) = first_interval, last_interval
    below = math.hypot(last - last_low, first_high - first)
    above = math.hypot(last_high - last, first - first_low)
    return last - first - below, last - first + above


def _kind(interval: Interval) -> str:
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "open"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def parting(name: str, records: Records, other_name: str, others: Records) -> str:
    """From which logged step the trajectories of two runs differ, as a sentence.

    What was sampled (rewards and lengths of the completions) and what was computed from it (loss, gradient, entropy)
    are distinguished: two heads whose last bits differ still sample the same for a while. A line is a mean over the
    steps since the one before, so lines are compared where they are of the same steps.
    """
    by_end = [{r["step"]: r for r in logged_steps(run)} for run in (records, others)]
    ends = sorted(by_end[0].keys() & by_end[1].keys())
    steps = [end for end in ends if len({run[end].get("steps", 1) for run in by_end}) == 1]
    one, two = by_end
    if not steps and ends:
        return f"{name} and {other_name} were logged over different steps (tracking.logging_every): nothing to compare."
    if not steps:
        return f"{name} and {other_name} have no logged step in common."
    sampled = next((s for s in steps if not _alike(_sampled(one[s]), _sampled(two[s]), 1e-6)), None)
    computed = next((s for s in steps if not _alike(_computed(one[s]), _computed(two[s]), 0.0)), None)
    common = "the one logged step" if len(steps) == 1 else f"all {len(steps)} logged steps"
    if sampled is None and computed is None:
        return f"{name} and {other_name} are equal to the last bit in {common} that both have."
    if sampled is None:
        return (
            f"{name} and {other_name} sampled with the same rewards and lengths in {common} that "
            f"both have; what was computed on them differs from step {computed} on."
        )
    said = f"{name} and {other_name} part at step {sampled}, the first whose completions differ in reward or length"
    if computed is not None and computed < sampled:
        return f"{said}; what was computed on equal completions differs from step {computed} on."
    return (
        f"{said}; every logged step before it is equal to the last bit."
        if sampled != steps[0]
        else f"{said}."
    )


def _sampled(record: dict[str, Any]) -> dict[str, Any]:
    found = _of(record, "reward", "completion_length", "clipped_share")
    return found | {f"rewards/{name}": value for name, value in (record.get("rewards") or {}).items()}


def _computed(record: dict[str, Any]) -> dict[str, Any]:
    return _of(record, "loss", "grad_norm", "entropy", "kl")


def _of(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: record[key] for key in keys if key in record}


def _alike(one: dict[str, Any], two: dict[str, Any], tolerance: float) -> bool:
    """Whether both have the same figures, within a relative tolerance; one that was not logged of both is ignored.

    None was logged as NaN.
    """
    pairs = [(one[key], two[key]) for key in one.keys() & two.keys()]
    return all(a is b or (None not in (a, b) and math.isclose(a, b, rel_tol=tolerance)) for a, b in pairs)
