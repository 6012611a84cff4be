"""What a real run says of figures that look wrong: each once, in a sentence."""

from test_memory import run

CONSTANT = "def nothing(completions, **columns):\n    return [0.5 for _ in completions]\n"


def test_a_run_whose_figures_look_wrong_says_what_they_mean(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(CONSTANT)
    monkeypatch.chdir(tmp_path)  # where the user's reward is looked for
    rewards = "task.rewards={own_rewards.nothing: 1.0}"
    short = ["grpo.max_completion_length=1", "grpo.entropy_coef=0.0", "grpo.learning_rate=1e-9"]
    assert run(tmp_path, rewards, *short, steps=6) == 0
    said = capsys.readouterr().out
    for sentence in (
        "Step 1: within each group all completions earned the same, so every advantage is 0",
        ": every completion was cut off at grpo.max_completion_length",  # some end at their first token
        "Step 1: a loss of 0 because every advantage is 0.",
        "Reward own_rewards.nothing gave every completion 0.5 up to step 5: it tells none from another",
    ):
        assert said.count(sentence) == 1, said
    assert said.count("within each group") == 1


SILENT = "def silent(completions, **columns):\n    return [None for _ in completions]\n"


def test_a_run_whose_reward_gives_none_alone_goes_to_its_end(tmp_path, capsys, monkeypatch):
    (tmp_path / "silent_rewards.py").write_text(SILENT)
    monkeypatch.chdir(tmp_path)
    rewards = "task.rewards={silent_rewards.silent: 1.0}"
    assert run(tmp_path, rewards, steps=6) == 0
    said = capsys.readouterr().out
    assert said.count("Reward silent_rewards.silent gave every completion None up to step 5") == 1
