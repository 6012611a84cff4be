"""Fixtures that several tests of the recipes share."""

import sys

import pytest


@pytest.fixture
def memhead_in_trl():
    """memhead in TRL's slot for one test: stock TRL 1.15 does not train on CPU."""
    from memhead.integrations import trl as memhead_trl

    with memhead_trl.install() as handle:
        yield handle


@pytest.fixture
def without_unsloth(monkeypatch):
    """Reads configs as a machine without Unsloth does: importing it would replace TRL for the rest of the suite."""
    monkeypatch.setitem(sys.modules, "unsloth", None)
