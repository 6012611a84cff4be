"""docs/api.md and the README's lines of code, run as they stand."""

import re

import pytest
import torch
from published import ROOT, blocks, text

from memhead.integrations import trl as memhead_trl


def test_every_block_of_the_api_page_runs_in_order():
    code = blocks(ROOT / "docs" / "api.md", "python")
    assert len(code) >= 12
    names = {}
    try:
        for number, block in enumerate(code):
            exec(compile(block, f"docs/api.md, block {number}", "exec"), names)
    finally:
        if (handle := memhead_trl.installed()) is not None:
            handle.uninstall()
    # The page's log-probabilities are those of full logits.
    mask, ids, model = names["mask"], names["input_ids"], names["model"]
    logits = model(input_ids=ids, attention_mask=names["attention_mask"]).logits[:, :-1] / 0.9
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    again = {}
    for block in code[:2]:
        exec(block, again)
    torch.testing.assert_close(again["found"].logprobs[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_the_ten_lines_of_the_readme_are_equal():
    (code,) = (block for block in blocks(ROOT / "README.md", "python") if "write this" in block)
    names = {"hidden": torch.randn(6, 16), "lm_head": torch.nn.Linear(16, 40), "targets": torch.arange(6)}
    before, after = code.split("# write this")
    exec(before, names)
    exec("#" + after, names)
    expected = names["hidden"] @ names["lm_head"].weight.T
    expected = expected.log_softmax(-1).gather(1, names["targets"][:, None]).squeeze(1)
    torch.testing.assert_close(names["logprobs"], expected)


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_users_own_names_are_not_hidden(page):
    """`from … import trl` would put memhead's module where the reader's trl is."""
    for line in re.findall(r"from memhead\.integrations import [^`;\n]+", text(ROOT / page)):
        assert " as memhead_" in line, line
