"""The tests themselves are tried on fixed mistakes (sample.py), in a copy of the tree; docs/testing.md."""

import subprocess
import sys
from pathlib import Path

import pytest
from sample import MUTANTS
from tree import copy_tree
from warm import ask

CAUGHT = 1  # pytest's exit status where a test has failed; others say that none ran


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """A function: pytest's exit status for some tests, with a file of the copy as given."""
    place = tmp_path_factory.mktemp("mutants")
    tree, socket = place / "tree", str(place / "socket")
    tree.mkdir()
    copy_tree(tree)
    server = subprocess.Popen(
        [sys.executable, str(tree / "tests/mutants/warm.py"), "serve", socket], cwd=tree
    )

    def run(tests, file="", text=""):
        if not file:
            return ask(socket, 300, tests)
        whole = (tree / file).read_text(encoding="utf-8")
        (tree / file).write_text(text, encoding="utf-8")
        try:
            return ask(socket, 120, tests)
        finally:
            (tree / file).write_text(whole, encoding="utf-8")

    run.tree = tree
    yield run
    server.kill()
    server.wait()


def test_there_are_twenty_four():
    assert len(MUTANTS) == len({(mutant.file, mutant.new) for mutant in MUTANTS}) == 24


def test_without_a_mistake_the_same_tests_pass(tried):
    status, output = tried(list(dict.fromkeys(mutant.test for mutant in MUTANTS)))
    assert status == 0, output


@pytest.mark.parametrize(
    "mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.file).stem}: {mutant.new.strip()[:40]}"
)
def test_a_mistake_is_caught(tried, mutant):
    source = (tried.tree / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.file} has changed: move the mistake along"
    status, output = tried([mutant.test], mutant.file, source.replace(mutant.old, mutant.new))
    assert status == CAUGHT, output
