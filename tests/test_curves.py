"""The experiment's statistics, worked out by hand, and that the README says what they say."""

import json
import sys
from pathlib import Path

import curves
import grid
import numpy as np
import pytest
from test_data import make_table

HERE = Path(__file__).parent


def result(errors, method="mac", budget=0.5, seed=0, task="asr", words=10, **fields):
    """A line of results.jsonl: `errors` of each speaker, in as many words."""
    return {
        "task": task,
        "name": f"{method}-{budget}-{seed}",
        "method": method,
        "budget": budget,
        "seed": seed,
        "flags": "dense" if budget == 1 else "pruned",
        "updates": {"dense": 0, "prune": 3, "finetune": 2},
        "macs": budget,
        "params": budget,
        "expected_counts": {"channels": [80, 80], "heads": [4], "units": [512]},
        "dev": {"word_error_rate": 0.3},
        "speakers": {f"s{i}": [int(e), words, int(e), 4 * words] for i, e in enumerate(errors)},
        **fields,
    }


def written(tmp_path, results):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in results))
    return path


def test_an_interval_is_paired_by_speaker():
    """Speakers differ much, the two points by one word each: nothing is uncertain about the difference."""
    errors = np.arange(50)
    ours, theirs = curves.Point([result(errors, words=100)]), curves.Point([result(errors + 1, words=100)])
    assert curves.interval(ours, theirs) == pytest.approx((-0.01, -0.01, -0.01))
    assert curves.interval(ours, theirs, 1) == pytest.approx((-1 / 400,) * 3)


def test_an_interval_is_as_wide_as_the_central_limit_says():
    draw = np.random.default_rng(0)
    ours, theirs = (curves.Point([result(draw.binomial(100, 0.2, 400), words=100)]) for _ in range(2))
    difference, lower, upper = curves.interval(ours, theirs)
    assert difference == pytest.approx(ours.error() - theirs.error())
    width = 2 * 1.96 * np.sqrt(2 * 0.2 * 0.8 / 100 / 400)
    assert upper - lower == pytest.approx(width, rel=0.1)
    assert (upper + lower) / 2 == pytest.approx(difference, abs=0.1 * width)


def test_long_speakers_weigh_more_and_seeds_are_pooled():
    few, many = [1, 10, 1, 40], [30, 90, 30, 360]
    first = result([], speakers={"a": few, "b": many})
    second = result([], seed=1, speakers={"b": [40, 90, 40, 360], "a": [3, 10, 3, 40]})
    point = curves.Point([first, second])
    assert point.error() == pytest.approx((2 + 35) / 100)
    assert point.seed_errors() == pytest.approx([0.31, 0.43])
    assert point.error(1) == pytest.approx(37 / 400)


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
        *seeds([0] * 40, budget=0.5),
        *seeds([1] * 40, budget=0.5, method="transformer"),
        *seeds([1] * 40, budget=0.7, method="transformer"),
    ]
    (points,) = curves.read(written(tmp_path, lines)).values()
    said = curves.verdict("asr", points)
    assert "4,000, of 40 speakers never heard; the dense model makes 20.00" in said
    assert "at 0.9 more accurate, -2.00 [-2.00, -2.00]; at 0.8 not told apart, +0.00 [-" in said
    assert "at 0.7 worse, +3.00 [+3.00, +3.00]; at 0.5 no worse, +0.00" in said
    assert "10 to 30 % less computation: shown at 0.9." in said
    assert "under 0.40 points, 2% of dense's error): shown at 0.5." in said
    assert "equal MACs: at 0.7 worse, +2.00 [+2.00, +2.00]; at 0.5 more accurate, -1.00" in said
    assert "More accurate than `transformer` at half of the MACs: shown at 0.5." in said
    worse = [r for r in lines if r["budget"] != 0.9 and r["method"] == "mac"]
    (points,) = curves.read(written(tmp_path, worse)).values()
    said = curves.verdict("asr", points)
    assert "30 % less computation: not shown." in said and "half of the MACs: not shown." in said
    rows = curves.table("asr", points).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["dense", "`mac` 0.8", "`mac` 0.7", "`mac` 0.5"]
    assert len({row.count("|") for row in rows}) == 1
    assert curves.figure({"asr": points, "slu": points}).count("<circle") == 2 * 4


@pytest.mark.parametrize(
    "change", [{"flags": "others"}, {"updates": {"prune": 9}}, {"speakers": {"s0": [1, 9, 1, 36]}}]
)
def test_points_that_make_no_common_curve_are_refused(tmp_path, change):
    lines = [result([1, 2], budget=budget) for budget in (1.0, 0.7, 0.5)]
    assert len(curves.read(written(tmp_path, lines))["asr"]) == 3
    lines[2] |= change
    with pytest.raises(SystemExit, match="line 3: differs from an earlier line"):
        curves.read(written(tmp_path, lines))


def test_a_grid_gathers_the_errors_of_each_speaker():
    speakers = {"a1": "ann", "a2": "ann", "b1": "bob"}
    rows = [("a1", "GO ON", "GO NO"), ("b1", "STOP", "STOP"), ("a2", "YES", "")]
    assert grid.errors_by_speaker("asr", rows, speakers) == {"ann": [2, 3, 5, 8], "bob": [0, 1, 0, 4]}
    assert grid.errors_by_speaker("slu", rows, speakers) == {"ann": [2, 2], "bob": [0, 1]}


def test_a_grid_runs_its_points_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    (tmp_path / "sslprune.py").write_text(
        f"import sys; sys.path[0] = {str(HERE.parent)!r}\nimport sslprune; sys.exit(sslprune.main())\n"
    )
    flags = "--batch-seconds 5 --dense-updates 0 --prune-updates 2 --finetune-updates 1 --evaluate-updates 0"
    monkeypatch.setattr(grid, "FLAGS", {"slu": flags})
    monkeypatch.setattr(grid, "POINTS", {"slu": [("mac", (1.0, 0.7), 1)]})
    corpus = make_table(tmp_path / "corpus")
    arguments = ["grid.py", "slu", str(corpus), "--results", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr(sys, "argv", arguments)
    grid.main()
    printed = capsys.readouterr().out
    assert "mac-0.7-0: dev intent accuracy" in printed and "2 of 2 points" in printed
    points = curves.read(tmp_path / "results.jsonl")["slu"]
    assert set(points) == {("dense", 1.0), ("mac", 0.7)}
    assert points["mac", 0.7].macs <= 0.7
    assert grid.main() == 0
    assert capsys.readouterr().out.startswith("2 of 2 points")
    monkeypatch.setattr(grid, "POINTS", {"slu": [("mac", (0.001, 0.9), 1)]})  # out of reach, which stops no other
    assert grid.main() == 2
    found = capsys.readouterr()
    assert "mac-0.001-0: has failed; the end of" in found.err and "mac-0.9-0: dev" in found.out


def test_the_readme_says_what_the_results_say(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["curves.py", "--figure", str(tmp_path / "curve.svg")])
    curves.main()
    assert capsys.readouterr().out in (HERE.parent / "README.md").read_text()
    assert (tmp_path / "curve.svg").read_text() == (HERE / "curve.svg").read_text()
