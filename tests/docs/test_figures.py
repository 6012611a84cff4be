"""The tables of benchmarks/results say what the JSON beside them holds, and their ratios are its ratios."""

import json
import re

import pytest
from published import ROOT, text

from benchmarks import gpu_tables, head, step_tables

RESULTS = ROOT / "benchmarks" / "results"
WAYS = {"packed": ("packed", "memhead"), "compiled": ("compiled", "memhead"), "TRL's": ("padded", "trl")}


def stored(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def sections(page):
    """(heading, text) of each part of a page, the part before its first second-level heading among them."""
    for part in re.split(r"^(?=## )", text(RESULTS / page), flags=re.MULTILINE):
        yield part.splitlines()[0], part


def tables(part):
    """Each table as a list of rows, {column: cell}, without the marks of bold type."""
    for lines in re.findall(r"(?:^\|.*\n?)+", part, re.MULTILINE):
        cells = [
            [cell.strip().replace("**", "") for cell in line.strip()[1:-1].split("|")]
            for line in lines.splitlines()
        ]
        if len(cells) > 2:
            yield [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.mark.parametrize(
    ("name", "markdown"),
    [("head_h100", gpu_tables.markdown), ("step_h100", step_tables.markdown), ("head_cpu", head.markdown)],
)
def test_a_page_that_a_benchmark_writes_is_what_it_writes(name, markdown):
    assert text(RESULTS / f"{name}.md") == markdown(stored(name))


def shares(row, rows):
    """Of TRL's loss pass, and of that with its scoring, in the same run; nothing where TRL's was not timed."""
    for other in rows:
        same = all(other.get(key) == row.get(key) for key in ("model", "shape"))
        if same and (other.get("way"), other.get("head")) == ("padded", "trl") and "seconds" in other:
            scored = (row["seconds"] + row.get("scoring", 0.0)) / (other["seconds"] + other["scoring"])
            return f"{row['seconds'] / other['seconds']:.2f}", f"{scored:.2f}"
    return None, None


def found(rows, **wanted):
    """The rows that were timed and have these values."""
    return [
        row
        for row in rows
        if "seconds" in row and all(row.get(key) == value for key, value in wanted.items())
    ]


def compare(cells, row, rows):
    """A line of a table against its row of the JSON, as far as the table has the column."""
    loss, scored = shares(row, rows)
    expected = {
        "seconds": f"{row['seconds']:.3f}",
        "scoring": f"{row.get('scoring', 0.0):.3f}",
        "of TRL's loss": loss,
        "with scoring": scored,
        "of TRL's with scoring": scored,
        "peak GiB": f"{row['peak_mib'] / 1024:.1f}",
        "tokens computed": f"{row['computed']:.0f}",
        "real tokens/s": f"{row['real_per_second']:.0f}",
        "of the matrix rate": f"{row['share']:.0%}" if "share" in row else None,
        "first, s": f"{row['first_seconds']:.0f}" if "first_seconds" in row else None,
    }
    for column, value in expected.items():
        shown = cells.get(column, "")
        if column in cells and value is not None and not (column == "first, s" and shown == ""):
            assert shown == value, (cells, column)
        elif value is None:
            assert shown in ("", "–"), (cells, column)


def test_the_packed_step_on_an_h100():
    count = 0
    for rows in tables(text(RESULTS / "packed_h100.md")):
        if "real tokens/s" not in rows[0]:
            continue
        kept = stored("packed_h100" if "bins of" in rows[0] else "packed_earlier_h100")["rows"]
        for cells in rows:
            way, _, computes = cells["way"].partition(", ")
            wanted = {"model": cells["model"], "shape": cells["shape"], "way": way, "head": computes}
            if "bins of" in cells:
                budget = cells["bins of"]
                wanted["budget"] = budget if budget == "slots" else int(budget)
            (row,) = (r for r in found(kept, **wanted) if f"{r['zeros']:.0%}" == cells["zero groups"])
            compare(cells, row, kept)
            count += 1
    assert count == 32


def kept_of(heading, part):
    """The rows of packed_h200.json that a section of its page shows: by the commit that it names."""
    results = stored("packed_h200")
    named = re.search(r"rows_of_commit_(\w+)", part)
    return results[named[0]] if named and not heading.startswith("# ") else results["rows"]


def test_the_packed_step_on_an_h200():
    count = 0
    for heading, part in sections("packed_h200.md"):
        for rows in tables(part):
            if "bins of" not in rows[0] or "way" not in rows[0]:
                continue
            kept = kept_of(heading, part)
            for cells in rows:
                if cells["way"] not in WAYS:  # Unsloth's, which packed_gpu does not run
                    continue
                way, computes = WAYS[cells["way"]]
                budget = cells["bins of"]
                wanted = {"model": cells["model"], "shape": cells["shape"], "way": way, "head": computes}
                wanted["budget"] = budget if budget == "slots" else int(budget)
                row = next(r for r in found(kept, **wanted) if f"{r['zeros']:.0%}" == cells["zero groups"])
                compare(cells, row, kept)
                count += 1
    assert count == 55


@pytest.mark.parametrize(
    ("name", "column", "theirs", "digits", "lines"),
    [
        ("architectures_of_commit_437dd39", "architecture", "padded", 5, 16),
        ("quantised_of_commit_437dd39", "base", "trl", 4, 6),
    ],
)
def test_gradients_in_bfloat16_on_a_card(name, column, theirs, digits, lines):
    """In order; in bold is the ratio of a packed step that is further from float32 than TRL's, and no other."""
    kept = stored("packed_h200")[name]
    page = text(RESULTS / "packed_h200.md")
    (shown,) = (rows for rows in tables(page) if {column, "packed of padded"} <= rows[0].keys())
    assert len(shown) == len(kept) == lines
    for cells, row in zip(shown, kept, strict=True):
        label = row["architecture"] if column == "architecture" else f"{row['bits']} bits"
        assert cells[column] == label
        assert cells.get("seed", "") == str(row.get("seed", ""))
        ratio = f"{row['packed'] / row[theirs]:.{2 if column == 'base' else 3}f}"
        figures = [f"{row[way]:.{digits}f}" for way in (theirs, "packed")]
        assert [cells["TRL's padded way"], cells["packed"], cells["packed of padded"]] == [*figures, ratio]
        if column == "base":
            assert cells["packed against TRL's"] == f"{row['packed_to_trl']:.4f}"
        (line,) = re.findall(
            rf"^\| {label} \|(?: {row.get('seed')} \|)? {figures[0]} .*$", page, re.MULTILINE
        )
        assert (f"**{ratio}**" in line) == (row["packed"] > row[theirs]), line


def test_the_bins_of_the_packed_trainer():
    kept = stored("packed_h200")["planned_bins_of_commit_437dd39"]
    (shown,) = (rows for rows in tables(text(RESULTS / "packed_h200.md")) if "bins" in rows[0])
    assert len(shown) == len(kept) == 4
    for cells, row in zip(shown, kept, strict=True):
        assert cells["model"] == row["model"]
        told, planned = row["told"], row["the run's plan"]
        assert cells["planned for a run of these sizes"] == ("" if told else f"{planned:,}")
        assert cells["bins"].startswith(f"{told or planned:,} tokens, ")
        assert row["packed_bins"].startswith(f"bins of {told or planned} tokens, ")
        assert cells["seconds of 7 of 8 micro-batches"] == f"{row['seconds of 7 of 8 micro-batches']:.3f}"
        assert cells["peak GiB in them"] == f"{row['peak_gib']:.1f}"


def test_the_packed_step_on_unsloths_model():
    """Its three tables, in the order of the JSON's rows."""
    results = stored("packed_h200")
    (part,) = (part for heading, part in sections("packed_h200.md") if "on Unsloth's model" in heading)
    exact, layers, beside = tables(part)
    for cells, row in zip(exact, results["against_float32_of_commit_437dd39"], strict=True):
        shown = [f"{row['mean_gap']:.4f}", f"{row['largest']:.3f}", f"{row['gradient']:.4f}"]
        assert list(cells.values())[1:] == shown
    for cells, row in zip(layers, results["row_through_unsloths_layers_of_commit_437dd39"], strict=True):
        ours, theirs = row["seconds"]["packed"], row["seconds"]["padded"]
        firsts = [f"{row['first'][way]:.0f}" for way in ("packed", "padded")]
        assert cells["model"].startswith(row["model"])
        assert list(cells.values())[1:3] == [row["shape"], str(row["groups_a_bin"])]
        assert list(cells.values())[3:] == [f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.2f}", *firsts]
    rows = results["unsloths_model_of_commit_1f9666e"]
    for cells, ours, own in zip(beside, rows[::2], rows[1::2], strict=True):
        assert (ours["step"], own["step"], ours["shape"]) == ("packed", "own", own["shape"])
        assert list(cells.values()) == [
            ours["shape"], f"{ours['seconds']:.3f}", f"{own['seconds']:.3f}", f"{own['scoring']:.3f}",
            f"{ours['seconds'] / own['seconds']:.2f}",
            f"{ours['seconds'] / (own['seconds'] + own['scoring']):.2f}",
            *(f"{row['peak_mib'] / 1024:.1f}" for row in (ours, own)),
            *(f"{row['first_seconds']:.0f}" for row in (ours, own)),
        ]  # fmt: skip
    assert (len(exact), len(layers), len(beside)) == (3, 6, 2)
    (row,) = results["unsloths_model_of_commit_6b49f40"]
    figures = f"{row['seconds']:.3f} s and {row['peak_mib'] / 1024:.1f} GiB at GSM8K's lengths"
    assert f"{figures}, {row['first_seconds']:.0f} s in the first window" in part


def test_real_tokens_a_second_on_an_h200():
    results, count = stored("packed_h200"), 0
    for heading, part in sections("packed_h200.md"):
        if not heading.startswith("## Real tokens a second"):
            continue
        (rows,) = tables(part)
        for cells in rows:
            of_it = {"model": cells["model"], "shape": cells["shape"]}
            eight_b, long = cells["model"] == "llama-8b", "2048" in cells["shape"] or "3072" in cells["shape"]
            commit = "99bb9ac" if eight_b else "19d151c"
            trls = ("rows_of_commit_b88e2ae" if long else "rows") if eight_b else f"rows_of_commit_{commit}"
            padded = found(results[trls], way="padded", zeros=0.0, **of_it)[0]
            ours = [
                next(
                    row
                    for row in found(results[f"rows_of_commit_{commit}"], way=way, zeros=0.0, **of_it)
                    if row["budget"] not in ("slots", 2048, 4096, 8192)
                    and not {"bits", "weights"} & row.keys()
                )
                for way in ("packed", "compiled")
            ]
            theirs = next(
                row
                for row in found(results[f"unsloths_step_of_commit_{commit}"], **of_it)
                if not row.get("zeros") and row.get("stack") != "unsloth4" and row.get("checkpointing", True)
            )
            assert padded["real"] == ours[0]["real"] == ours[1]["real"]
            rates = [
                row["real"] / row["seconds"] for row in (padded, {**theirs, "real": padded["real"]}, *ours)
            ]
            assert [cells[way] for way in ("TRL's", "Unsloth's", "packed", "compiled")] == [
                f"{rate:,.0f}" for rate in rates
            ]
            shares = ", ".join(f"{row['share']:.0%}" for row in (padded, *ours))
            assert cells["of the matrix rate: TRL's, packed, compiled"] == shares
            count += 1
    assert count == 8


WHOLE = {  # a table's name of a run -> the JSON's
    "4-bit, packed, full length": "four",
    "16-bit, packed, full length": "sixteen",
    "16-bit, packed, lengths by chance": "sixteen_packed",
    "16-bit, Unsloth's own, the same": "sixteen_own",
    "4-bit, packed, lengths by chance": "four_packed",
    "4-bit, Unsloth's own, the same": "four_own",
}


def packed_whole():
    """The tables of the packed step in Unsloth's configurations, and its runs by name."""
    heading = "## The packed step in Unsloth's configurations, whole"
    (part,) = (part for line, part in sections("flagship_h100.md") if line == heading)
    return list(tables(part)), {row["run"]: row for row in stored("flagship_h100")["runs"] if "run" in row}


def loss_and_all(row, step):
    """Seconds of a step's forward and backward, and of all its phases."""
    seconds = row["step_seconds"][step]
    return seconds["forward"] + seconds["backward"], sum(seconds.values())


def test_unsloths_configurations_with_the_packed_step_how_they_ended():
    (commands, *_), runs = packed_whole()
    shown, name = {}, ""
    for cells in commands:
        name = WHOLE[cells["run"]] if cells["run"] else name
        ended = {"well": 0, "its time was over": None}[cells["ended"].split(":")[0]]
        shown.setdefault(name, []).append((ended, cells["seconds"]))
    for name, row in runs.items():
        found = [(command["status"], f"{command['seconds']:.0f}") for command in row["commands"].values()]
        assert shown[name] == found, name
    assert shown.keys() == runs.keys() == set(WHOLE.values())


def test_unsloths_configurations_with_the_packed_step_at_full_length():
    (_, shown, *_), runs = packed_whole()
    for cells, (name, step) in zip(
        shown, [(n, i) for n in ("four", "sixteen") for i in range(3)], strict=True
    ):
        seconds = runs[name]["step_seconds"][step]
        phases = [seconds[phase] for phase in ("generation", "forward", "backward", "optimizer", "other")]
        figures = [f"{value:.2f}" for value in (*phases, *loss_and_all(runs[name], step))]
        assert list(cells.values())[1:] == [str(step + 1), *figures]
        assert runs[name]["figures_of_steps"][step]["lengths"] == [768.0] * 3


def test_unsloths_configurations_with_the_packed_step_beside_its_own():
    """Ratios stand where the two computed the same or nearly, and neither compiled."""
    (_, _, shown, *_), runs = packed_whole()
    steps = [(name, i) for name in ("sixteen", "four") for i in range(4)]
    for cells, (name, step) in zip(shown, steps, strict=True):
        pair = [runs[f"{name}_{which}"] for which in ("packed", "own")]
        packed, own = (row["figures_of_steps"][step] for row in pair)
        (loss, whole), (own_loss, own_whole) = (loss_and_all(row, step) for row in pair)
        alike = (name, step) in {("sixteen", 1), ("sixteen", 2), ("four", 2)}
        assert own["real"] == pytest.approx(packed["real"], rel=0.011) or not alike
        generation = ", ".join(f"{row['step_seconds'][step]['generation']:.2f}" for row in pair)
        assert list(cells.values()) == [
            {"sixteen": "16 bits", "four": "4 bits"}[name], str(step + 1),
            ", ".join(f"{row['lengths'][1]:.1f}" for row in (packed, own)),
            f"{packed['computed']:,.0f} of {packed['real']:,.0f}", generation,
            f"{loss:.2f}, {own_loss:.2f}", f"{loss / own_loss:.2f}" if alike else "–",
            f"{whole:.2f}, {own_whole:.2f}", f"{whole / own_whole:.2f}" if alike else "–",
        ]  # fmt: skip
        if (name, step) == ("sixteen", 2):  # told of elsewhere: nothing left out, nothing compiled
            told = f"{loss / own_loss:.2f}, and {whole / own_whole:.2f} of the whole step"
            assert told in (ROOT / "README.md").read_text()
            own_told = f"where Unsloth's own step took {own_loss:.1f}"
            told = f"took {loss:.1f} s {own_told}, the whole step {whole:.1f} and {own_whole:.1f}"
            assert told in (ROOT / "docs" / "loaders.md").read_text()


def test_unsloths_configurations_with_the_packed_step_memory_and_check():
    (_, _, _, memory, checks), runs = packed_whole()
    for cells in memory:
        for phase, (planned, measured) in runs[WHOLE[cells["run"]]]["memory_mib"].items():
            ratio = "–" if measured is None else f"{measured / 1024:.2f}: {measured / planned:.2f}"
            assert cells[phase] == f"{planned / 1024:.2f}, {ratio}", cells
    for cells in checks:
        check = runs[WHOLE[cells["run"].removesuffix(" (resumed)")]]["step_check"]
        ways = [check[way] for way in ("packed", "row_by_row", "allowed")]
        figures = [f"{way[error]:.4f}" for error in ("gradient_error", "logprob_error") for way in ways]
        assert list(cells.values())[1:] == figures
        assert check["passed"]
    assert (len(memory), len(checks)) == (6, 4)


BITS = {"16 bits": None, "4 bits": 4}


def agree(shown, seconds):
    """Milliseconds: some rows are stored with six digits, so that a half may have been rounded either way."""
    return all(
        cell == "–" if value is None else float(cell) == pytest.approx(value, abs=0.00051)
        for cell, value in zip(shown, seconds, strict=True)
    )


def beside_unsloth(commit, shape, bits):
    """Seconds of the packed and the compiled step of the 8B model, of Unsloth's loss pass and of its scoring."""
    results = stored("packed_h200")
    of_it = [
        row
        for row in found(results[f"rows_of_commit_{commit}"], model="llama-8b", shape=shape, zeros=0.0)
        if (4 if "weights" in row else row.get("bits")) == bits and row["budget"] != "slots"
    ]
    theirs = [
        row
        for row in found(results[f"unsloths_step_of_commit_{commit}"], model="llama-8b", shape=shape)
        if (4 if row.get("weights") or row.get("stack") == "unsloth4" else None) == bits
    ]
    return found(of_it, way="packed"), found(of_it, way="compiled"), theirs


def test_the_8b_model_beside_unsloths_step():
    count = 0
    for heading, part in sections("packed_h200.md"):
        for rows in tables(part):
            if not {"packed, s", "Unsloth's: loss, s"} <= rows[0].keys():
                continue
            (commit,) = set(re.findall(r"unsloths_step_of_commit_(\w+)", part))
            for cells in rows:
                bits = BITS[cells.get("weights", "4 bits")]
                packed, compiled, theirs = beside_unsloth(commit, cells["shape"], bits)
                seconds = [row[0]["seconds"] if row else None for row in (packed, compiled, theirs)]
                shown = [cells[name] for name in ("packed, s", "compiled, s", "Unsloth's: loss, s")]
                assert agree(shown, seconds), (heading, cells)
                peaks = [
                    f"{row[0]['peak_mib'] / 1024:.1f}" if row else "–" for row in (packed, compiled, theirs)
                ]
                assert cells["peak GiB: packed, compiled, Unsloth's"] == ", ".join(peaks), (heading, cells)
                if not theirs:
                    continue
                best, loss, scoring = (
                    (compiled or packed)[0]["seconds"],
                    theirs[0]["seconds"],
                    theirs[0]["scoring"],
                )
                assert cells["its scoring, s"] == f"{scoring:.3f}"
                ratio = cells.get("compiled of Unsloth's loss") or cells["compiled of it"]
                assert ratio.split(" ")[0] == f"{best / loss:.2f}", (heading, cells)
                assert cells["… with its scoring"] == f"{best / (loss + scoring):.2f}", (heading, cells)
                if "packed of Unsloth's loss" in cells:
                    assert cells["packed of Unsloth's loss"] == f"{packed[0]['seconds'] / loss:.2f}"
                count += 1
    assert count == 8


def of_the_last_commit(name):
    """A function that finds one row of the 8B model among `name` of the last commit on that page."""
    rows = stored("packed_h200")[f"{name}_of_commit_34a5f43"]

    def one(cells, *, live=None, **wanted):
        bits = cells.get("weights", "4 bits") == "4 bits"
        zero = "0%" if live else cells["zero groups"]
        (row,) = (
            row
            for row in found(rows, shape=cells["shape"], **wanted)
            if f"{row['zeros']:.0%}" == zero and ("bits" in row or "stack" in row) == bits
            if row.get("way") == "padded" or row.get("budget") != "slots"
        )
        return row

    return one


def test_groups_left_out_beside_unsloths_step():
    ours, unsloths = of_the_last_commit("rows"), of_the_last_commit("unsloths_step")
    (rows,) = (
        rows
        for rows in tables(text(RESULTS / "packed_h200.md"))
        if "peak GiB: compiled, Unsloth's" in rows[0]
    )
    for cells in rows:
        mine, theirs = ours(cells, way="compiled"), unsloths(cells)
        loss, scoring = theirs["seconds"], theirs["scoring"]
        shown = [cells[name] for name in ("compiled, s", "Unsloth's: loss, s", "its scoring, s")]
        assert agree(shown, [mine["seconds"], loss, scoring]), cells
        assert cells["compiled of it"] == f"{mine['seconds'] / loss:.2f}", cells
        assert cells["… with its scoring"] == f"{mine['seconds'] / (loss + scoring):.2f}", cells
        peaks = ", ".join(f"{row['peak_mib'] / 1024:.1f}" for row in (mine, theirs))
        assert cells["peak GiB: compiled, Unsloth's"] == peaks, cells
    assert len(rows) == 7


def test_the_packed_step_in_4_bits_beside_trls():
    one = of_the_last_commit("rows")
    (rows,) = (
        rows
        for rows in tables(text(RESULTS / "packed_h200.md"))
        if "peak GiB: packed, compiled, TRL's" in rows[0]
    )
    for cells in rows:
        packed, compiled = (one(cells, way=way) for way in ("packed", "compiled"))
        trl = one(cells, live=True, way="padded", head="trl")
        loss, scoring = trl["seconds"], trl["scoring"]
        shown = [cells[name] for name in ("packed, s", "compiled, s", "TRL's, s", "its scoring, s")]
        assert agree(shown, [packed["seconds"], compiled["seconds"], loss, scoring]), cells
        assert cells["packed of TRL's"] == f"{packed['seconds'] / loss:.2f}", cells
        assert cells["compiled of TRL's"] == f"{compiled['seconds'] / loss:.2f}", cells
        assert cells["… with its scoring"] == f"{compiled['seconds'] / (loss + scoring):.2f}", cells
        peaks = ", ".join(f"{row['peak_mib'] / 1024:.1f}" for row in (packed, compiled, trl))
        assert cells["peak GiB: packed, compiled, TRL's"] == peaks, cells
    assert len(rows) == 4


def test_the_1b_model_beside_trls_and_unsloths_step():
    results = stored("packed_h200")
    kept, unsloths = results["rows_of_commit_19d151c"], results["unsloths_step_of_commit_19d151c"]
    (rows,) = (
        rows for rows in tables(text(RESULTS / "packed_h200.md")) if "compiled of Unsloth's" in rows[0]
    )
    for cells in rows:
        mine = [
            row
            for row in found(kept, model="llama-1b", shape=cells["shape"])
            if row["budget"] == "slots" or row["budget"] > 8192
        ]
        (trl,) = found(mine, way="padded", head="trl")
        (packed,) = (row for row in found(mine, way="packed", zeros=0.0) if row["budget"] != "slots")
        (compiled,) = found(mine, way="compiled", zeros=0.0)
        (fewer,) = (row for row in found(mine, way="compiled") if row["zeros"])
        (theirs,) = found(unsloths, model="llama-1b", shape=cells["shape"], zeros=0.0, checkpointing=True)
        seconds = [row["seconds"] for row in (trl, packed, compiled, theirs)]
        assert agree([cells[name] for name in ("TRL's", "packed", "compiled", "Unsloth's")], seconds)
        assert cells["compiled of Unsloth's"] == f"{compiled['seconds'] / theirs['seconds']:.2f}"
        (left_out,) = (value for name, value in cells.items() if name.startswith("a third of the groups"))
        assert left_out == f"{fewer['seconds'] / trl['seconds']:.2f}"
        peaks = ", ".join(f"{row['peak_mib'] / 1024:.1f}" for row in (trl, packed, compiled, theirs))
        assert cells["peak GiB: TRL's, packed, compiled, Unsloth's"] == peaks


def of_one(row, rows):
    """A row's time as a share of the same step's on one GPU, in the same run."""
    plain = row["way"].split(": ")[1].removesuffix(", vocabulary split")
    alone = [other for other in rows if other.get("processes") == 1 and other["way"].endswith(plain)]
    alone = [other for other in alone if other["model"] == row["model"]]
    return f"{row['seconds'] / alone[0]['seconds']:.2f}" if alone else "–"


@pytest.mark.parametrize(
    ("heading", "key", "lines"),
    [
        ("# Two H100s of one host beside one", None, 17),
        (
            "## The 8B model on two cards beside one, all in one call",
            "8B on two H200 beside one, 2026-11-29, commit b88e2ae",
            11,
        ),
        (
            "## All of it in one call",
            "all of it in one call on two H200, 2026-11-29, commit a7cdacc",
            22,
        ),
    ],
)
def test_several_gpus_beside_one(heading, key, lines):
    results = stored("multi_gpu_h100")
    kept = found((results[key] if key else results)["rows"])
    part = dict(sections("multi_gpu_h100.md"))[heading]
    (rows,) = (rows for rows in tables(part) if "peak GiB by process" in rows[0])
    assert len(rows) == lines

    def called(row):
        way = row["way"].replace("one process: ", "").replace(" (trl)", "")
        return way.replace("ddp: ", "DDP: ").replace("fsdp2: ", "FSDP2: ")

    for cells in rows:
        (row,) = (r for r in found(kept, model=cells["model"]) if called(r) == cells["way"])
        assert cells["seconds"] == f"{row['seconds']:.3f}", cells
        assert cells["of one GPU's"] == of_one(row, kept), cells
        assert cells["peak GiB by process"] == ", ".join(f"{peak:.2f}" for peak in row["peak_gib"]), cells
        assert cells["loss"] == f"{row['loss']:.5f}", cells


def numbers(cell):
    return [
        float(number)
        for number in re.findall(r"\d+(?:\.\d+)?", cell.split(", 40 rows")[0].replace(",", " ,"))
    ]


def test_the_ratios_of_the_planned_time():
    """docs/speed.md: where a row has one figure of each, its ratio; in bold is what misses 20 %, and nothing else."""
    count = 0
    page = text(ROOT / "docs" / "speed.md")
    for line in re.findall(r"^\| .+ \|$", page[page.index("## The planned time") :], re.MULTILINE):
        *_, measured, planned, ratio = (cell.strip() for cell in line.strip("| ").split(" | "))
        said = numbers(ratio.replace("**", ""))
        if not said:
            continue
        bold = re.findall(r"\*\*(.+?)\*\*", ratio)
        missed = [value for part in bold for value in numbers(part)]
        plain = [value for value in said if value not in missed]
        assert all(0.8 <= value <= 1.2 for value in plain), line
        assert all(any(not 0.8 <= value <= 1.2 for value in numbers(part)) for part in bold), line
        if len(numbers(measured)) == len(numbers(planned)) == 1:
            assert said[0] == pytest.approx(numbers(planned)[0] / numbers(measured)[0], abs=0.03), line
            count += 1
    assert count > 25
