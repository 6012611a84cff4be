"""What `step.ahead` asks a server for and when, call by call; whole runs: test_vllm_server.py."""

import os
from types import SimpleNamespace

import pytest
import ready

from recipes.training.ahead import Ahead, AheadClient
from recipes.training.generation_batches import Rows


class Client:
    """TRL's, of a server that answers with what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, **options):
        self.asked.append(list(prompts))
        return prompts


class Trainer:
    """What of TRL's trainer is around it: two micro-batches a rollout, groups of two."""

    num_generations = 2

    def __init__(self, *, iterations=1, max_steps=100, window=1):
        self.accelerator = SimpleNamespace(is_main_process=True)
        self.vllm_generation = SimpleNamespace(vllm_client=Client())
        self.args = SimpleNamespace(steps_per_generation=2, gradient_accumulation_steps=window)
        self.num_iterations = iterations
        self.model = SimpleNamespace(training=True)
        self.state = SimpleNamespace(global_step=0, max_steps=max_steps)

    def get_batch_samples(self, iterator, number, device):
        return list(iterator)

    def _generate_single_turn(self, prompts):
        return self.vllm_generation.vllm_client.generate(prompts=prompts)

    def _tokenize_prompts(self, prompts):
        return prompts, None


class Sampling(Ahead, Trainer):
    pass


def micro_batches(number):
    """Each with the prompts of its whole generation, as TRL's loader gives them; rollouts are a pair of them."""
    return [Rows([{"prompt": f"{i // 2}{half}"} for half in "aabb"]) for i in range(number)]


def asked_after(trainer, rows):
    """The requests so far, once a rollout has been sampled and what was begun has been sent."""
    trainer._generate_single_turn(rows)
    client = trainer.vllm_generation.vllm_client
    if client._begun is not None:
        client._begun[1].result()
    return client.asked


@pytest.mark.parametrize(("iterations", "following"), [(1, "1"), (2, "2")])
def test_the_next_rollout_is_that_after_all_updates_by_this_one(iterations, following):
    trainer, given = Sampling(iterations=iterations), micro_batches(8)
    source = iter(given)
    assert trainer.get_batch_samples(source, 1, None) == given[:1]
    assert asked_after(trainer, ["now"]) == [["now"], [f"{following}a", f"{following}b"]]
    taken = [trainer.get_batch_samples(source, 1, None) for _ in range(7)]
    assert taken == [[one] for one in given[1:]]
    assert trainer.get_batch_samples(source, 1, None) == []


def test_nothing_is_begun_by_an_evaluation_nor_before_the_last_step_nor_at_an_epochs_end():
    evaluating, last, short = Sampling(), Sampling(max_steps=2), Sampling()
    for trainer, number in ((evaluating, 8), (last, 8), (short, 2)):
        trainer.get_batch_samples(iter(micro_batches(number)), 1, None)
    evaluating.model.training = False
    assert [asked_after(trainer, ["now"]) for trainer in (evaluating, last, short)] == [[["now"]]] * 3
    evaluating.model.training = True
    assert asked_after(evaluating, ["now"])[2:] == [["1a", "1b"]]


@pytest.mark.parametrize(("iterations", "window", "updates"), [(1, 1, 2), (2, 1, 4), (1, 2, 1), (3, 2, 3)])
def test_the_last_rollout_is_the_one_whose_updates_are_the_last(iterations, window, updates):
    """Two micro-batches, each trained on as often as there are iterations, `window` to an update."""
    for more in (0, 1):
        trainer = Sampling(iterations=iterations, window=window, max_steps=updates + more)
        trainer.get_batch_samples(iter(micro_batches(8)), 1, None)
        assert len(asked_after(trainer, ["now"])) == 1 + more


def test_of_an_epoch_that_was_left_nothing_is_trained_on_in_the_next():
    trainer, given = Sampling(), micro_batches(6)
    trainer.get_batch_samples(iter(given), 1, None)
    again = iter(given)
    assert trainer.get_batch_samples(again, 2, None) == given[:2]


NEVER_ANSWERED = """
import threading
from types import SimpleNamespace
from recipes.training.ahead import AheadClient
AheadClient(SimpleNamespace(generate=lambda prompts: threading.Event().wait())).begin([])
"""


def test_a_request_that_is_never_answered_keeps_no_process_alive():
    process = ready.python("-c", NEVER_ANSWERED, env=dict(os.environ))
    try:
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()


def test_what_fails_in_the_background_is_raised_where_it_is_asked_for():
    client = AheadClient(SimpleNamespace(generate=lambda prompts: 1 / 0))
    client.begin(["a"])
    with pytest.raises(ZeroDivisionError):
        client.generate(["a"])
