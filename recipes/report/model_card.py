"""The model card of a run: what was trained on what, its figures, and how to repeat it.

`python -m recipes.export RUN` writes it as README.md beside the weights. What was not measured is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from recipes import escape
from recipes.config.source import read_file
from recipes.problems import ConfigError, Problem
from recipes.tracking.environment import environment_table
from recipes.tracking.run_folder import RunFolder
from recipes.tracking.summary import before_and_after, by_phase, summarize


def model_card(run: Path) -> str:
    """The card of the run in that folder, as Markdown with the hub's front matter.

    Raises ConfigError if a file that it reads is damaged.
    """
    folder = RunFolder(run)
    config = read_file(run / "config.yaml").data
    for section in ("model", "task", "run", "head"):
        if not isinstance(config.get(section), dict):
            remedy = "put that of the run there"
            raise ConfigError([Problem(section, "is missing", remedy=remedy)], file=str(run / "config.yaml"))
    text = (run / "config.yaml").read_text(encoding="utf-8")
    parts = [
        _front_matter(config),
        f"# {escape.markdown(folder.name)}",
        _opening(config),
        _figures(summarize(folder.metrics.read())),
        _head(folder),
        environment_table(folder.read_json("environment.json") or {}).markdown(),
        f"## Configuration\n\n```yaml\n{text}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(config: dict[str, Any]) -> str:
    """The hub's front matter, without paths of this machine: there they are neither a base model nor a dataset."""
    found: dict[str, Any] = {"library_name": "transformers", "tags": ["grpo", "trl", "memhead"]}
    for key, name in (
        ("base_model", config["model"].get("name")),
        ("datasets", config["task"].get("dataset")),
    ):
        if name and name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists():
            found[key] = [name] if key == "datasets" else name
    return f"---\n{yaml.safe_dump(found, sort_keys=False)}---"


def _opening(config: dict[str, Any]) -> str:
    model, adapters = config["model"], config.get("lora")
    what = escape.markdown(model.get("name") or "A small Llama made from nothing")
    how = f"adapters of rank {adapters['r']}" if adapters else "every weight"
    warm = " after a supervised start on right answers" if config["run"].get("warm_start") else ""
    return (
        f"{what}, trained by GRPO{warm} on the task `{config['task']['name']}` ({how}), with TRL's trainer; the "
        f"log-probabilities were computed by `head.impl: {config['head']['impl']}` (memhead)."
    )


def _figures(summary: dict[str, Any]) -> str:
    if not summary["steps"]:
        return ""
    evaluated = summary["after"] or summary["before"]
    problems = evaluated.get("accuracy_problems")
    said = f"{summary['steps']} optimizer steps"
    if problems:
        said += f"; greedy accuracy on {problems} problems that training never saw, with its 95 % interval"
    return f"{said}.\n\n{before_and_after(summary).markdown()}\n\n{by_phase(summary).markdown()}"


def _head(folder: RunFolder) -> str:
    """The evidence for the head: how often it was called, and its errors against float64 at the start of the run."""
    calls, check = folder.read_json("head.json"), folder.read_json("head_check.json")
    errors = (check or {}).get("memhead")  # without run.checks there is only what chose the step
    if not calls or not errors:
        return ""
    return (
        f"The head was called {calls['calls']} times. Against full logits in float64 at the start: largest error of a "
        f"log-probability {errors['logprob_error']:.1e}, error of the gradient {errors['gradient_error']:.1e}."
    )
