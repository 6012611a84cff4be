"""What a run that did not learn is told to change first."""

from recipes.report.advice import advice


def advice_of(records, **weights):
    return advice(records, weights)


def records(count=60, **figures):
    usual = {"reward": 0.5, "rewards": {"correct": 0.5}, "clipped_share": 0.0, "zero_std_share": 0.2}
    lines = [{"step": step, **usual, **figures} for step in range(1, count + 1)]
    lines[0]["rewards"] = {"correct": lines[0]["rewards"]["correct"] + figures.get("varies", 0.01)}
    return [{"step": 0, "accuracy": 0.1}, *lines]


def test_each_cause_is_named_and_the_likeliest_first():
    (cut,) = advice_of(records(clipped_share=0.7))
    assert cut.startswith("70 % of the completions were cut off")
    (most,) = advice_of(records(clipped_share=0.97))
    assert most.startswith("97 % of the completions were cut off")
    (never,) = advice_of(records(clipped_share=1.0))
    assert "end token" in never
    (equal,) = advice_of(records(zero_std_share=0.9))
    assert equal.startswith("In 90 % of the groups all completions earned the same (mean reward 0.5)")
    (nearly,) = advice_of(records(zero_std_share=0.998))
    assert nearly.startswith("In 99.8 % of the groups")  # and not in all of them
    assert [len(advice_of(records(**{share: 0.5}))) for share in ("clipped_share", "zero_std_share")] == [
        1,
        1,
    ]
    assert "grpo.learning_rate" in advice_of(records(clipped_share=0.49, zero_std_share=0.49))[0]
    (half,) = advice_of(records(clipped_share=0.5))
    assert half.startswith("50 % of the completions were cut off")
    first, second, third = advice_of(
        records(clipped_share=1.0, rewards={"correct": 0.0}, varies=0.0, zero_std_share=1.0, reward=0.0)
    )
    assert "ended by itself" in first
    assert second.startswith("Reward correct gave 0 throughout")
    assert third.startswith("In 100 % of the groups")


def test_a_sound_run_is_told_of_steps_or_of_the_rate():
    (short,) = advice_of(records(10))
    assert short.startswith("10 steps are few")
    (long,) = advice_of(records(60))
    assert "grpo.learning_rate" in long
    (long,) = advice_of([line | {"step": 5 * line["step"]} for line in records(10)])  # every fifth was logged
    assert "grpo.learning_rate" in long
    assert advice_of([])  # nothing was logged


def test_flat_rewards_are_one_sentence_and_those_only_logged_none():
    flat = {"form": 0.0, "tags": 0.0, "logged": 0.0, "missing": None, "alive": 0.5}
    lines = [{"step": step, "reward": 0.5, "rewards": flat, "zero_std_share": 0.2} for step in range(60)]
    both, nothing = advice_of(lines, form=1.0, logged=0)[:2]
    assert both.startswith("Rewards form, tags gave 0 throughout, so nothing was learned from them.")
    assert nothing.startswith("Reward missing gave nothing throughout, so nothing was learned from it.")
    assert not any("logged" in line for line in (both, nothing))


def test_a_mean_that_stayed_the_same_is_no_constant_reward_where_groups_differed():
    """In one step they did not: of all the others something could be learned."""
    lines = [
        {"step": step, "reward": 0.5, "rewards": {"correct": 0.5}, "zero_std_share": 0.2}
        for step in range(60)
    ]
    assert not any("throughout" in line for line in advice_of([*lines, lines[0] | {"zero_std_share": 1.0}]))
    equal = [line | {"zero_std_share": 1.0} for line in lines]
    assert advice_of(equal)[0].startswith("Reward correct gave 0.5 throughout")


def test_a_share_is_of_the_steps_that_have_it():
    lines = records(clipped_share=0.7)
    for line in lines[1::2]:
        line["clipped_share"] = None
    assert advice_of(lines)[0].startswith("70 % of the completions were cut off")
