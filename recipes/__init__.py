"""What a run is made of: its configuration, model, task, tracking and report."""

import logging
import os

# TRL and transformers report their use to the hub. The switch is read when huggingface_hub is first imported, so it
# is set here, before any module of the recipes can import them.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Without a GPU it says at every start that it would like a kernel from the hub, between us and our one-line errors.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
