"""The experiment's statistics, worked out by hand, and that the README says what they say."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import curves
import grid
import numpy as np
import pytest
from conftest import as_processes, tiny
from test_data import make_table

import data
import sslprune
from flops import SMALL, UserError
from gates import check_budget

HERE = Path(__file__).parent / "experiment"


def result(errors, method="mac", budget=0.5, seed=0, task="asr", words=10, **fields):
    """A line of results.jsonl: `errors` of each speaker, in as many words."""
    rows = [[int(e), words, int(e), 4 * words] if task == "asr" else [int(e), words] for e in errors]
    return {
        "task": task,
        "name": f"{method}-{budget}-{seed}",
        "method": method,
        "budget": budget,
        "seed": seed,
        "flags": "dense" if budget == 1 else "pruned",
        "inputs": "0123abcd",
        "updates": {"dense": 0, "prune": 3, "finetune": 2},
        "converged": True,
        "macs": budget,
        "params": budget,
        "expected": {"channels": 0.9, "heads": 0.25, "units": 0.5} if budget < 1 else None,
        "dev": {"word_error_rate": 0.3} if task == "asr" else {"intent_accuracy": 0.8},
        "speakers": {f"s{i}": row for i, row in enumerate(rows)},
        **fields,
    }


@pytest.fixture(scope="module")
def published():
    return curves.read(HERE / "results.jsonl")


def written(tmp_path, results):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in results))
    return path


def panels(tasks):
    """{task: element} of the figure."""
    svg = ElementTree.fromstring(curves.figure(tasks))
    return {group.get("id"): list(group.iter()) for group in svg.findall("{*}g")}


def signs(panel):
    """The signs in a panel's frame: (method, x, y). What each means stands below the frame."""
    found = [element for element in panel if element.get("class")]
    places = [re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform")).groups() for element in found]
    found = [(element.get("class"), float(x), float(y)) for element, (x, y) in zip(found, places)]
    return [sign for sign in found if sign[2] < 300]


def test_a_point_of_the_figure_stands_where_its_figures_in_the_table_put_it(published):
    """Read by the numbers at the axes."""
    told, drawn = [], []
    for row in curves.table(published).splitlines()[2:]:
        name, macs, _, _, _, error, *_ = (cell.strip() for cell in row.split("|")[1:-1])
        told.append((*re.match(r"(\w+) `?(\w+)", name).groups(), float(macs.rstrip("%")), float(error.split()[0])))
    for task, panel in panels(published).items():
        ticks = [element for element in panel if re.fullmatch(r"[\d.]+", element.text or "")]
        below = [(float(t.get("x")), float(t.text)) for t in ticks if t.get("text-anchor") == "middle"]
        beside = [(float(t.get("y")) - 4, float(t.text)) for t in ticks if t.get("text-anchor") == "end"]
        macs, error = (np.polynomial.Polynomial.fit(*zip(*axis), 1) for axis in (below, beside))
        drawn += [(task, method, macs(x), error(y)) for method, x, y in signs(panel)]
    assert len(drawn) == len(told) > 20
    for point, expected in zip(sorted(drawn), sorted(told)):
        assert point[:2] == expected[:2]
        assert point[2] == pytest.approx(expected[2], abs=0.07)  # told to a tenth
        assert point[3] == pytest.approx(expected[3], abs=0.01)  # told to a hundredth


def test_an_interval_is_paired_by_speaker():
    """Speakers differ much, the two points by one word each: nothing is uncertain about the difference."""
    errors = np.arange(50)
    ours, theirs = curves.Point([result(errors, words=100)]), curves.Point([result(errors + 1, words=100)])
    assert curves.difference(ours, theirs) == (pytest.approx(-0.01),) * 3


def test_an_interval_is_as_wide_as_the_central_limit_says():
    draw = np.random.default_rng(0)
    ours, theirs = (curves.Point([result(draw.binomial(100, 0.2, 400), words=100)]) for _ in range(2))
    difference, lower, upper = curves.difference(ours, theirs)
    assert difference == pytest.approx(ours.errors()[0] - theirs.errors()[0])
    changes = (ours.counts[0] - theirs.counts[0])[:, 0] / 100  # of each speaker
    width = 2 * 1.96 * changes.std() / np.sqrt(400)
    assert upper - lower == pytest.approx(width, rel=0.03)
    assert (upper + lower) / 2 == pytest.approx(difference, abs=0.03 * width)


def test_speakers_weigh_as_much_as_they_say():
    """Two speakers of 10 and 90 words: a draw is one of them twice, or both."""
    ours = curves.Point([result([], speakers={"a": [2, 10, 3, 40], "b": [9, 90, 9, 360]})])
    theirs = curves.Point([result([], speakers={"b": [18, 90, 18, 360], "a": [0, 10, 0, 40]})])
    assert curves.difference(ours, theirs) == pytest.approx(((2 - 9) / 100, -9 / 90, 2 / 10))
    assert ours.errors(1) == pytest.approx([12 / 400])


def test_only_common_seeds_are_compared():
    ours = curves.Point([result([5, 5], seed=2), result([1, 1], seed=0)])
    theirs = curves.Point([result([2, 2], seed=seed) for seed in (0, 1)])
    assert ours.errors() == [0.1, 0.5]  # by seed
    assert curves.difference(ours, theirs) == (pytest.approx(-0.1),) * 3


def test_the_verdict_follows_from_the_intervals(tmp_path):
    """Of 40 speakers with 100 words each. Dense: 20 errors each."""
    swinging = np.resize([-6, 6], 40)  # by so many words, no difference on average

    def seeds(errors, **which):
        return [result(20 + np.array(errors), words=100, seed=seed, **which) for seed in range(2)]

    lines = [
        *seeds([0] * 40, budget=1.0),
        *seeds([-2] * 40, budget=0.9),
        *seeds(swinging, budget=0.8),
        *seeds([3] * 40, budget=0.7),
        *seeds([0] * 40, budget=0.6),
        *seeds(np.resize([0, 0, 0, 0, 1], 40), budget=0.5),
        *seeds(np.resize([0, 1], 40), budget=0.4),
        *seeds(np.resize([0, 1], 40), budget=0.4, method="transformer"),
        *seeds([1] * 40, budget=0.5, method="transformer"),
        *seeds([1] * 40, budget=0.7, method="transformer", converged=False),
    ]
    said = " ".join(curves.verdict(curves.read(written(tmp_path, lines))).split())
    assert "- Dense on test: ASR 20.00 % word errors (of 4,000, by 40 speakers; margin 0.40 points). -" in said
    assert "30 % less: ASR shown at 0.9 (0.9 more accurate, 0.8 not told apart, 0.7 worse). -" in said
    assert "50 % less: ASR shown at 0.6 and 0.5 (0.6 no worse, 0.5 worse by less than the margin). -" in said
    assert (
        "than `transformer`: ASR shown at 0.5 (0.9 not measured, 0.7 worse, 0.5 more accurate, 0.4 not told apart). -"
        in said
    )
    assert "no claim: ASR 0.9 not measured, 0.7 worse, 0.5 worse, 0.4 worse." in said
    few = [r for r in lines if r["budget"] in (1, 0.7) and r["method"] == "mac"]
    few += [result([1, 3], budget=budget, task="slu", seed=budget < 1) for budget in (1.0, 0.7)]  # no common seed
    few += [result([1, 3], budget=0.5, task="slu")]
    tasks = curves.read(written(tmp_path, few))
    said = " ".join(curves.verdict(tasks).split())
    assert "(0.9 not measured, 0.8 not measured, 0.7 worse); SLU not shown (0.9 not measured, 0.8 not m" in said
    assert "(0.6 not measured, 0.5 not measured); SLU shown at 0.5 (0.6 not measured, 0.5 no worse). -" in said
    assert [row.split("|")[8].strip() for row in curves.table(tasks).splitlines() if "slu `mac`" in row][0] == ""
    assert sum(len(signs(panel)) for panel in panels(tasks).values()) == 4 and "nan" not in curves.figure(tasks)


def test_drawn_seeds_widen_the_interval():
    """Two seeds that differ by two words for every speaker: a draw has one of them twice, or both."""
    ours = curves.Point([result([4] * 40, words=100, seed=0), result([8] * 40, words=100, seed=1)])
    theirs = curves.Point([result([4] * 40, words=100, seed=seed) for seed in range(2)])
    assert curves.difference(ours, theirs) == (pytest.approx(0.02),) * 3
    assert curves.difference(ours, theirs, draw_seeds=True) == pytest.approx((0.02, 0, 0.04))
    tasks = {"asr": {("dense", 1.0): theirs, ("mac", 0.5): ours}}
    assert "| +2.00 [+2.00, +2.00] |" in curves.report(tasks) and "0.5 worse)" in curves.report(tasks)
    assert "| +2.00 [+0.00, +4.00] |" in curves.report(tasks, draw_seeds=True)
    assert "0.5 not told apart)" in curves.report(tasks, draw_seeds=True)


@pytest.mark.parametrize(
    "lower, upper, word",
    [
        (-2, -1, "more accurate"),
        (-2, 0, "no worse"),
        (-2, 0.9, "no worse"),
        (0.1, 0.9, "worse by less than the margin"),
        (-0.1, 1.1, "not told apart"),
        (0.1, 1.1, "worse"),
    ],
)
def test_an_interval_in_words(lower, upper, word):
    assert curves.judged((0, lower, upper), 1) == word


def test_the_tables_say_what_was_measured(tmp_path):
    lines = [
        result([1, 3], budget=1.0, task="slu"),
        result([3, 3], budget=0.7, task="slu", converged=False),
        result([2, 3], budget=0.7, task="slu", method="transformer"),
        result([1, 3], budget=1.0),
        result([2, 2], budget=0.5),
    ]
    tasks = curves.read(written(tmp_path, lines))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in curves.table(tasks).splitlines()]
    assert {len(row) for row in rows} == {9}
    assert rows[2] == ["asr dense", "100.0%", "100.0%", "", "30.00", "20.00 (5.00)", "20.0", "", ""]
    assert rows[4] == ["slu dense", "100.0%", "100.0%", "", "20.00", "20.00", "20.0", "", ""]
    assert rows[5][:7] == ["slu `mac` 0.7 (not converged)", "70.0%", "70.0%", "90%, 25%, 50%", "20.00", "30.00", "30.0"]
    assert rows[5][7:] == ["+10.00 [+0.00, +20.00]", "+5.00 [+0.00, +10.00]"]
    assert rows[6][0] == "slu `transformer` 0.7" and rows[6][8] == ""
    assert "SLU 20.00 % intents wrong (of 20, by 2 speakers; margin 0.40 points)" in curves.verdict(tasks).replace(
        "\n ", ""
    )
    drawn = ElementTree.fromstring(curves.figure(tasks))
    assert sum(len(signs(panel)) for panel in panels(tasks).values()) == 5
    assert all("nan" not in value for element in drawn.iter() for value in element.attrib.values())


@pytest.mark.parametrize(
    "change",
    [{"flags": "x"}, {"inputs": "x"}, {"updates": {"prune": 9}}, {"speakers": {"s0": [1, 9, 1, 36]}}, {"budget": 0.7}],
)
def test_points_that_make_no_common_curve_are_refused(tmp_path, change):
    lines = [result([1, 2], budget=budget) for budget in (1.0, 0.7, 0.5)]
    assert len(curves.read(written(tmp_path, lines))["asr"]) == 3
    lines[2] |= change
    with pytest.raises(UserError, match=r"^\S+, line 3: is the same point as an earlier line, or differs from one"):
        curves.read(written(tmp_path, lines))


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"task": "asr"',
        "7",
        json.dumps(result([1])),
        json.dumps(result([1], budget=1)),
        json.dumps(result([1], task="x")),
        json.dumps(result([1], method="x")),
        json.dumps(result([1], budget=-1)),
        json.dumps(result([1]) | {"budget": "1"}),
        json.dumps(result([1], seed=None)),
        json.dumps(result([1], dev={})),
        json.dumps(result([1], macs="0.5")),
        json.dumps(result([1], expected=None)),
        json.dumps(result([], speakers={})),
        json.dumps(result([], speakers={"s": [1, 2]})),
        json.dumps(result([1], words=0)),
        json.dumps({name: value for name, value in result([1]).items() if name != "converged"}),
        "\xff",
    ],
)
def test_what_are_no_results_ends_in_one_line(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "results.jsonl"
    path.write_text(text, encoding="latin-1")
    monkeypatch.setattr(sys, "argv", ["curves.py", str(path)])
    with pytest.raises(SystemExit) as stopped:
        curves.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    if text and text not in map(json.dumps, (result([1]), result([1], budget=1))):  # which are results
        assert said.startswith(f"curves: {path}, line 1: is no result of tests/experiment/grid.py (")
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_grid_gathers_the_errors_of_each_speaker():
    speakers = {"a1": "ann", "a2": "ann", "b1": "bob"}
    rows = [("a1", "GO ON", "GO NO"), ("b1", "STOP", "STOP"), ("a2", "YES", "")]
    assert grid.errors_by_speaker("asr", rows, speakers) == {"ann": [2, 3, 5, 8], "bob": [0, 1, 0, 4]}
    assert grid.errors_by_speaker("slu", rows, speakers) == {"ann": [2, 2], "bob": [0, 1]}


def test_a_grid_needs_enough_speakers_that_nobody_has_heard():
    def corpus(*test, train=("ann",)):
        subsets = {"train": train, "dev": ["bob"], "test": test}
        return SimpleNamespace(
            **{split: [data.Utterance(f"{s}1", "", 1.0, speaker=s) for s in subsets[split]] for split in subsets}
        )

    many = [f"s{i}" for i in range(20)]
    assert grid.speakers_of(corpus(*many))["s71"] == "s7"
    for wrong in (corpus(*many[1:]), corpus(*many, ""), corpus(*many, "bob"), corpus(*many, train=["s3"])):
        with pytest.raises(UserError, match="intervals need 20 test speakers"):
            grid.speakers_of(wrong)


def test_every_point_of_the_grid_is_within_reach():
    for task in grid.POINTS:
        points = grid.points_of(task)
        assert "dense-1-2" in points and "mac-0.5-2" in points
        for method, budget, _ in points.values():
            check_budget(SMALL, method, budget)
    assert grid.DENSE["slu"] in grid.flags_of("slu", 1.0) and grid.FLAGS["slu"] in grid.flags_of("slu", 0.7)


def make_corpus(root):
    """Twenty test speakers that train and dev do not have."""
    make_table(root, count=20)
    for split, count in (("train", 12), ("dev", 11), ("test", 20)):
        head, *rows = (root / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [rows[i].replace(f"speaker{i % 3}", f"{split}{i}") for i in range(count)]
        (root / f"{split}.tsv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return root


def test_a_grid_runs_its_points_once(tmp_path, monkeypatch, capsys):
    def forked(command, cwd, stdout, stderr, env, check):  # which saves the seconds in which Python starts
        assert (command[:2], cwd, env["OMP_NUM_THREADS"]) == ([sys.executable, "sslprune.py"], tmp_path, "1")
        def work(rank):
            os.chdir(cwd)
            os._exit(sslprune.main(list(map(str, command[2:]))))  # the threads that Python would wait for are not here

        (status,) = as_processes(1, work, stdout.name)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(grid, "ROOT", tmp_path)
    monkeypatch.setattr(grid.subprocess, "run", forked)
    sslprune.save_model(sslprune.SpeechModel(tiny(), "slu", ["frage", "gruß"]), tmp_path / "tiny.pt")
    monkeypatch.setattr(grid, "CHECKPOINT", {"slu": "tiny.pt"})
    updates = "--dense-updates 0 --prune-updates 6 --finetune-updates 1 --evaluate-updates 0"
    monkeypatch.setattr(grid, "COMMON", f"--batch-seconds 5 --gate-lr 1 {updates}")
    monkeypatch.setattr(grid, "POINTS", {"slu": [("mac", (1.0, 0.7), 1), ("size", (0.8,), 1)]})
    corpus, results = make_corpus(tmp_path / "corpus"), tmp_path / "new" / "results.jsonl"

    def run(*arguments, results=results):
        monkeypatch.setattr(sys, "argv", ["grid.py", "slu", str(corpus), "--results", str(results), *arguments])
        try:
            status = grid.main()
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    assert run("--jobs", "0")[0] == 2
    names = "dense-1-0, mac-0.7-0, size-0.8-0"
    assert run("--only", "mac-0.5-0")[::2] == (2, f"grid: mac-0.5-0: no such point; there are {names}\n")
    assert "1 of 3 points" in run("--only", "mac-0.7-0")[1]
    status, printed, _ = run("--jobs", "2")
    assert status == 0 and "dense-1-0: dev intent accuracy" in printed and "3 of 3 points" in printed
    lines = grid.read_results(results)
    assert [line["name"] for line in lines[:1]] == ["mac-0.7-0"]  # and only then the others
    for line in lines:
        method = "dense" if line["budget"] == 1 else line["method"]
        assert line["name"] == f"{method}-{line['budget']:g}-{line['seed']}"
        (out,) = (tmp_path / "runs" / "grid").glob(f"slu-*/{line['name']}/")
        report = json.loads((out / "report.json").read_text())
        wrong, count = np.sum(list(line["speakers"].values()), axis=0)
        assert wrong / count == pytest.approx(1 - report["metric"]["test"])
        assert line["dev"]["intent_accuracy"] == report["metric"]["dev"]
        if method != "dense":
            kept, shape = report["expected_counts"], report["dense"]["shape"]
            assert line["expected"] == {kind: sum(kept[kind]) / sum(shape[kind]) for kind in kept}
    points = curves.read(results)["slu"]
    assert set(points) == {("dense", 1.0), ("mac", 0.7), ("size", 0.8)} and len(points["size", 0.8].results) == 1
    assert points["mac", 0.7].macs <= 0.7 and "--prune-lr 1e-3" in points["mac", 0.7].results[0]["flags"]
    assert run()[:2] == (0, f"3 of 3 points are in {results}\n")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.pt")}
    gathered = tmp_path / "gathered.jsonl"
    assert "1 of 3 points" in run("--only", "size-0.8-0", results=gathered)[1]  # from its folder, and not run again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.pt")} == made
    assert grid.read_results(gathered) == [line for line in lines if line["name"] == "size-0.8-0"]
    monkeypatch.setattr(grid, "POINTS", {"slu": [("mac", (1.0, 0.01, 0.9), 1)]})  # one is out of reach
    status, printed, errors = run()
    assert status == 2 and "mac-0.01-0: has failed; the end of" in errors
    assert "mac-0.9-0: dev" in printed and f"2 of 3 points are in {results}" in printed
    other = "has another checkpoint, corpus or flags; name another file"
    with monkeypatch.context() as changed:
        changed.setattr(grid, "FLAGS", {"slu": "--prune-lr 1e-4"})
        status, _, errors = run()
        assert status == 2 and other in errors
        assert "1 of 3 points" in run("--only", "mac-0.9-0", results=tmp_path / "other.jsonl")[1]  # in other folders
    sslprune.save_model(sslprune.SpeechModel(tiny(seed=1), "slu", ["frage", "gruß"]), tmp_path / "tiny.pt")
    status, _, errors = run()
    assert status == 2 and other in errors
    (corpus / "test.tsv").write_text((corpus / "train.tsv").read_text(encoding="utf-8"), encoding="utf-8")
    status, _, errors = run()
    assert (
        status == 2 and "12, 0 utterances have none, and 12 are in train or dev" in errors and errors.count("\n") == 1
    )


def test_the_pages_say_what_the_results_say(published):
    """The experiment's own page has the verdict and the table, the main page the verdict."""
    assert curves.verdict(published) in (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert curves.report(published) in (HERE / "README.md").read_text(encoding="utf-8")
    assert curves.figure(published) == (HERE / "curve.svg").read_text(encoding="utf-8")
