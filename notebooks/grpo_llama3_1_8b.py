# ---
# jupyter:
#   accelerator: GPU
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Llama-3.1-8B learns GSM8K by GRPO, with memhead
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/memhead/blob/main/notebooks/grpo_llama3_1_8b.ipynb)
#
# The run of `configs/llama3.1_8b_gsm8k.yaml` (Unsloth, 4-bit, vLLM), cell by cell: what it will need, rewards,
# training, one question before and after, saving and serving, and memhead beside full logits. **Planned** for a card
# of 16 GB (T4) and more, 9.1 GiB at the peak; **not run on one yet**, nor in Colab. Every cell is run on a CPU with
# `smoke`, at toy size; on an H200 all of them ran in one go, two steps with random weights of a 1B model's shape, and
# all but the end of the last comparison with this model's (`benchmarks/results/flagship_h100.md`). Its twin
# `grpo_llama3_1_8b.py` is what to edit; `make notebook` brings the two in step. When something looks wrong:
# `docs/troubleshooting.md`.

# %% [markdown]
# What the long steps take with the settings below. **Planned** is what `--plan` says of completions that are all of the
# full length, an upper bound. Nothing here was measured on these cards; on a busy H200 a question before and after took
# 45 s, saving with `merge` 96 s, the head alone beside full logits 7 s.
#
# | step | T4, minutes | H100, minutes | GPU, GiB | disk, GB | main memory, GB |
# |---|---|---|---|---|---|
# | install | not measured | not measured | – | several, not measured | – |
# | training, 250 steps | planned 530 | planned 62 | planned 9.1 | planned 8.6 | planned 1.5 beside Python |
# | a question before and after | not measured | not measured | planned 5.3 | – | – |
# | saving, with `merge` | not measured | not measured | not planned | 16 by size | 48 by size |
# | beside full logits, 2 × 5 steps | planned 2 × 7 | planned 2 × 3 | planned 11.4 | planned 0.7 more | as training |
#
# The stored output of Unsloth's notebook, whose settings these are, took 230 minutes on a T4. Of the disk, 5.7 GB are
# the model's; the rest is adapters and checkpoints.

# %% [markdown]
# The settings that matter. Every other key is in the YAML file, and `docs/configuration.md` lists them all.

# %% tags=["parameters"]
repository = "https://github.com/OWNER/memhead"  # @param {type:"string"}
model = "unsloth/meta-Llama-3.1-8B-Instruct"  # @param {type:"string"}
steps = 250  # @param {type:"integer"}
completion_length = 768  # @param {type:"integer"}
use_memhead = True  # @param {type:"boolean"}
show_completions = 1  # @param {type:"integer"}
compare_steps = 5  # @param {type:"integer"}
question = ""  # @param {type:"string"}
merge = False  # @param {type:"boolean"}
drive = False  # @param {type:"boolean"}
output = "runs"  # @param {type:"string"}
smoke = False  # @param {type:"boolean"}

# %% [markdown]
# An empty `question` asks the first held-out problem. `drive` keeps the runs on your Google Drive, under `memhead/`:
# a session that was lost is gone on with by running the cells again. `show_completions` are printed at each logged
# step. `smoke` shows that every cell runs, on a CPU with a Llama of one layer: it learns nothing in six steps, and
# the model, steps and length above are not used.
#
# ## This machine
#
# The card, its driver and memory, before the long install: the lock's torch is built for CUDA 13, which older drivers
# do not run.

# %%
import os
import subprocess
import sys
from pathlib import Path

if drive:
    from google.colab import drive as google_drive

    google_drive.mount("/content/drive")
    output = "/content/drive/MyDrive/memhead"
here = [folder for folder in (Path(".."), Path("."), Path("memhead")) if (folder / "train_grpo.py").is_file()]
if not here:
    subprocess.run(["git", "clone", "--depth=1", repository, "memhead"], check=True)
    here = [Path("memhead")]
os.chdir(here[0])
sys.path.insert(0, os.getcwd())

from recipes.machine import cards, missing, room, too_old

found = cards()
print(*(found or ["no NVIDIA GPU"]), room(), sep="\n")
reasons = [reason for card in found if (reason := too_old(card.driver, "13.0"))]
if not smoke and (reasons or not found):
    advice = "choose another runtime, or smoke = True to see the cells run on a CPU"
    raise SystemExit(f"{reasons[0] if reasons else 'this run needs an NVIDIA GPU'}; {advice}")

# %% [markdown]
# What `requirements-cuda.lock` pins and this session lacks, whichever it is. The wheels are several GB, and the model
# about 6 GB more (not measured here); a Colab session starts with tens of GB free. If an import further down then
# complains of a version, restart the session and run the cells again from the top.

# %%
lacking = [] if smoke else missing("requirements-cuda.lock")
print("missing: " + ", ".join(lacking) if lacking else "nothing to install")
if lacking:
    subprocess.run([sys.executable, "-m", "pip", "install", "-qr", "requirements-cuda.lock"], check=True)

# %%
from recipes.notebook import configure, judged, run_apart

path = "notebooks/smoke.yaml" if smoke else "configs/llama3.1_8b_gsm8k.yaml"
settings = {"run.output_root": output, "head.impl": "memhead" if use_memhead else "full"}
settings["tracking.print_completions"] = show_completions
if not smoke:
    settings |= {"model.name": model, "model.max_seq_length": 256 + completion_length}
    settings |= {"grpo.max_steps": steps, "grpo.max_completion_length": completion_length}
config = configure(path, settings)

# %% [markdown]
# ## The plan
#
# Memory by part and by phase, from the sizes alone, and whether it fits the GPU that is here.

# %%
from recipes.plan.plan import GIB, plan

planned, full = plan(config), plan(configure(path, settings | {"head.impl": "full"}))
planned.print()
print(f"\npeak {planned.peak / GIB:.2f} GiB; with full logits {full.peak / GIB:.2f} GiB")

# %% [markdown]
# ## The rewards
#
# One problem as the model sees it, a right answer and a wrong one, and what every reward gives for each: if these are
# not what you meant, no training will mend it.

# %%
asked, answers = judged(config.make_task())
print(asked)
for name, answer, given in answers:
    print(
        f"\n── {name}: " + ", ".join(f"{reward} {value:g}" for reward, value in given.items()),
        answer,
        sep="\n",
    )

# %% [markdown]
# ## Training
#
# `train_grpo.py` in a process of its own, so that the GPU is free again afterwards. Interrupting it ends the run
# after the step in hand; running the cell again goes on from the last checkpoint, as after a session that was lost.
# How long it takes has not been measured; the stored output of Unsloth's notebook, whose settings these are, took 3.8
# hours on a T4.

# %%
import train_grpo

run = run_apart(train_grpo.main, path, settings, resume=True)

# %% [markdown]
# Reward, accuracy and memory over the steps. `report.html` beside the picture has the completions too.

# %%
from IPython.display import Image, display

display(Image(filename=str(run.path / "report.png")))

# %% [markdown]
# ## A question before and after
#
# Answered greedily by `final/`, without its adapter and with it.

# %%
from recipes.ask import ask

for name, text in ask(config, run, question).items():
    print(f"── {name}\n{text}\n")

# %% [markdown]
# ## Saving
#
# `final/` holds the adapter (the smoke model: all weights) and its model card. `merge` writes merged 16-bit weights
# by Unsloth's own saver, 16 GB on disk, for which this machine should have 48 GB of main memory (by size, not
# measured); a standard Colab session has less.

# %%
from recipes import export
from recipes.notebook import apart

apart(export.main, [str(run.path), *(["--merge", "--saver", "unsloth"] if merge and not smoke else [])])
for file in sorted(run.final.iterdir()):
    print(f"{file.stat().st_size / 2**20:10.2f} MiB  {file}")

# %% [markdown]
# Serving it elsewhere, by vLLM, Ollama or transformers: `docs/serving.md`.

# %% [markdown]
# ## memhead beside full logits
#
# First the head alone, at this model's size and up to 4,096 tokens: closer to the exact log-probabilities and
# gradients than logits rounded to half precision, in less memory.

# %%
from benchmarks.side_by_side import side_by_side

shape, tokens = planned.setting.shape, planned.setting.sequences * planned.setting.completion
size = (512, 512, 32000) if smoke else (min(tokens, 4096), shape.hidden, shape.vocab)
display(side_by_side(*size))

# %% [markdown]
# Then the same short run with each, from the same seed, with completions short enough for full logits too.

# %%
from recipes.report.compare import compare

short = settings | {"grpo.max_steps": compare_steps, "run.evaluation.size": 16}
if not smoke:
    short["grpo.max_completion_length"] = min(completion_length, 256)
pair = [
    run_apart(train_grpo.main, path, short | {"head.impl": impl, "run.name": f"short-{impl}"})
    for impl in ("memhead", "full")
]

# %% [markdown]
# What they cost, laid over each other. The smoke model's vocabulary has 20 entries, so that its two runs hardly
# differ.

# %%
compare([each.path for each in pair], out=run.path / "side_by_side")
display(Image(filename=str(run.path / "side_by_side.png")))
