"""The command in a report and a card is one that a shell reads as the run's was read."""

import shlex

from recipes.tracking.environment import environment_table


def test_the_command_can_be_given_again():
    words = ["train_grpo.py", "--config", "my run.yaml", "task.rewards={correct: 1.0, my_rewards.short: 0.2}"]
    (shown,) = [row[1] for row in environment_table({"command": words}).rows if row[0] == "command"]
    assert shlex.split(shown) == words
