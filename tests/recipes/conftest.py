"""What several tests of the recipes share."""

import pytest


@pytest.fixture
def memhead_in_trl():
    """memhead in TRL's slot for one test: stock TRL 1.15 does not train on CPU."""
    from memhead.integrations import trl as memhead_trl

    with memhead_trl.install() as handle:
        yield handle
