"""The experiment's statistics, worked out by hand and on simulated data, and that the pages say what they say."""

import json
import math
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
FLAGS = {task: list(grid.TRIED[task]) for task in grid.TRIED}


def result(errors, method="mac", budget=0.5, fold=0, seed=0, flags=0, task="asr", words=10, **fields):
    """A line of results.jsonl: `errors` of each speaker, in as many words."""
    rows = [[int(e), words, int(e), 4 * words] if task == "asr" else [int(e), words] for e in errors]
    point = grid.Point(fold, FLAGS[task][flags], method, budget, seed)
    return {
        "task": task,
        "amount": "quarter",
        **point._asdict(),
        "options": grid.options_of(task, "quarter", point),
        "inputs": "0123abcd",
        "updates": {"dense": 0, "prune": 3, "finetune": 2},
        "converged": True,
        "macs": budget,
        "params": budget,
        "expected": {"channels": 0.9, "heads": 0.25, "units": 0.5} if budget < 1 else None,
        "dev": {"word_error_rate": 0.3} if task == "asr" else {"intent_accuracy": 0.8},
        "cpu": "a CPU",
        "code": "4567cdef",
        "speakers": {f"f{fold}s{i}": row for i, row in enumerate(rows)},
        "utterances": [int(e) for e in errors],
        **fields,
    }


def runs(errors, **which):
    """Results of all folds and seeds. errors: of each speaker of a fold; or a function from fold and seed to them."""
    of = errors if callable(errors) else lambda fold, seed: errors
    return [result(of(fold, seed), fold=fold, seed=seed, **which) for seed in grid.SEEDS for fold in grid.FOLDS]


def everything(errors, best=(0, 0), task="asr", beside=None, **fields):
    """All results of a task. errors: {(method, budget): what `runs` takes}; best: flags for dense and for `mac` 0.7."""
    lines = []
    for (method, budget), number in zip(grid.TUNED, best):
        for flags in range(len(FLAGS[task])):
            dev = 0.2 + 0.1 * (flags != number)
            own = {"dev": {"word_error_rate": dev} if task == "asr" else {"intent_accuracy": 1 - dev}}
            own |= {"method": method, "budget": budget, "flags": flags, "task": task, **fields}
            for fold in grid.FOLDS:
                tried = errors[method, budget]
                tried = tried(fold, grid.TUNING_SEED) if callable(tried) else tried
                lines.append(result(tried, fold=fold, seed=grid.TUNING_SEED, **own))
        if best[0] != best[1]:
            own = {"method": method, "budget": budget, "flags": best[1], "task": task, **fields}
            lines += runs((beside or errors)[method, budget], **own)
    for method, budget in errors:
        lines += runs(errors[method, budget], method=method, budget=budget, flags=best[0], task=task, **fields)
    return lines


def condition(errors, **which):
    return curves.Condition(runs(errors, **which))


def written(tmp_path, results):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in results))
    return path


def drawn_panels(panels):
    """{task-amount: element} of the figure."""
    svg = ElementTree.fromstring(curves.figure(panels))
    return {group.get("id"): list(group.iter()) for group in svg.findall("{*}g")}


def signs(panel):
    """The signs in a panel's frame: (method, x, y). What each means stands below the frame."""
    found = [element for element in panel if element.get("class")]
    places = [re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform")).groups() for element in found]
    found = [(element.get("class"), float(x), float(y)) for element, (x, y) in zip(found, places)]
    return [sign for sign in found if sign[2] < 300]


# Of 40 speakers a fold with 100 words each. Dense: 20 errors each.
SWINGING = np.resize([-6, 6], 40)  # by so many words, no difference on average
ERRORS = {
    ("dense", 1.0): [20] * 40,
    ("mac", 0.9): [18] * 40,
    ("mac", 0.7): 20 + SWINGING,
    ("mac", 0.5): np.resize([20, 21], 40),
    ("transformer", 0.7): [23] * 40,
    ("transformer", 0.5): np.resize([20, 21], 40),
}


def test_a_point_of_the_figure_stands_where_its_figures_in_the_table_put_it(tmp_path):
    """Read by the numbers at the axes."""
    lines = everything(ERRORS, words=100) + everything(ERRORS, words=110, amount="all")
    for line in lines:
        line["options"] = grid.options_of("asr", line["amount"], grid.point_of(line))
    told, drawn = [], []
    panels, missing = curves.read(written(tmp_path, lines))
    assert not missing
    for row in curves.table(panels).splitlines()[2:]:
        name, macs, _, _, _, error, *_ = (cell.strip() for cell in row.split("|")[1:-1])
        task, amount, method = re.match(r"(\w+) (\w+) `?(\w+)", name).groups()
        told.append((f"{task}-{amount}", method, float(macs.rstrip("%")), float(error.split()[0])))
    for name, panel in drawn_panels(panels).items():
        ticks = [element for element in panel if re.fullmatch(r"[\d.]+", element.text or "")]
        below = [(float(t.get("x")), float(t.text)) for t in ticks if t.get("text-anchor") == "middle"]
        beside = [(float(t.get("y")) - 4, float(t.text)) for t in ticks if t.get("text-anchor") == "end"]
        macs, error = (np.polynomial.Polynomial.fit(*zip(*axis), 1) for axis in (below, beside))
        drawn += [(name, method, macs(x), error(y)) for method, x, y in signs(panel)]
    assert len(drawn) == len(told) == 12
    for point, expected in zip(sorted(drawn), sorted(told)):
        assert point[:2] == expected[:2]
        assert point[2] == pytest.approx(expected[2], abs=0.07)  # told to a tenth
        assert point[3] == pytest.approx(expected[3], abs=0.02)  # told to a hundredth


def test_an_interval_is_paired_by_speaker():
    """Speakers differ much, the two conditions by one word each: nothing is uncertain about the difference."""
    errors = np.arange(50)
    ours, theirs = condition(errors, words=100), condition(errors + 1, words=100)
    assert curves.difference(ours, theirs, 0) == (pytest.approx(-0.01),) * 3


def test_an_interval_is_as_wide_as_the_central_limit_says():
    draw = np.random.default_rng(0)
    ours, theirs = (condition(lambda *_: draw.binomial(100, 0.2, 130), words=100) for _ in range(2))
    difference, lower, upper = curves.difference(ours, theirs, 0)
    assert difference == pytest.approx(np.mean(ours.errors()) - np.mean(theirs.errors()))
    changes = (ours.counts - theirs.counts)[:, :, 0].mean(0) / 100  # of each speaker
    width = 2 * 1.96 * changes.std() / np.sqrt(390)
    assert upper - lower == pytest.approx(width, rel=0.03)
    assert (upper + lower) / 2 == pytest.approx(difference, abs=0.03 * width)
    variance = curves.sampling_variance(changes * 100, np.full(390, 100))
    assert variance == pytest.approx((width / 2 / 1.96) ** 2, rel=0.01)
    assert curves.sampling_variance(np.array([1, 5]), np.array([10, 10])) == pytest.approx(8 / 20**2 * 2)  # by hand


def test_runs_widen_the_interval():
    """Of equal folds; between runs of a fold there is a standard deviation of 0.6 points: 0.6 * sqrt(2 / 6) of them."""
    ours, theirs = condition([20] * 40, words=100), condition([21] * 40, words=100)
    difference, lower, upper = curves.difference(ours, theirs, 0.006**2)
    assert (lower, upper) == pytest.approx((-0.01 - 1.96 * 0.006 / 3**0.5, -0.01 + 1.96 * 0.006 / 3**0.5), abs=2e-4)


def test_the_variance_between_runs_is_what_speakers_do_not_explain():
    ups = condition(lambda fold, seed: [20 + 2 * seed] * 40, words=100)  # seeds differ by 2 points for each speaker
    assert curves.variance_between_runs([ups]) == pytest.approx(0.02**2 / 2)
    assert curves.variance_between_runs([ups, condition([20] * 40, words=100)]) == pytest.approx(0.02**2 / 4)
    draw = np.random.default_rng(0)  # each speaker by itself: the same errors in the mean, no run is better
    luck = [condition(lambda *_: draw.binomial(100, 0.2, 40), words=100) for _ in range(100)]
    assert curves.variance_between_runs(luck) < 0.1 * (0.2 * 0.8 / 4000)  # of the variance of a fold's error


def test_speakers_weigh_as_much_as_they_say():
    """Two speakers of 10 and 90 words: a draw of a fold is one of them twice, or both."""
    both = {"a": [2, 10, 3, 40], "b": [9, 90, 9, 360]}, {"b": [18, 90, 18, 360], "a": [0, 10, 0, 40]}
    ours, theirs = (curves.Condition([result([], speakers=speakers)]) for speakers in both)
    assert curves.difference(ours, theirs, 0) == pytest.approx(((2 - 9) / 100, -9 / 90, 2 / 10))
    assert ours.errors(1) == pytest.approx([12 / 400])


class Simulated(curves.Condition):
    """A condition of simulated counts: (seeds, speakers, 2), by folds of equally many speakers."""

    def __init__(self, counts):
        self.counts, self.speakers = counts, [counts.shape[1] // 3] * 3


@pytest.mark.parametrize(
    ("words", "run", "luck"),  # of a speaker; standard deviations of a run's error, and of a speaker's in a run
    [(40, 0.01, 0.03), (18, 0.007, 0.05)],
)
def test_intervals_cover_the_true_difference(words, run, luck):
    """Of 1,000 experiments: speakers differ, in general and in what a condition does for them, and so do runs.

    Some have said ten times as much as others.
    """
    draw, covered, truth = np.random.default_rng(0), 0, 0.01
    for _ in range(1_000):
        total = 1 + draw.geometric(1 / words, 240)
        hard, conditions = draw.normal(0.25, 0.12, 240), []
        for number in range(6):
            chance = hard + truth * (number == 0) + draw.normal(0, 0.03, 240)
            chance = chance + np.repeat(draw.normal(0, run, (2, 3)), 80, axis=1) + draw.normal(0, luck, (2, 240))
            errors = draw.binomial(total, chance.clip(0, 1))
            conditions.append(Simulated(np.stack((errors, np.tile(total, (2, 1))), axis=2)))
        _, lower, upper = curves.difference(*conditions[:2], curves.variance_between_runs(conditions))
        covered += lower <= truth <= upper
    assert 930 <= covered <= 970


def test_mapsswe_is_the_normal_test_of_the_utterances_differences():
    """By hand: differences 2, 0, 1, 1 in each fold and seed have the mean 1, and a deviation of sqrt(6 / 11)."""
    ours, theirs = condition([3, 1, 2, 2]), condition([1, 1, 1, 1])
    z = 1 / np.sqrt(6 / 11 / 12)
    tail = np.trapezoid(np.exp(-(np.linspace(z, 12, 100_001) ** 2) / 2), dx=(12 - z) / 1e5) / np.sqrt(2 * np.pi)
    assert curves.mapsswe(ours, theirs) == pytest.approx(2 * tail, rel=1e-4)
    assert curves.mapsswe(ours, ours) == 1


def test_the_verdict_follows_from_the_intervals(tmp_path):
    """With the same flags for all, and with flags for `mac` 0.7 with which it is better than that dense."""
    beside = {("dense", 1.0): [22] * 40, ("mac", 0.7): [21] * 40}
    for best, tuned in (
        ((1, 1), "flags that are best for `mac` 0.7. ASR, a quarter: the same are best for dense."),
        ((1, 2), "flags that are best for `mac` 0.7. ASR, a quarter: more accurate; each with its own best, worse by"),
    ):
        panels, _ = curves.read(written(tmp_path, everything(ERRORS, best, words=100, beside=beside)))
        said = " ".join(curves.verdict(panels).split())
        assert "ASR, a quarter, 20.00 % word errors (of 12,000, by 120 speakers; margin 1.00 points). -" in said
        assert tuned in said
        assert "to 30 % fewer MACs. ASR, a quarter: shown at 0.9 (0.9 more accurate, 0.7 not told apart). -" in said
        assert "with 50 % fewer MACs. ASR, a quarter: shown at 0.5 (0.5 worse by less than the margin). -" in said
        assert "with as many MACs. ASR, a quarter: shown at 0.7 (0.7 more accurate, 0.5 not told apart). -" in said
        assert len(curves.table(panels).splitlines()) == 2 + 6 + 2 * (best[0] != best[1])


def test_a_panels_intervals_have_its_runs_in_them(tmp_path):
    """Seeds of dense differ by two points for each speaker; folds have 60, 40 and 20 speakers."""

    def errors(more):
        return lambda fold, seed: [20 + more + 2 * (seed == 2) * (more == 0)] * (60 - 20 * fold)

    found = {which: errors(number) for number, which in enumerate(grid.COMPARED)}
    (panel,), _ = curves.read(written(tmp_path, everything(found, (0, 1), words=100)))
    assert panel.between_runs == pytest.approx(0.02**2 / 2 * 2 / 8)  # of eight conditions, dense is there twice
    _, lower, upper = panel.difference(panel.points["mac", 0.9], panel.dense)
    deviation = np.sqrt(2 * panel.between_runs / 2 * (60**2 + 40**2 + 20**2) / 120**2)
    assert (upper - lower) / 2 / 1.96 == pytest.approx(deviation, rel=0.03)
    assert curves.in_folds(panel.points["mac", 0.5], panel.dense) == pytest.approx([0.02] * 3)
    extra = everything({("mac", 0.9): errors(9)} | dict.fromkeys(grid.TUNED, errors(9)), (3, 3), words=100)
    extra = [line for line in extra if line["seed"] != grid.TUNING_SEED]  # with flags that nobody has chosen
    (same,), _ = curves.read(written(tmp_path, everything(found, (0, 1), words=100) + extra))
    assert same.between_runs == panel.between_runs


def test_a_margin_holds_for_both_dense_models_and_all_budgets_refute(tmp_path):
    worse = ERRORS | {("mac", 0.9): [22] * 40, ("mac", 0.7): [22] * 40}
    beside = {("dense", 1.0): [22] * 40, ("mac", 0.7): np.resize([22, 23], 40)}
    (panel,), _ = curves.read(written(tmp_path, everything(worse, (1, 2), words=100, beside=beside)))
    said = " ".join(curves.verdict([panel]).split())
    assert "ASR, a quarter: refuted (0.9 worse, 0.7 worse). -" in said
    assert "ASR, a quarter: worse by less than the margin; each with its own best, worse." in said


@pytest.mark.parametrize(
    ("mac", "says"),  # of `mac` 0.9, 0.7 and 0.5: the ends of their intervals less dense, in points; the margin is 1
    [
        ((0.3, 0.9), "fewer MACs. ASR, a quarter: refuted (0.9 worse by less than the margin, 0.7 worse by less than"),
        ((0.3, 1.2), "with 50 % fewer MACs. ASR, a quarter: not shown (0.5 worse)."),
        ((1.1, 1.9), "with 50 % fewer MACs. ASR, a quarter: refuted (0.5 worse)."),
        ((-0.1, 1.2), "with 10 to 30 % fewer MACs. ASR, a quarter: not shown (0.9 not told apart,"),
    ],
)
def test_a_part_is_refuted_by_intervals_above_what_it_allows(tmp_path, monkeypatch, mac, says):
    (panel,), _ = curves.read(written(tmp_path, everything(ERRORS, words=100)))
    monkeypatch.setattr(panel, "difference", lambda *_: (np.mean(mac) / 100, mac[0] / 100, mac[1] / 100))
    assert panel.margin == pytest.approx(0.01) and says in " ".join(curves.verdict([panel]).split())


def test_a_report_says_what_made_its_runs(tmp_path):
    lines = everything(ERRORS, words=100)
    lines[-1] |= {"code": "89abcdef"}
    (panel,), _ = curves.read(written(tmp_path, lines))
    said = " ".join(curves.report([panel]).split())
    assert f"ASR, a quarter: {len(lines)} runs (a CPU, code 4567cdef; a CPU, code 89abcdef); the standard" in said
    assert f"runs of a fold is {100 * math.sqrt(panel.between_runs):.2f} points." in said


def test_nothing_is_said_before_all_points_are_there(tmp_path, monkeypatch, capsys):
    lines = everything(ERRORS, words=100)
    slu = everything(ERRORS, words=100, task="slu")
    del slu[-1]
    assert len(lines) == 4 * 2 * 3 + 6 * 2 * 3
    panels, missing = curves.read(written(tmp_path, lines + slu))
    assert [p.task for p in panels] == ["asr"]
    assert missing == ["slu quarter has 59 points, and lacks 1 or more"]
    assert list(drawn_panels(panels)) == ["asr-quarter"]
    for few in (slu, lines[:30], lines[1:], []):
        path = written(tmp_path, few)
        monkeypatch.setattr(sys, "argv", ["curves.py", str(path)])
        with pytest.raises(SystemExit):
            curves.main()
        assert "nothing is said before all points of a task and an amount are there: " in capsys.readouterr().err


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
    lines = everything(ERRORS, words=100) + everything(ERRORS, (0, 3), task="slu", words=100)
    lines[-1]["converged"] = False
    which = "`{method}` {budget}".format(**lines[-1])
    panels, _ = curves.read(written(tmp_path, lines))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in curves.table(panels).splitlines()]
    assert {len(row) for row in rows} == {9} and len(rows) == 2 + 6 + 8
    assert rows[2] == ["asr quarter dense", "100.0%", "100.0%", "", "30.00", "20.00 (5.00)", "20.0, 20.0", "", ""]
    ours = next(row for row in rows if row[0] == "asr quarter `mac` 0.5")
    assert ours[:7] == [ours[0], "50.0%", "50.0%", "90%, 25%, 50%", "30.00", "20.50 (5.12)", "20.5, 20.5"]
    assert ours[7].startswith("+0.50 [+0.41, +0.59] (+0.5, +0.5, +0.5), p ") and ours[8] == "+0.00 [+0.00, +0.00]"
    assert [row[0] for row in rows if "converged" in row[0]] == [f"slu quarter {which} (not converged)"]
    beside = FLAGS["slu"][3]
    assert [row[0] for row in rows[-2:]] == [f"slu quarter dense, `{beside}`", f"slu quarter `mac` 0.7, `{beside}`"]
    assert not any("p " in row[7] for row in rows[8:])
    tried = curves.tuning_table(panels).splitlines()
    assert len(tried) == 2 + 4 + 4
    assert f"| asr quarter `{FLAGS['asr'][0]}` | **20.00** | **20.00** |" in tried
    assert f"| slu quarter `{FLAGS['slu'][0]}` | **20.00** | 30.00 |" in tried
    elements = ElementTree.fromstring(curves.figure(panels)).iter()
    assert all("nan" not in value for element in elements for value in element.attrib.values())


@pytest.mark.parametrize(
    "change",
    [{"inputs": "x"}, {"options": "x"}, {"speakers": {"s0": [1, 9, 1, 36]}}, {"utterances": [1]}, {"seed": 1}],
)
def test_points_that_make_no_common_curve_are_refused(tmp_path, change):
    lines = [result([1, 2], seed=seed) for seed in grid.SEEDS]
    lines[1] |= change
    with pytest.raises(UserError, match=r"^\S+, line 2: is the same point as an earlier line, or differs from one"):
        curves.read(written(tmp_path, lines))


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"task": "asr"',
        "7",
        json.dumps(result([1])),
        *(
            json.dumps(result([1]) | change)
            for change in (
                {"task": "x"},
                {"amount": "x"},
                {"method": "x"},
                {"budget": -1},
                {"budget": "0.5"},
                {"seed": None},
                {"fold": 3},
                {"flags": "x"},
                {"dev": {}},
                {"macs": "0.5"},
                {"params": math.nan},
                {"expected": None},
                {"speakers": {}},
                {"speakers": {"s": [1, 2]}},
                {"speakers": {"s": [1, 0, 1, 0]}},
                {"utterances": ["x"]},
            )
        ),
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
    if text not in ("", json.dumps(result([1]))):  # which is a result
        assert said.startswith(f"curves: {path}, line 1: is no result of tests/experiment/grid.py (")
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_grid_gathers_the_errors_of_each_speaker_and_utterance():
    speakers = {"a1": "ann", "a2": "ann", "b1": "bob"}
    rows = [("a1", "GO ON", "GO NO"), ("b1", "STOP", "STOP"), ("a2", "YES", "")]
    assert grid.errors_of("asr", rows, speakers) == ({"ann": [2, 3, 5, 8], "bob": [0, 1, 0, 4]}, [1, 0, 1])
    assert grid.errors_of("slu", rows, speakers) == ({"ann": [2, 2], "bob": [0, 1]}, [1, 0, 1])


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


def test_the_grid_tries_all_flags_and_then_takes_the_best(tmp_path):
    """Dense decides for all points; `mac` 0.7 for itself and dense beside it."""
    lines = {grid.point_of(r): r for r in everything(ERRORS, (1, 2), words=100)}
    tuning = grid.tuning("asr")
    assert len(tuning) == 4 * 2 * 3 and {p.seed for p in tuning} == {0} and 0 not in grid.SEEDS
    assert list(grid.points_of("asr", [])) == tuning and grid.chosen("asr", [lines[p] for p in tuning[1:]]) is None
    assert grid.chosen("asr", [lines[p] for p in tuning]) == FLAGS["asr"][1:3]
    points = grid.points_of("asr", [lines[p] for p in tuning])
    assert points == lines.keys() and list(points)[: len(tuning)] == tuning
    lines[tuning[0]]["dev"] = {"word_error_rate": -0.5}  # one fold of three
    assert grid.chosen("asr", [lines[p] for p in tuning]) == [FLAGS["asr"][0], FLAGS["asr"][2]]


def test_every_point_of_the_grid_is_within_reach():
    for task in grid.TRIED:
        for point in grid.every_point(task).values():
            if point.budget < 1:
                check_budget(SMALL, point.method, point.budget)
            flags = f"--task {task} --budget {point.budget} {grid.options_of(task, 'all', point)}"
            times = 2 if point.flags.endswith(grid.TWICE) else 1
            assert sslprune.parse(flags.split()).prune_updates == times * grid.UPDATES["all"][0]
        assert set(grid.tuning(task)) < set(grid.every_point(task).values())


def make_corpus(root):
    """Twenty test speakers that train and dev do not have."""
    make_table(root, count=20)
    for split, count in (("train", 12), ("dev", 11), ("test", 20)):
        head, *rows = (root / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [rows[i].replace(f"speaker{i % 3}", f"{split}{i}") for i in range(count)]
        (root / f"{split}.tsv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def small_grid(tmp_path, monkeypatch, capsys):
    """A function that calls grid.py in another repository, with one fold and two sets of flags."""

    def forked(command, cwd, stdout, stderr, env, check):  # which saves the seconds in which Python starts
        program, arguments = (command[1], command[2:]) if command[1] != "-c" else (command[2], command[3:])
        assert (command[0], cwd, env["OMP_NUM_THREADS"]) == (sys.executable, tmp_path, "1")
        assert program in ("sslprune.py", grid.GATES_ALONE)

        def work(rank):
            os.chdir(cwd)
            if program == grid.GATES_ALONE:
                sys.argv = ["-c", *map(str, arguments)]
                try:
                    exec(program, {})
                except SystemExit as ended:
                    os._exit(ended.code)
            os._exit(sslprune.main(list(map(str, arguments))))  # the threads that Python would wait for are not here

        (status,) = as_processes(1, work, stdout.name)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(grid, "ROOT", tmp_path)
    monkeypatch.setattr(grid, "RUNS", tmp_path / "runs" / "grid")
    monkeypatch.setattr(grid, "PRETRAINED", tmp_path / "tiny.pt")
    monkeypatch.setattr(grid, "STARTS", tmp_path / "starts")
    monkeypatch.setattr(grid, "PUBLISHED", tmp_path / "published.jsonl")
    monkeypatch.setattr(grid.subprocess, "run", forked)
    monkeypatch.setattr(grid, "COMMON", "--batch-seconds 5 --gate-lr 1 --dense-updates 0 --evaluate-updates 0")
    monkeypatch.setattr(grid, "UPDATES", {"quarter": (6, 1)})
    start = "--budget 1 --batch-seconds 5 --prune-updates 0 --finetune-updates 0"
    monkeypatch.setattr(grid, "START", start)
    monkeypatch.setattr(grid, "START_UPDATES", {"quarter": 1})
    monkeypatch.setattr(grid, "FOLDS", range(1))
    monkeypatch.setattr(grid, "SEEDS", (1, 2))
    monkeypatch.setattr(grid, "COMPARED", (("dense", 1.0), ("mac", 0.7), ("transformer", 0.9)))
    tried = {"slow": "--prune-lr 1e-5 --finetune-lr 1e-5", "fast": "--prune-lr 1e-3 --finetune-lr 1e-3"}
    monkeypatch.setattr(grid, "TRIED", {"asr": tried, "slu": tried})
    for fold in range(2):
        for task in ("asr", "slu"):
            make_corpus(tmp_path / "tables" / f"{task}-quarter-{fold}")

    def run(task, *arguments, results="results.jsonl"):
        command = ["grid.py", task, "quarter", str(tmp_path / "tables"), "--results", str(tmp_path / "new" / results)]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        try:
            status = grid.main()
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


def test_a_grid_runs_its_points_once(small_grid, tmp_path, monkeypatch):
    sslprune.save_model(sslprune.SpeechModel(tiny(), "slu", ["frage", "gruß"]), tmp_path / "tiny.pt")
    assert small_grid("slu", "--jobs", "0")[0] == 2
    status, _, errors = small_grid("slu", "--only", "0-fast-mac-0.1-0")
    assert status == 2 and errors.startswith("grid: 0-fast-mac-0.1-0: no such point; there are 0-slow-dense-1-0, ")
    assert "1 of 1 points are in" in small_grid("slu", "--only", "0-fast-mac-0.7-0")[1]
    status, printed, _ = small_grid("slu", "--jobs", "2")
    lines = grid.read_results(tmp_path / "new" / "results.jsonl")
    assert status == 0 and "0-slow-dense-1-0: dev " in printed
    assert len(lines) in (4 + 6, 4 + 6 + 4) and f"{len(lines)} of {len(lines)} points are in" in printed
    assert grid.point_of(lines[0]) == (0, "fast", "mac", 0.7, 0)  # and only then the others
    for line in lines:
        point = grid.point_of(line)
        (out,) = (tmp_path / "runs" / "grid").glob(f"slu-quarter-{point.fold}-*/{point}/")
        report = json.loads((out / "report.json").read_text())
        wrong, count = np.sum(list(line["speakers"].values()), axis=0)
        assert wrong / count == pytest.approx(1 - report["metric"]["test"])
        assert wrong == sum(line["utterances"]) and count == len(line["utterances"])
        assert line["dev"]["intent_accuracy"] == report["metric"]["dev"]
        if point.budget < 1:
            kept, shape = report["expected_counts"], report["dense"]["shape"]
            assert line["expected"] == {kind: sum(kept[kind]) / sum(shape[kind]) for kind in kept}
    (panel,), missing = curves.read(tmp_path / "new" / "results.jsonl")
    assert not missing and panel.points.keys() == set(grid.COMPARED) and panel.points["mac", 0.7].macs <= 0.7
    again = f"{len(lines)} of {len(lines)} points are in {tmp_path / 'new' / 'results.jsonl'}\n"
    assert small_grid("slu")[:2] == (0, again)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.pt")}
    small_grid("slu", "--only", "0-fast-mac-0.7-0", results="gathered.jsonl")  # from its folder, and not run again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.pt")} == made
    assert grid.read_results(tmp_path / "new" / "gathered.jsonl") == lines[:1]
    for change, says in (({}, "nothing"), ({"seconds": -1, "code": "0"}, "seconds, code")):
        (tmp_path / "published.jsonl").write_text(json.dumps(lines[0] | change))
        printed = small_grid("slu", "--only", "0-fast-mac-0.7-0", results=f"{says}.jsonl")[1]
        assert f" s; published.jsonl has other {says}\n" in printed
    monkeypatch.setattr(grid, "COMPARED", (*grid.COMPARED, ("mac", 0.01), ("mac", 0.9)))  # one is out of reach
    status, printed, errors = small_grid("slu")
    assert status == 2 and errors.count("has failed; the end of its log in ") == 2
    assert printed.count("-mac-0.9-") == 2 and f"{len(lines) + 2} of {len(lines) + 4} points are in" in printed
    other = "has another start, corpus or flags; name another file"
    with monkeypatch.context() as changed:
        changed.setattr(grid, "COMMON", f"{grid.COMMON} --layer-drop 0.1")
        assert other in small_grid("slu")[2]
    sslprune.save_model(sslprune.SpeechModel(tiny(seed=1), "slu", ["frage", "gruß"]), tmp_path / "tiny.pt")
    assert other in small_grid("slu")[2]
    corpus = tmp_path / "tables" / "slu-quarter-0"
    (corpus / "test.tsv").write_text((corpus / "train.tsv").read_text(encoding="utf-8"), encoding="utf-8")
    status, _, errors = small_grid("slu")
    assert status == 2 and "12, 0 utterances have none, and 12 are in train or dev" in errors
    assert errors.count("\n") == 1


def test_remedies_run_after_the_points_and_are_compared_on_dev(small_grid, tmp_path, monkeypatch):
    sslprune.save_model(sslprune.SpeechModel(tiny(), "slu", ["frage", "gruß"]), tmp_path / "tiny.pt")
    monkeypatch.setattr(grid, "COMMON", grid.COMMON.replace("--evaluate-updates 0", "--evaluate-updates 6"))
    monkeypatch.setattr(grid, "CONTROL", ("mac", 0.8))  # what the tiny model reaches
    status, printed, _ = small_grid("slu", "--remedies")
    lines = {grid.point_of(line): line for line in grid.read_results(tmp_path / "new" / "results.jsonl")}
    points = grid.points_of("slu", lines.values())
    tried = grid.remedies("slu", lines.values())
    assert status == 0 and f"{len(lines)} of {len(lines)} points" in printed
    assert lines.keys() == points | set(tried) and set(list(lines)[-len(tried) :]) == set(tried)
    names = [f"-{which}-{seed}" for seed in (1, 2) for which in ("gates-1", "mac-0.95", "mac-0.8")]
    names += ["+twice-dense-1-1", "+twice-mac-0.7-1"]
    assert [str(p) for p in tried] == [f"0-{tried[0].flags}{name}" for name in names]
    assert 0.99 < lines[tried[0]]["macs"] < 1 and lines[tried[1]]["macs"] <= 0.95
    assert [lines[p]["updates"]["prune"] for p in tried] == [6, 6, 6, 6, 6, 6, 12, 12]
    (history,) = (tmp_path / "runs" / "grid").glob(f"*/{tried[0]}/metrics.jsonl")
    entries = [json.loads(line) for line in history.read_text().splitlines()]
    assert [e["multipliers"] for e in entries if (e["phase"], e["update"]) == ("prune", 6)] == [[[0, 0]]]
    (panel,), _ = curves.read(tmp_path / "new" / "results.jsonl")
    table = {row.split(" | ")[0]: row for row in curves.remedies_table([panel]).splitlines()[2:]}
    error = {str(p): 100 * grid.dev_error(line) for p, line in lines.items()}
    a, b = (error[f"0-{tried[0].flags}-mac-0.95-{seed}"] for seed in (1, 2))
    less = [ours - error[f"0-{tried[0].flags}-dense-1-{seed}"] for ours, seed in ((a, 1), (b, 2))]
    change = f"{sum(less) / 2:+.2f} ({less[0]:+.1f}, {less[1]:+.1f})"
    name = "| slu quarter `mac` 0.95"
    assert table[name] == f"{name} | {(a + b) / 2:.2f} | {change} |  |"
    name, each = "| slu quarter dense, twice the updates", f"0-{tried[0].flags}"
    longer = error[f"{each}+twice-dense-1-1"] - error[f"{each}-dense-1-1"]
    assert table[name].endswith(f" |  | {longer:+.2f} ({longer:+.1f}) |")
    kept = ["dense", "`mac` 0.7", "gates", "`mac` 0.95", "`mac` 0.8"]
    kept += ["dense, twice the updates", "`mac` 0.7, twice the updates"]
    assert table.keys() == {f"| slu quarter {name}" for name in kept}
    monkeypatch.setattr(curves, "CLAIMS", [])  # whose budgets are not here
    assert curves.report([panel]).endswith(curves.remedies_table([panel]) + "\n")
    del panel.results[grid.Point(0, tried[0].flags, "gates", 1.0, 2)]
    assert "gates" not in curves.remedies_table([panel]) and "`mac` 0.95" in curves.remedies_table([panel])


def test_recognition_begins_with_the_start_of_its_fold(small_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "FOLDS", range(2))
    sslprune.save_model(sslprune.SpeechModel(tiny(), "slu", ["frage"]), tmp_path / "tiny.pt")
    status, printed, _ = small_grid("asr", "--only", "1-fast-mac-0.7-1")
    assert status == 0 and printed.splitlines()[0] == "starts/asr-quarter-1.pt: made"
    assert [path.name for path in (tmp_path / "starts").iterdir()] == ["asr-quarter-1.pt"]
    start = sslprune.torch.load(tmp_path / "starts" / "asr-quarter-1.pt")
    assert start["task"] == "asr" and {w.dtype for w in start["weights"].values()} == {sslprune.torch.bfloat16}
    (log,) = (tmp_path / "runs" / "grid").rglob("1-fast-mac-0.7-1.log")
    assert str(tmp_path / "starts" / "asr-quarter-1.pt") in log.read_text()
    assert "made" not in small_grid("asr", "--only", "1-fast-dense-1-0")[1]  # it is there
    monkeypatch.setattr(grid, "START_UPDATES", {"quarter": 2})
    status, _, errors = small_grid("asr", "--only", "1-fast-dense-1-0")
    assert status == 2 and "asr-quarter-1.pt: was made from another encoder or corpus, or otherwise; remove" in errors
    (tmp_path / "tiny.pt").write_bytes(b"")
    status, _, errors = small_grid("asr", "--only", "0-fast-dense-1-0")
    assert status == 2 and "asr-quarter-0.pt: could not be made; the end of its log in" in errors


def test_the_pages_say_what_the_results_say():
    """The experiment's own page has the verdict and the tables, the main page the verdict; or says there is none."""
    page = (HERE / "README.md").read_text(encoding="utf-8")
    try:
        panels, _ = curves.read(HERE / "results.jsonl")
    except UserError:
        assert "No amount of a task is whole yet." in page
        return
    assert curves.verdict(panels) in (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert curves.report(panels) in page
    assert curves.figure(panels) == (HERE / "curve.svg").read_text(encoding="utf-8")
