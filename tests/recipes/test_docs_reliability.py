"""Every proof that docs/reliability.md names is a test that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROOF = re.compile(r"`([\w./]+\.py)?(?:::(\w+))?`")


def proofs():
    """(file, test or "") of the last column; a name without a file belongs to the file before it."""
    found = []
    for line in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines():
        cells = line.split(" | ")
        if not line.startswith("| ") or len(cells) < 2:
            continue
        file = ""
        for named, test in PROOF.findall(cells[-1]):
            file = named or file
            if file:
                found.append((file, test))
    return found


def test_there_are_proofs():
    assert len(proofs()) >= 40


@pytest.mark.parametrize(("file", "test"), proofs())
def test_a_proof_is_there(file, test):
    source = (ROOT / "tests" / "recipes" / file).read_text(encoding="utf-8")
    assert not test or f"def {test}(" in source
