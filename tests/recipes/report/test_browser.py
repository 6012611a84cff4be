"""The report and the comparison in a real browser: as wide as a desktop and a phone, light and dark."""

import html
import json
import re
import shutil
import subprocess

import pytest
from made_up import run_folder
from PIL import Image, ImageStat

from recipes.report.compare import compare
from recipes.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"desktop": 1280, "phone": 390}
MODES = {"dark": 0, "light": 1}  # as Chromium's setting counts them

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: apt-get install chromium"
)

# Runs in a page around the report, which itself has no script.
MEASURE = """<script>addEventListener("load", () => {
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const boxes = (name) => [...inside.querySelectorAll(name)].map((element) => element.getBoundingClientRect());
  const figures = [...inside.querySelectorAll("figure")];
  document.body.textContent = "found" + JSON.stringify({
    width: root.clientWidth, scroll: root.scrollWidth,
    right: Math.max(...boxes("figure, article, .panel, .verdict, h1, h2, .facts").map((box) => box.right)),
    columns: new Set(boxes("figure").map((box) => Math.round(box.left))).size,
    beyond: figures.flatMap((figure) => [...figure.querySelectorAll("text")]
      .filter((text) => text.getBoundingClientRect().right > figure.getBoundingClientRect().right)
      .map((text) => text.textContent)),
    smallest: Math.min(...boxes("svg text").map((box) => box.height)),
    loaded: inside.defaultView.performance.getEntriesByType("resource").map((entry) => entry.name),
    folded: inside.querySelectorAll("article details:not([open])").length,
  }) + "end";
});</script>"""


def chromium(profile, mode, *arguments):
    call = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={MODES[mode]}", *arguments,
    ]  # fmt: skip
    return subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    one, two = run_folder(root, "a" * 40), run_folder(root, "other", gain=0.2)
    return {"report": write_report(one), "comparison": compare([one.path, two.path], root / "both")}


@pytest.mark.parametrize("page", ["report", "comparison"])
@pytest.mark.parametrize(("screen", "columns"), [("desktop", 3), ("phone", 1)])
def test_nothing_runs_off_the_screen(pages, tmp_path, page, screen, columns):
    width = WIDTHS[screen]
    around = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(pages[page].read_text())}">'
    (tmp_path / "around.html").write_text(f"<!doctype html><body>{around}</iframe>{MEASURE}")
    shown = chromium(
        tmp_path, "light", "--window-size=1400,900", "--dump-dom", f"file://{tmp_path}/around.html"
    )
    found = json.loads(html.unescape(re.search(r"found(\{.*\})end", shown, re.DOTALL)[1]))
    assert found["width"] <= width
    assert found["scroll"] == found["width"]
    assert found["right"] <= found["width"]
    assert found["columns"] == columns
    assert found["beyond"] == []
    assert found["smallest"] > 8
    assert found["loaded"] == []
    assert found["folded"] == (3 if page == "report" else 0)


@pytest.mark.parametrize("screen", WIDTHS)
def test_screenshots_are_light_and_dark(pages, tmp_path, screen):
    """Pale with dark ink in the one, dark with pale ink in the other."""
    means, spreads = {}, {}
    for mode in MODES:
        path, size = tmp_path / f"{screen}-{mode}.png", f"{WIDTHS[screen]},1600"
        place = f"file://{pages['report']}"
        chromium(tmp_path / mode, mode, f"--window-size={size}", f"--screenshot={path}", place)
        with Image.open(path) as picture:
            assert picture.size == (WIDTHS[screen], 1600)
            grey = picture.convert("L")
            means[mode], spreads[mode] = ImageStat.Stat(grey).mean[0], grey.getextrema()
            corner = picture.convert("RGB").getpixel((2, 2))
            assert corner == ((0xF7, 0xF7, 0xF5) if mode == "light" else (0x12, 0x15, 0x18))
    assert means["light"] > 220
    assert means["dark"] < 60
    for darkest, brightest in spreads.values():
        assert darkest < 60
        assert brightest > 200
