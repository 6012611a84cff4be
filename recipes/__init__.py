"""What a run is made of: its configuration, model, task, tracking and report."""

import os

# TRL and transformers report their use to the hub. The switch is read when huggingface_hub is first imported, so it
# is set here, before any module of the recipes can import them.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
