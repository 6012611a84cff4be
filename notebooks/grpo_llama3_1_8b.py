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
# The run of `configs/llama3.1_8b_gsm8k.yaml` (Unsloth, 4-bit, vLLM), cell by cell: what it will need, training, one
# question before and after, saving, and memhead beside full logits. Its twin `grpo_llama3_1_8b.py` is what to edit;
# `make notebook` brings the two in step.

# %% [markdown]
# Fetches the `repository` and what `requirements-cuda.lock` pins, where they are not here already. If an import further
# down then complains of a version, restart the session and begin again here.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

repository = "https://github.com/OWNER/memhead"  # @param {type:"string"}

here = [folder for folder in (Path(".."), Path("."), Path("memhead")) if (folder / "train_grpo.py").is_file()]
if not here:
    if "/OWNER/" in repository:
        raise SystemExit("repository: put in the address that this notebook comes from, in place of OWNER")
    subprocess.run(["git", "clone", "--depth=1", repository, "memhead"], check=True)
    here = [Path("memhead")]
os.chdir(here[0])
if importlib.util.find_spec("trl") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-qr", "requirements-cuda.lock"], check=True)
sys.path.insert(0, os.getcwd())

# %% [markdown]
# The settings that matter. Every other key is in the YAML file, and `docs/configuration.md` lists them all.

# %% tags=["parameters"]
model = "unsloth/meta-Llama-3.1-8B-Instruct"  # @param {type:"string"}
steps = 250  # @param {type:"integer"}
completion_length = 768  # @param {type:"integer"}
use_memhead = True  # @param {type:"boolean"}
compare_steps = 5  # @param {type:"integer"}
question = ""  # @param {type:"string"}
merge = False  # @param {type:"boolean"}
output = "runs"  # @param {type:"string"}
smoke = False  # @param {type:"boolean"}

# %% [markdown]
# An empty `question` asks the first held-out problem. A mounted Drive as `output` keeps the run. `smoke` shows that
# every cell runs, on a CPU with a Llama of one layer: it learns nothing in six steps, and the model, steps and length
# above are not used.

# %%
from recipes.notebook import configure, run_apart

path = "notebooks/smoke.yaml" if smoke else "configs/llama3.1_8b_gsm8k.yaml"
settings = {"run.output_root": output, "head.impl": "memhead" if use_memhead else "full"}
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
# ## Training
#
# `train_grpo.py` in a process of its own, so that the GPU is free again afterwards. Interrupting it ends the run after
# the step in hand.

# %%
import train_grpo

run = run_apart(train_grpo.main, path, settings)

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
# `final/` holds the adapter (the smoke model: all weights), and now a model card. `merge` writes merged 16-bit weights,
# proven against base and adapter, for which main memory must hold them nearly three times. After it, with llama.cpp's
# converter on the PATH, `python -m recipes.export RUN --gguf` writes a GGUF file.

# %%
from recipes import export

export.main([str(run.path), *(["--merge", "--base", model] if merge else [])])
for file in sorted(run.final.iterdir()):
    print(f"{file.stat().st_size / 2**20:10.2f} MiB  {file}")

# %% [markdown]
# ## memhead beside full logits
#
# First the head alone, at this model's size and up to 4,096 tokens: the same log-probabilities and gradients, in less
# memory.

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
# What they cost, laid over each other. The smoke model's vocabulary has 20 entries, so that its two runs hardly differ.

# %%
compare([each.path for each in pair], out=run.path / "side_by_side")
display(Image(filename=str(run.path / "side_by_side.png")))
