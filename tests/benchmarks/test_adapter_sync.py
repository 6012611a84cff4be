"""The script for a real vLLM, on a CPU with a stand-in of it."""

import json
import sys
from pathlib import Path

from benchmarks import adapter_sync_gpu

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from vllm_colocated import vllm_stand_in


def test_a_few_syncs(tmp_path):
    with vllm_stand_in():
        adapter_sync_gpu.main(["--shape", "tiny", "--syncs", "3", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "adapter_sync.json").read_text())
    assert found["trainer_base_unchanged"] is True
    assert found["vllm_base_unchanged"] is True
    assert found["merge_cycle_changes_the_base_by"] > 0.0  # what is not done
    assert found["difference"]["max"] < 0.1
    assert found["difference"]["mean_without"] > 10 * found["difference"]["mean"]  # the adapter was used
    assert found["adapter_parameters"] > 0
