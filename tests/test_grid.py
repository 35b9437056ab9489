"""The experiment: which runs it has, that it runs and goes on, and what is made of its reports."""

import copy
import json
import re
import subprocess
import sys
import time
from xml.etree import ElementTree

import curves
import grid
import pytest
from conftest import tiny
from test_data import make_digits

import sslprune


def test_the_grid_has_each_point_once_and_all_train_as_long():
    points = list(grid.points())
    names = [name for name, _ in points]
    assert len(names) == len(set(names))
    asr = {"dense-1", *(f"mac-0.{i}" for i in range(3, 10)), *(f"transformer-0.{i}" for i in range(4, 10))}
    slu = {"dense-1", *(f"mac-0.{i}" for i in (3, 5, 7, 9)), *(f"transformer-0.{i}" for i in (5, 7, 9))}
    once = {f"{method}-0.{i}" for method in ("size", "sepsize") for i in (3, 5, 7)}
    expected = {f"asr/{name}-seed{seed}" for name in asr for seed in range(3)} | {f"slu/{name}-seed{seed}" for name in slu for seed in range(3)}
    assert set(names) == expected | {f"asr/{name}-seed0" for name in once}
    for name, flags in points:
        options = sslprune.parse(flags)
        what, budget, seed = name.split("/")[1].split("-")
        assert (name.split("/")[0], float(budget), f"seed{options.seed}") == (options.task, options.budget, seed)
        assert what == ("dense" if options.budget == 1 else options.method)
    trained = {(options.task, options.prune_updates, options.finetune_updates) for options in (sslprune.parse(flags) for _, flags in points)}
    assert len(trained) == 2  # one length for each task


def call(monkeypatch, capsys, module, *arguments):
    """Exit status and output of one of the two commands, in this process."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    try:
        status = module.main()
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_grid_runs_goes_on_and_makes_what_the_curves_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(grid, "ORIGIN", {task: ["--dense-updates", "1"] for task in grid.ORIGIN})
    monkeypatch.setattr(grid, "POINT", {task: ["--prune-updates", "1", "--finetune-updates", "1"] for task in grid.POINT})
    out, corpus = tmp_path / "grid", make_digits(tmp_path / "digits")
    arguments = ["--data", corpus, "--hold-out", "ann", "--out", out, "--jobs", 1]
    status, printed = call(monkeypatch, capsys, grid, *arguments, "--only", "slu/mac-0.9-seed0")
    assert (status, printed.splitlines()[-1]) == (0, "1 of 1 points are there")
    report = json.loads((out / "slu" / "mac-0.9-seed0" / "report.json").read_text())
    assert (report["checkpoint"], report["hold_out"]) == (str(out / "slu" / "origin" / "dense.pt"), "ann")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    status, printed = call(monkeypatch, capsys, grid, *arguments, "--only", "slu/mac-0.9-seed0", "slu/dense-1-seed1")
    assert (status, printed.splitlines()[-1]) == (0, "2 of 2 points are there")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}.items()
    reference = json.loads((out / "slu" / "dense-1-seed1" / "report.json").read_text())
    assert reference["updates"] == report["updates"]
    assert reference["metrics"]["dense"] == report["metrics"]["dense"]
    dense, other = out / "asr" / "origin" / "dense.pt", tmp_path / "other"
    arguments[arguments.index(out)] = other
    status, printed = call(monkeypatch, capsys, grid, *arguments, "--dense", dense, "--only", "asr/mac-0.9-seed0")
    assert (status, printed.splitlines()[-1]) == (0, "1 of 1 points are there")
    assert "origin" not in printed
    assert json.loads((other / "asr" / "mac-0.9-seed0" / "report.json").read_text())["checkpoint"] == str(dense)

    status, printed = call(monkeypatch, capsys, curves, out, "--out", tmp_path / "pictures")
    assert status is None
    assert "| mac | 0.9 | 1 |" in printed
    assert "| dense | 1 | 1 |" in printed


def test_the_grid_refuses_to_mix_runs_of_other_flags(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(grid, "ORIGIN", {task: ["--dense-updates", "1"] for task in grid.ORIGIN})
    monkeypatch.setattr(grid, "POINT", {task: ["--prune-updates", "1", "--finetune-updates", "1"] for task in grid.POINT})
    arguments = ["--data", make_digits(tmp_path / "digits"), "--out", tmp_path / "grid", "--only", "asr/dense-1-seed0"]
    assert call(monkeypatch, capsys, grid, *arguments, "--hold-out", "ann")[0] == 0
    dense = tmp_path / "grid" / "asr" / "origin" / "dense.pt"
    for other in (["--hold-out", "bob"], ["--hold-out", "ann", "--dense", dense]):
        status, printed = call(monkeypatch, capsys, grid, *arguments, *other)
        assert status == 2
        assert f"was begun with --data {tmp_path / 'digits'} --hold-out ann; do so again" in printed


def test_the_dense_model_behind_the_curves_is_there():
    model = sslprune.load(grid.HERE / "curves" / "dense.pt")
    assert (model.task, model.encoder.shape) == ("asr", grid.SMALL)


def test_the_grid_goes_to_the_background_and_says_how_to_stop_it(tmp_path):
    (tmp_path / "recordings").mkdir()
    command = [sys.executable, grid.__file__, "--data", tmp_path, "--out", tmp_path / "grid", "--only", "slu/mac-0.9-seed0", "--background"]
    started = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)  # ends, though the grid goes on
    assert re.search(r"kill -- -\d+ stops it", started.stdout)
    said, deadline = tmp_path / "grid" / "grid.log", time.monotonic() + 60
    while not (said.exists() and "0 of 1 points are there" in said.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_of_the_grid_that_fails_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "recordings").mkdir()
    status, printed = call(monkeypatch, capsys, grid, "--data", tmp_path, "--out", tmp_path / "grid", "--only", "slu/mac-0.9-seed0")
    assert status == 1
    assert "asr/origin" in printed
    assert "exit status 2: sslprune: --hold-out" in printed
    assert "0 of 1 points are there" in printed


def test_wrong_use_of_the_grid_is_refused(capsys, monkeypatch, tmp_path):
    (tmp_path / "recordings").mkdir()
    arguments = ["--data", tmp_path, "--out", tmp_path / "grid"]
    (tmp_path / "file").write_text("")
    only, jobs, data, out = ["--only", "slu/mac-0.8-seed0"], ["--jobs", 0], ["--data", tmp_path / "x"], ["--out", tmp_path / "file" / "x"]
    missing, other = ["--dense", tmp_path / "x.pt"], ["--dense", tmp_path / "slu.pt"]
    sslprune.SpeechModel(tiny(), "slu", ["a"]).save(tmp_path / "slu.pt")
    cases = ((only, "slu/mac-0.8-seed0"), (jobs, "--jobs 0"), (data, "recordings"), (out, "a file stands"), (missing, "x.pt: there is no"), (other, "no small"))
    for wrong, named in cases:
        status, printed = call(monkeypatch, capsys, grid, *arguments, *wrong)
        assert status == 2
        assert named in printed.splitlines()[-1]
    assert not (tmp_path / "grid").exists()
    (tmp_path / "grid").mkdir()
    with (tmp_path / "grid" / "lock").open("w") as lock:
        grid.fcntl.flock(lock, grid.fcntl.LOCK_EX)
        status, printed = call(monkeypatch, capsys, grid, *arguments)
    assert status == 2
    assert "a grid is running there" in printed


def made_up(task, method, budget, seed, test, unseen, share=None):
    """A report as far as curves.py reads it; half of each layer is kept, but for the second convolution's quarter."""
    shape = {"channels": [8, 8], "heads": [4], "units": [16]}
    share = share or budget
    pruned = {"channels": [4, 2], "heads": [2], "units": [8]} if budget < 1 else shape
    name = {"asr": "word_error_rate", "slu": "intent_accuracy"}[task]
    metrics = {"test": {name: test}, "unseen": {name: unseen}}
    return {
        "task": task, "method": method, "budget": budget, "seed": seed, "converged": seed != 2, "updates": {"dense": 0, "prune": 5, "finetune": 5},
        "data": "digits", "hold_out": "ann", "checkpoint": f"{task}/dense.pt", "dtype": "float32", "expected": [budget], "train_seconds": 1.0,
        "metric": {"name": name}, "metrics": {"pruned": metrics},
        "dense": {"macs": 1000, "params": 100, "seconds": 2.0, "shape": shape},
        "pruned": {"macs": round(1000 * share), "params": round(100 * share), "seconds": 2.0 * share, "shape": copy.deepcopy(pruned)},
    }  # fmt: skip


REPORTS = [
    *(made_up("asr", "mac", 1.0, seed, test, 0.3) for seed, test in enumerate((0.04, 0.05, 0.06))),
    *(made_up("asr", "mac", 0.5, seed, test, 0.3) for seed, test in enumerate((0.01, 0.02, 0.03))),
    *(made_up("asr", "transformer", 0.5, seed, test, 0.2) for seed, test in enumerate((0.02, 0.03, 0.10))),
    made_up("asr", "size", 0.5, 0, 0.2, 0.4, share=0.8),
    made_up("slu", "mac", 1.0, 0, 0.9, 0.5),
    made_up("slu", "mac", 0.3, 0, 0.7, 0.5),
]


@pytest.fixture
def folder(tmp_path):
    for number, report in enumerate(REPORTS):
        path = tmp_path / "runs" / str(number) / "x" / "report.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(report))
    return tmp_path / "runs"


def test_methods_are_compared_at_all_small_budgets_together_too(capsys, monkeypatch, tmp_path):
    errors = {("mac", 0.6): (0.1, 0.2), ("mac", 0.5): (0.2, 0.1), ("transformer", 0.6): (0.15, 0.25), ("transformer", 0.5): (0.25, 0.15)}
    errors |= {("mac", 0.7): (0.9, 0.9), ("transformer", 0.7): (0.1, 0.1), ("mac", 0.4): (0.9, 0.9)}  # over 0.6, and without its equal
    reports = [made_up("asr", method, budget, seed, test, test) for (method, budget), tests in errors.items() for seed, test in enumerate(tests)]
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))
    lines = call(monkeypatch, capsys, curves, tmp_path / "reports.jsonl")[1].splitlines()
    assert "mac 0.6 against transformer test    -5.00 points: within the spread" in lines
    assert "mac 0.6 and 0.5 against transformer test    -5.00 points: better by more than the spread" in lines


def test_tables_have_means_and_spreads_and_comparisons_are_by_the_spread(capsys, monkeypatch, folder):
    _, printed = call(monkeypatch, capsys, curves, folder)
    lines = printed.splitlines()
    assert "| mac | 0.5 | 3 | 50.0 % | 50.0 % | 2.00 | 2.0 % (1.0 to 3.0) | 30.0 % (30.0 to 30.0) |" in lines
    assert "| size | 0.5 | 1 | 80.0 % | 80.0 % | 1.25 | 20.0 % (20.0 to 20.0) | 40.0 % (40.0 to 40.0) |" in lines
    assert "| mac | 0.3 | 1 | 30.0 % | 30.0 % | 3.33 | 30.0 % (30.0 to 30.0) | 50.0 % (50.0 to 50.0) |" in lines  # slu: errors, too
    assert "mac 0.5 against dense       test    -3.00 points: better by more than the spread" in lines
    assert "mac 0.5 against dense       unseen  +0.00 points: within the spread" in lines
    assert "mac 0.5 against transformer test    -3.00 points: within the spread" in lines
    assert "mac 0.3 against dense       test   +20.00 points: a single run, so there is no spread" in lines
    assert "mac 0.5 against transformer unseen +10.00 points: worse by more than the spread" in lines
    assert "     conv 1     50" in lines
    assert "     conv 2     25" in lines
    assert "constraint not converged: asr mac 1 seed 2, asr mac 0.5 seed 2, asr transformer 0.5 seed 2" in lines


def test_the_text_curve_has_each_point_where_it_belongs():
    points = curves.points_of([r for r in REPORTS if r["task"] == "asr"])
    _, *rows, axis, _ = curves.text_curve(points, "test", width=50, height=21).splitlines()
    found = {letter: (row.index(letter) - 7, float(row[:5])) for row in rows for letter in "dmts" if letter in row}
    assert {letter: x for letter, (x, _) in found.items()} == {"d": 50, "m": 0, "t": 0, "s": 30}  # of 50 % to 100 %
    for letter, percent in {"d": 5, "m": 2, "t": 5, "s": 20}.items():
        assert found[letter][1] == pytest.approx(percent, abs=0.6)
    assert axis.count("-") == 50


def test_pictures_are_svg_with_every_point_and_the_collected_reports_give_the_same(capsys, monkeypatch, folder, tmp_path):
    status, printed = call(monkeypatch, capsys, curves, folder, "--out", tmp_path / "a")
    assert status is None
    circles = {name: ElementTree.parse(tmp_path / "a" / f"{name}.svg").getroot().findall(".//{*}circle") for name in ("asr", "slu")}
    assert {name: len(found) for name, found in circles.items()} == {"asr": 8, "slu": 4}  # two panels each
    heights = [float(circle.get("cy")) for circle in circles["asr"][:4]]  # dense, mac, transformer, size: 5, 2, 5 and 20 %
    assert heights[0] == heights[2] < heights[1]
    assert (heights[0] - heights[3]) / (heights[1] - heights[0]) == pytest.approx(15 / 3, rel=0.02)
    cells = [text.text for text in ElementTree.parse(tmp_path / "a" / "kept.svg").getroot().findall(".//{*}text")]
    assert cells.count("50") == 3 * 4  # three of four layers, in four columns
    assert cells.count("25") == 4
    _, again = call(monkeypatch, capsys, curves, tmp_path / "a" / "reports.jsonl", "--out", tmp_path / "b")
    assert again == printed
    for name in ("asr.svg", "slu.svg", "kept.svg", "reports.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_makes_no_common_curve_is_refused_in_one_line(capsys, monkeypatch, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        status, printed = call(monkeypatch, capsys, curves, path)
        assert (status, str(path) in printed.splitlines()[-1]) == (2, True)
    path = folder / "z" / "report.json"
    path.parent.mkdir()
    another = made_up("asr", "mac", 0.7, 0, 0.1, 0.2)
    other_shape, other_splits = copy.deepcopy(another), copy.deepcopy(another)
    other_shape["dense"]["shape"]["heads"] = [4, 4]
    del other_splits["metrics"]["pruned"]["unseen"]
    wrong = (REPORTS[0], another | {"hold_out": "bob"}, another | {"method": "none"}, other_shape, other_splits, {"updates": {"prune": 1}}, [])
    for text in ("{", *map(json.dumps, wrong)):
        path.write_text(text)
        status, printed = call(monkeypatch, capsys, curves, folder)
        assert (status, str(path) in printed.splitlines()[-1]) == (2, True), text
    path.write_text(json.dumps(another))
    assert call(monkeypatch, capsys, curves, folder)[0] is None
    status, printed = call(monkeypatch, capsys, curves, folder, "--out", path)
    assert (status, "a file stands" in printed) == (2, True)
