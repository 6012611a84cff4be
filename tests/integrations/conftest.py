import gc

import pytest
import torch
import transformers
from grpo_runs import configurations, save_model


@pytest.fixture(scope="session", autouse=True)
def _quick_runs():
    """A trainer collects garbage at its end: what was imported need not be looked through each time."""
    transformers.utils.logging.disable_progress_bar()
    gc.collect()
    gc.freeze()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two cost more than they gain on models of this size
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Paths of the tiny models by name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save_model(name, folder) for name in configurations()}
