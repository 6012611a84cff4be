"""Mistakes that were once made on purpose and that every test let pass. Each must be caught by the test named.

A place that is no longer there, or there twice, is an error: move the mistake along with the code.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A mistake: `old` becomes `new`, once, in the file; the test that must fail."""

    file: str
    old: str
    new: str
    test: str


CORNERS, SUPPORT = "tests/memhead/test_corners.py", "tests/memhead/test_support.py"
KNOWN, SAFE = "tests/recipes/tracking/test_known_answers.py", "tests/recipes/training/test_safeguards.py"
START, KEYS = "tests/recipes/training/test_warm_start.py", "tests/recipes/training/test_every_key.py"
SPLITS = "tests/recipes/tasks/test_splits.py"
TRL = "tests/integrations/test_trl_lora_head.py"
PRECISION, SERVER = (
    "tests/recipes/training/test_run_precision.py",
    "tests/recipes/training/test_vllm_server.py",
)
PACKED, OWN = "tests/recipes/training/test_packed_trainer.py", "tests/recipes/tasks/test_own_prompts.py"

MUTANTS = (
    Mutant(
        "memhead/backends/torch.py",
        "factor * (stats[Stat.WEIGHTED] + (old - new) * stats[Stat.OTHERS])",
        "factor * stats[Stat.WEIGHTED]",
        f"{CORNERS}::test_sums_survive_a_reference_that_moves[a rise of 21.0]",
    ),
    Mutant(
        "memhead/statistics.py",
        "stats[Stat.TARGET] > stats[Stat.BEFORE]",
        "stats[Stat.TARGET] >= stats[Stat.BEFORE]",
        f"{CORNERS}::test_the_first_of_equals_is_the_most_likely_as_argmax_has_it[None]",
    ),
    Mutant(
        "memhead/sweep.py",
        "torch.mul(acc[: len(w)], scale, out=weight_grad[columns])",
        "weight_grad[columns].copy_(acc[: len(w)])",
        f"{CORNERS}::test_float16_operands_through_both_sweeps",
    ),
    Mutant(
        "memhead/support.py",
        "torch.tensor(min_p).log().item()",
        "torch.tensor(min_p).log().item() + 1e-6",
        f"{SUPPORT}::test_limits_of_every_truncation",
    ),
    Mutant(
        "memhead/integrations/trl_lora.py",
        '("grpo", "rloo", "dpo", "kto", "sft")',
        '("grpo", "rloo", "dpo", "sft")',
        f"{TRL}::test_in_every_trainer_that_has_such_a_head[kto]",
    ),
    Mutant(
        "memhead/integrations/handle.py",
        "if self.calls == self._calls_seen:",
        "if self.calls == 0:",
        f"{SAFE}::test_a_bypass_is_noticed_in_every_step_whatever_happened_before",
    ),
    Mutant(
        "recipes/training/trainer.py",
        "    arguments.reward_weights = session.rewards.weights\n",
        "",
        f"{SAFE}::test_the_trainer_gets_what_the_session_has[packed]",
    ),
    Mutant(
        "recipes/training/head_check.py",
        '"passed": all(',
        '"passed": any(',
        f"{SAFE}::test_one_wrong_figure_of_two_fails_the_check",
    ),
    Mutant(
        "recipes/training/head_check.py",
        "        raise RunError(",
        "        print(",
        f"{SAFE}::test_a_head_that_fails_its_check_ends_the_run_before_anything_is_trained",
    ),
    Mutant(
        "recipes/training/warm_start.py",
        '            group["lr"] = rate\n',
        '            group["lr"] = settings.learning_rate\n',
        f"{START}::test_the_rate_that_is_reported_is_the_one_that_is_taken",
    ),
    Mutant(
        "recipes/training/warm_start.py",
        " or step == settings.steps",
        "",
        f"{START}::test_the_accuracy_is_looked_at_now_and_then_and_at_the_end",
    ),
    Mutant(
        "recipes/tasks/gsm8k.py",
        "return [self._split[0][place] for place in sorted(self._drawn)]",
        "return [self._split[1][place % len(self._split[1])] for place in sorted(self._drawn)]",
        f"{SPLITS}::test_a_warm_start_is_shown_right_answers_to_train_problems_alone[gsm8k of a folder]",
    ),
    Mutant(
        "recipes/training/resume.py",
        "MAY_CHANGE = {",
        'MAY_CHANGE = {"model.revision",',
        f"{KEYS}::test_a_resumed_run_takes_another_value_or_names_the_key[model.revision=v2 (hub)]",
    ),
    Mutant(
        "recipes/models/load.py",
        '"revision": config.revision,',
        '"revision": None,',
        f"{KEYS}::test_a_key_changes_what_it_should_and_nothing_else[model.revision=v2 (hub)]",
    ),
    Mutant(
        "recipes/tracking/phases.py",
        "peaks[figure] = max(peaks.get(figure, 0.0), value)",
        "peaks[figure] = value",
        f"{KNOWN}::test_seconds_are_summed_peaks_are_maxima_and_other_is_the_rest",
    ),
    Mutant(
        "recipes/tracking/meters.py",
        "MIB = 2**20",
        "MIB = 10**6",
        f"{KNOWN}::test_the_meter_of_a_cpu_gives_mib",
    ),
    Mutant(
        "recipes/tracking/tracker.py",
        '"rewards": {name: values[i] for name, values',
        '"rewards": {name: values[0] for name, values',
        f"{KNOWN}::test_the_last_completions_are_those_of_the_batch_in_their_order",
    ),
    Mutant(
        "recipes/plan/formulas.py",
        '"paged_adamw_8bit": 2 * (1 + 4 / 256)',
        '"paged_adamw_8bit": 1 + 4 / 256',
        "tests/recipes/plan/test_by_hand.py::test_states_of_an_optimizer",
    ),
    Mutant(
        "recipes/export.py",
        "_relative(_logits(_reload(aside), tokens), wanted)",
        "_relative(_logits(merged, tokens), wanted)",
        "tests/recipes/test_export.py::test_a_copy_that_is_damaged_on_the_disk_is_refused_and_removed[scaled]",
    ),
    Mutant(
        "train_grpo.py",
        "                _save(trainer, folder.final)  # first: the evaluation may be cut off\n"
        "                saved = True\n"
        "                if not anywhere(interruption.asked):\n"
        "                    tracker.evaluated(trainer.state.global_step, evaluate())\n"
        "                    finished = True\n",
        "                if not anywhere(interruption.asked):\n"
        "                    tracker.evaluated(trainer.state.global_step, evaluate())\n"
        "                    finished = True\n"
        "                _save(trainer, folder.final)\n"
        "                saved = True\n",
        f"{SAFE}::test_the_model_is_saved_before_the_last_evaluation",
    ),
    Mutant(
        "recipes/training/trainer.py",
        "adapters.revision = model_to_load(config, session.folder).revision",
        "adapters.revision = None",
        f"{PRECISION}::test_an_adapter_is_put_on_the_revision_that_it_was_trained_on",
    ),
    Mutant(
        "recipes/training/vllm_server.py",
        "min(now - before, 3 * self.glance)",
        "now - before",
        f"{SERVER}::test_a_process_that_was_suspended_has_not_waited",
    ),
    Mutant(
        "recipes/packed_trainer.py",
        '"tools": trainer.tools,',
        '"tools": None,',
        f"{PACKED}::test_what_a_script_gives_its_trainer_is_looked_at[tools-value0-tools writes]",
    ),
    Mutant(
        "recipes/rewards/verdicts.py",
        "columns_of(rows[part])",
        "columns_of(rows)",
        f"{OWN}::test_a_completion_that_is_judged_alone_is_judged_by_its_own_row",
    ),
)
