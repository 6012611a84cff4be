"""The command line's `--plan`."""

from __future__ import annotations

import sys
from dataclasses import replace

from rich.console import Console

from recipes.config.load import EXIT_STATUS, RunConfig
from recipes.models.prompts import check_problems
from recipes.plan.plan import parse_device, plan
from recipes.plan.processes import by_way
from recipes.problems import ConfigError


def show(config: RunConfig, device: str | None) -> int:
    """Prints the plan, for a device of that size if one is named; the exit status is 2 for a mistake, else 0.

    Data and tokenizer that lie on this machine are looked at as a run looks at them.
    """
    try:
        found = plan(config, None if device is None else parse_device(device))
        unseen = check_problems(config, config.make_task(), network=False)
        replace(found, notes=[*found.notes, *unseen]).print()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    if config.processes > 1:
        Console().print(by_way(found, config.processes).terminal())
    return 0
