"""What whole runs in a test do without."""

import pytest


@pytest.fixture(autouse=True)
def _nothing_is_drawn(monkeypatch):
    """Drawing is half of a tiny run's time. It has tests of its own, and the whole run of test_quickstart.py draws."""

    def write_report(folder):
        for name in ("report.html", "report.png"):
            (folder.path / name).touch()
        return folder.path / "report.html"

    monkeypatch.setattr("recipes.report.page.write_report", write_report)
