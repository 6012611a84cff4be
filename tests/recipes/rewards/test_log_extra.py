"""What a reward logs by TRL's log_extra: a value for each completion, kept in completions.jsonl beside it."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from recipes.rewards.contract import AsyncGuarded, Guarded, RewardError, check
from recipes.tracking.files import plain
from recipes.tracking.tracker import last_completions


def fragile(completions, log_extra, **_):
    log_extra("length", [len(text) for text in completions])
    return [1.0 / (len(text) - 3) for text in completions]


async def waiting(completions, log_extra, **_):
    return fragile(completions, log_extra)


def given(guarded, *batches):
    """What TRL is handed of each batch."""
    found = []
    for batch in batches:
        values = guarded(completions=batch, log_extra=lambda name, kept: found.append((name, kept)))
        if isinstance(guarded, AsyncGuarded):
            asyncio.run(values)
    return found


@pytest.mark.parametrize("kind", [Guarded, AsyncGuarded])
def test_a_call_that_is_repeated_logs_once(kind):
    """TRL keeps the last values: twice as many would stand beside completions of other batches."""
    guarded = kind("fragile", waiting if kind is AsyncGuarded else fragile, 1.0, 1.0)
    assert given(guarded, ["four", "one"], ["a", "four"]) == [("length", [4, 3]), ("length", [1, 4])]


def late(completions, log_extra, **_):
    """Logs nothing of a batch that fails."""
    values = [1.0 / (len(text) - 3) for text in completions]
    log_extra(3, completions)  # by any name
    return values


async def late_too(completions, log_extra, **_):
    return late(completions, log_extra)


@pytest.mark.parametrize("kind", [Guarded, AsyncGuarded])
def test_what_completions_log_alone_stands_at_their_places(kind):
    guarded, found = kind("late", late_too if kind is AsyncGuarded else late, 1.0, 1.0), []
    for batch, values in ((["one", "four", "to"], [None, 1.0, -1.0]), (["four"], [1.0])):
        given = guarded(completions=batch, log_extra=lambda name, kept: found.append((name, kept)))
        assert (asyncio.run(given) if kind is AsyncGuarded else given) == values
    assert found == [("3", [None, "four", "to"]), ("3", ["four"])]


def test_what_is_not_logged_again_is_none():
    def now_and_then(completions, log_extra, **_):
        if completions[0] == "yes":
            log_extra("seen", completions)
        return [0.0] * len(completions)

    guarded = Guarded("now_and_then", now_and_then, 1.0, 1.0)
    assert given(guarded, ["no", "b"], ["yes", "b"], ["no", "b"]) == [
        ("seen", ["yes", "b"]),
        ("seen", [None, None]),
    ]


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_values_is_told_before_training(count):
    def logs(completions, log_extra, **_):
        log_extra("mean", [1.0] * (count if len(completions) == 2 else 1))
        return [0.0] * len(completions)

    rows = [{"prompt": "p"}] * 2
    # Alone, a completion is given the one value that it takes: what is wrong is the batch.
    said = rf"log_extra\('mean', …\) takes 2 values, one for each completion, not {count};"
    with pytest.raises(RewardError, match=said):
        check({"logs": logs}, rows, ["a", "b"], 1.0)
    assert check({"fragile": fragile}, rows, ["a", "b"], 1.0) == {"fragile": [-0.5, -0.5]}


def test_it_stands_beside_its_completion():
    kept = {
        "prompt": ["p", "q"],
        "completion": ["a", "b"],
        "rewards": {"r": [0.0, 1.0]},
        "advantages": [-1.0, 1.0],
    }
    first, second = last_completions(SimpleNamespace(_logs={**kept, "extra": {"length": [4, 3], "cut": [1]}}))
    assert (first["extra"], second["extra"]) == ({"length": 4}, {"length": 3})
    assert "extra" not in last_completions(SimpleNamespace(_logs=kept))[0]
    assert plain({"of torch": torch.arange(2), "one": torch.tensor(0.5)}) == {"of torch": [0, 1], "one": 0.5}
