"""Pictures for the documents: a run's report and a comparison in a browser, and what the terminal showed.

    COLUMNS=110 script -qec "python train_grpo.py --config configs/quickstart.yaml" session.txt
    python train_grpo.py --config configs/quickstart.yaml run.name=quickstart-full head.impl=full
    python -m benchmarks.pictures runs/quickstart runs/quickstart-full --session session.txt --out docs/pictures

report-1280-light.png and its seven siblings (390 pixels wide, dark, comparison), and terminal.png. Needs Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from recipes.report.compare import compare
from recipes.report.page import write_report
from recipes.tracking.run_folder import RunFolder

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MODES = {"dark": 0, "light": 1}  # as Chromium's setting counts them
SIZES = {1280: 1500, 390: 1700}  # width -> height of a picture
COLUMNS = 110  # of the terminal
ROW = 16  # pixels


def shoot(browser: str, page: Path, picture: Path, width: int, height: int, mode: str = "light") -> None:
    """The page's top as a picture."""
    with tempfile.TemporaryDirectory() as profile:
        call = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={MODES[mode]}",
            f"--window-size={width},{height}", f"--screenshot={picture}", page.resolve().as_uri(),
        ]  # fmt: skip
        subprocess.run(call, capture_output=True, timeout=120, check=True)


def shown(session: str) -> Iterator[str]:
    """The lines of a terminal's record as they stood at the end, with their colours.

    A bar erases its line and writes it again; what was there before is left out. So are the recorder's own lines.
    """
    session = re.sub(r"^Script started[^\n]*\n|\n\s*Script done[^\n]*\n?", "", session.replace("\r\n", "\n"))
    for line in session.rstrip().split("\n"):
        last = re.split(r"\x1b\[2K", line)[-1].replace("\r", "")
        yield re.sub(r"\x1b\[(?:\?\d+[hl]|\d*[A-G])", "", last)  # colours stay, the cursor's moves go


def terminal_page(lines: list[str], page: Path) -> int:
    """The lines as a page that looks like a terminal; returns its height in pixels.

    Rows are as high as the font's box-drawing characters, so that tables have no gaps.
    """
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    for line in lines:
        console.print(Text.from_ansi(line))
    rows = console.export_text(clear=False).count("\n")
    body = (
        "<!doctype html><meta charset=utf-8><style>{stylesheet} body {{margin:0; padding:18px; background:#121518; "
        "color:#d8dadd}} pre {{font:14px/"
        f"{ROW}px 'DejaVu Sans Mono',monospace; margin:0}}}}</style><pre>{{code}}</pre>"
    )
    page.write_text(console.export_html(code_format=body, inline_styles=True), encoding="utf-8")
    return ROW * rows + 36


def main(argv: list[str] | None = None) -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--session", type=Path, required=True, help="the record of the run's terminal")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no Chromium on this machine: apt-get install chromium")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        comparison = compare([options.run, options.other], Path(folder) / "comparison")
        assert comparison is not None
        for name, page in (("report", write_report(RunFolder(options.run))), ("comparison", comparison)):
            for width, height in SIZES.items():
                for mode in MODES:
                    shoot(browser, page, options.out / f"{name}-{width}-{mode}.png", width, height, mode)
        page = Path(folder) / "terminal.html"
        lines = list(shown(options.session.read_bytes().decode()))  # a carriage return is no line's end here
        shoot(browser, page, options.out / "terminal.png", 980, terminal_page(lines, page))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
