"""Rewards as a user writes them, for the tests of the task that has none of its own."""

import asyncio
import os
import time

import torch

from recipes.rewards.final_answer import text_of
from recipes.training.rewards import PROBES

CALLS = []  # how many completions each call of `exact` was given


def exact(completions, answer, **columns):
    CALLS.append(len(completions))
    return [float(text_of(text).strip() == given) for text, given in zip(completions, answer, strict=True)]


async def exact_async(completions, answer, **columns):
    await asyncio.sleep(0)
    return exact(completions, answer)


def length(completions, **columns):
    return [min(1.0, len(text_of(text)) / 10) for text in completions]


def graded(completions, **columns):
    """Half a point for a b, a whole one for an a, none at all for an n."""
    return [{"a": 1.0, "b": 0.5, "n": None}.get(text_of(text)[:1], 0.0) for text in completions]


def nan(completions, **columns):
    return [float("nan") if text_of(text) == "nan" else 1.0 for text in completions]


def raises(completions, **columns):
    """On a batch that holds one, and on that one alone."""
    if any(text_of(text) == "raise" for text in completions):
        raise LookupError("nothing to look up")
    return [1.0] * len(completions)


def exact_or_raises(completions, answer, **columns):
    raises(completions)
    return exact(completions, answer)


def wanders(completions, **columns):
    """Sets for all of the process what is none of its business."""
    os.chdir("/")
    torch.set_grad_enabled(False)
    return raises(completions)


async def asks(completions, **columns):
    """As of another model, some of whose answers cannot be read."""
    await asyncio.sleep(0.2)
    return raises(completions)


def hangs(completions, **columns):
    if any(text_of(text) == "hang" for text in completions):
        time.sleep(60)
    return [1.0] * len(completions)


def slow(completions, **columns):
    """What a batch takes is more than a call may, what one takes is not."""
    time.sleep(0.02 * len(completions))
    return [1.0] * len(completions)


def reads(completions, prompts, level, **columns):
    """By the data's own columns, and by the prompt as the model gets it."""
    assert all(isinstance(prompt, type(text)) for prompt, text in zip(prompts, completions, strict=True))
    return [0.1 * one for one in level]


def sometimes(completions, **columns):
    """Fails on many of a model's own completions, and so on every batch, but on none of those that it is tried on."""
    if any(len(text_of(text)) % 2 and text_of(text) not in PROBES for text in completions):
        raise ValueError("not that one")
    return [len(text_of(text)) / 100 for text in completions]
