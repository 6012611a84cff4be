"""Fixtures that several tests of the recipes share."""

import signal
import sys

import pytest

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job, whose children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def memhead_in_trl():
    """memhead in TRL's slot for one test: stock TRL 1.15 does not train on CPU."""
    from memhead.integrations import trl as memhead_trl

    with memhead_trl.install() as handle:
        yield handle


@pytest.fixture(autouse=True)
def unsloth_stays_out():
    """Importing it replaces TRL for the rest of the process: a test that does so by the way is told at once."""
    yield
    assert sys.modules.get("unsloth") is None, (
        "the test imported unsloth; it needs without_unsloth, or a process"
    )


@pytest.fixture
def without_unsloth(monkeypatch):
    """Reads configs as a machine without Unsloth does: importing it would replace TRL for the rest of the suite."""
    monkeypatch.setitem(sys.modules, "unsloth", None)
