"""Output that nobody reads, or that a locale has no characters for, costs no run."""

import io
import logging
import os
import subprocess
import sys

from recipes.output import lasting_output


def test_a_pipe_that_is_closed_is_written_to_in_vain(monkeypatch):
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output():
        print("heard", end="", flush=True)
        assert sys.stdout.write("\n") == 1  # libraries count by it what is left to write
        sys.stdout.flush()
        assert os.read(read, 100) == b"heard\n"
        os.close(read)
        for _ in range(3):
            print("unheard", flush=True)
            os.write(write, b"whoever writes past it")
        assert sys.stdout.isatty() is False
    assert sys.stdout is stream
    stream.close()  # nothing is left in it that could fail now


def test_characters_that_a_locale_lacks_are_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with lasting_output():
        print("46 \u2192 63 %")
    assert raw.getvalue() == b"46 ? 63 %\n"


def test_a_signal_in_the_middle_of_a_line_is_no_error(monkeypatch):
    """Python runs the handler, which prints, within the write that it interrupts."""
    written = []

    class Interrupted(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            written.append(bytes(data))
            if len(written) == 1:
                print("stopping", flush=True)
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Interrupted())))
    with lasting_output():
        print("step 1", flush=True)
        print("step 2", flush=True)
    assert b"".join(written) == b"step 1\nstopping\nstep 2\n"


def test_the_first_file_is_not_taken_for_closed_output(tmp_path):
    script = (
        "import os\nfor number in range(3): os.close(number)\n"
        "from recipes.output import lasting_output\n"
        f"with lasting_output():\n    file = open({str(tmp_path / 'metrics')!r}, 'w'); os.write(1, b'x'); print('y')\n"
        "assert file.fileno() > 2"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    )
    assert (tmp_path / "metrics").read_text() == ""


def test_what_a_library_logs_and_a_traceback_control_no_terminal(caplog, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with lasting_output():
        logging.getLogger("transformers.x").warning("of type `%s`", "evil\x1b[31m\x9b2J")
    logging.getLogger("transformers.x").warning("after it: \x1b")
    assert [record.message for record in caplog.records] == ["of type `evil\\x9b2J`", "after it: \x1b"]
    try:
        raise ValueError("no\x1b[31m")
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert said.endswith("ValueError: no\\x1b[31m\n")


def test_a_librarys_log_whose_arguments_do_not_fit_costs_no_run(capsys):
    """logging itself says so on standard error, and goes on."""
    log = logging.getLogger("memhead.made_up")
    log.propagate = False
    handler = logging.StreamHandler(io.StringIO())
    log.addHandler(handler)
    with lasting_output():
        log.warning("%s of %s", 1)
    log.removeHandler(handler)
    assert "--- Logging error ---" in capsys.readouterr().err
