"""Plans of these tests are of a few models again and again: what a cache's layers hold is looked up once for each."""

import pytest

from recipes.plan import shapes


@pytest.fixture(autouse=True, scope="session")
def probed_once():
    probe, found = shapes._cache_layers, {}

    def remembered(model):
        key = model.config.to_json_string()
        if key not in found:
            found[key] = probe(model)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_cache_layers", remembered)
        yield
