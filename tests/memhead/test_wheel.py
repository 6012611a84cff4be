"""What `pip install .` gives: the library, whose README's lines need torch alone, and the recipes for scripts."""

import email
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import memhead

ROOT = Path(__file__).parents[2]
PACKED = ("pyproject.toml", "LICENSE", "memhead", "recipes", "train_grpo.py")  # the last must be left out

CHECK = """
import sys

for name in {others}:
    sys.modules[name] = None  # importing it fails

import torch, memhead
assert memhead.__file__.startswith({site!r}), memhead.__file__
torch.manual_seed(0)
lm_head = torch.nn.Linear(8, 50, bias=False)
hidden, targets = torch.randn(20, 8), torch.randint(50, (20,))
{lines}
full, ours = {full}, logprobs
torch.testing.assert_close(ours, full)
assert ours.shape == (20,) and bool((ours < 0).all())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel, unpacked."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKED:
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    ]
    subprocess.run([*command, "--wheel-dir", folder, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_library_and_the_recipes(site):
    assert {place.name for place in site.iterdir() if place.suffix != ".dist-info"} == {"memhead", "recipes"}
    for package in ("memhead", "recipes"):
        files = {file for file in (ROOT / package).rglob("*") if file.is_file() and file.suffix != ".pyc"}
        held = {str(file.relative_to(site)) for file in (site / package).rglob("*")}
        assert held >= {str(file.relative_to(ROOT)) for file in files} - {"memhead/README.md"}


def test_a_script_elsewhere_takes_its_trainer_from_the_wheel(site, tmp_path):
    code = (
        "import memhead, recipes.packed_trainer as found\n"
        "print(memhead.__file__, found.__file__, found.PackedGRPOTrainer.__mro__[1].__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *places, base = done.stdout.split()
    assert all(place.startswith(str(site)) for place in places)
    assert base == "GRPOTrainer"


def test_the_metadata_leads_to_the_repository(site):
    (metadata,) = site.glob("*.dist-info/METADATA")
    message = email.message_from_string(metadata.read_text(encoding="utf-8"))
    assert message["Version"] == memhead.__version__
    urls = dict(url.split(", ") for url in message.get_all("Project-URL"))
    assert set(urls) == {"Repository", "Documentation", "Changelog"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert message["Description-Content-Type"] == "text/markdown"
    page = message.get_payload()
    assert page.startswith("# memhead")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) >= 4
    assert all(link.startswith("https://") for link in links)  # an index shows the page, not the repository


def test_the_readme_lines_work_from_the_wheel(site, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    have, write = block.split("# write this")
    lines = f"{have}\nfull_logits = logprobs\n# {write}"
    others = ["recipes", "trl", "transformers", "peft", "datasets", "accelerate", "pydantic", "yaml"]
    code = CHECK.format(site=str(site), lines=lines, full="full_logits", others=others)
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
