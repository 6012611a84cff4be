"""What a run is made of: its configuration, model, task, tracking and report."""

import logging
import os

# TRL and transformers report their use to the hub, Unsloth counts loads there. The switches are read when the
# packages are first imported, so they are set here, before any module of the recipes can import them.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
# Without a GPU it logs at every start that it would like a kernel from the hub, which hides our one-line errors.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# It lists the settings that differ from a checkpoint's, which a run has said by their own names by then.
logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
