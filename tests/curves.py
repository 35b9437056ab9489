"""What the experiment says: differences with intervals, the verdict on the paper's claim, and the figure.

    .venv/bin/python tests/curves.py

reads tests/results.jsonl, which tests/grid.py wrote, prints the README's table and verdict (whole, between two comments
in it), and draws tests/curve.svg. Nothing of the three is written by hand.

A point is a method at a budget; its error is that of all its seeds together. The intervals are those of a bootstrap
over test speakers (Bisani and Ney, ICASSP 2004): 10,000 times, as many speakers as there are are drawn with
replacement, the same ones for both points of a difference, whose errors are counted again; 2.5 % of these differences
are below the interval and 2.5 % above. What was decided before the test set was looked at: "more accurate" is an
interval below 0, "no worse" one that stays under MARGIN of the dense model's error.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from flops import SMALL  # noqa: E402

MARGIN = 0.02  # of the dense model's error
DRAWS = 10_000
METHODS = {"dense": "#000000", "mac": "#0072b2", "transformer": "#d55e00", "size": "#009e73", "sepsize": "#cc79a7"}
TASKS = {"asr": "word errors", "slu": "intents wrong"}
TENTHS, HALVES = (0.9, 0.8, 0.7), (0.6, 0.5)  # "10 to 30 % less computation", "40 to 50 % less"


class Point:
    """The runs of a task, method and budget, which differ in their seeds."""

    def __init__(self, results):
        self.results = results
        self.macs, self.params = (np.mean([r[cost] for r in results]) for cost in ("macs", "params"))
        # (seeds, speakers, numbers): errors and of how many; for speech recognition, of characters after those of words
        self.by_seed = np.array([[r["speakers"][name] for name in sorted(r["speakers"])] for r in results], float)
        self.counts = self.by_seed.mean(0)

    def error(self, which=0):
        """Of words or intents (0), or of characters (1), a fraction."""
        errors, total = self.counts[:, 2 * which : 2 * which + 2].sum(0)
        return errors / total

    def seed_errors(self):
        return self.by_seed[:, :, 0].sum(1) / self.by_seed[:, :, 1].sum(1)

    def dev_error(self):
        dev = [next(iter(r["dev"].values())) for r in self.results]
        return np.mean(dev if "word_error_rate" in self.results[0]["dev"] else np.subtract(1, dev))

    def kept(self, kind):
        """The share of a kind's units that gates were expected to keep when the pruning phase ended."""
        return np.mean([sum(r["expected_counts"][kind]) for r in self.results]) / sum(getattr(SMALL, kind))


def interval(point, other, which=0):
    """Point's error less other's: (difference, lower, upper), the last two a 95 % interval over speakers."""
    ours, theirs, total = point.counts[:, 2 * which], other.counts[:, 2 * which], point.counts[:, 2 * which + 1]
    speakers = len(total)
    weights = np.random.RandomState(0).multinomial(speakers, [1 / speakers] * speakers, size=DRAWS)
    differences = weights @ (ours - theirs) / (weights @ total)
    return (ours - theirs).sum() / total.sum(), *np.percentile(differences, (2.5, 97.5))


def read(path):
    """{task: {(method, budget): Point}} of the file of results."""
    groups, alike = {}, {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        result = json.loads(line)
        of = {speaker: counts[1::2] for speaker, counts in result["speakers"].items()}
        kind = (result["task"], result["budget"] < 1)
        for known, value in ((kind, result["flags"]), (result["task"], (of, sum(result["updates"].values())))):
            if alike.setdefault(known, value) != value:
                raise SystemExit(f"{path}, line {number}: differs from an earlier line in flags, updates or test set")
        point = result["method"] if result["budget"] < 1 else "dense", result["budget"]
        groups.setdefault(result["task"], {}).setdefault(point, []).append(result)
    return {task: {key: Point(found) for key, found in points.items()} for task, points in groups.items()}


# --- Words ---------------------------------------------------------------------------------------------------------


def in_points(values):
    """A difference with its interval."""
    difference, lower, upper = (100 * value for value in values)
    return f"{difference:+.2f} [{lower:+.2f}, {upper:+.2f}]"


def table(task, points):
    """Markdown: a line for each point, by method and falling budget."""
    dense = points["dense", 1.0]
    characters = dense.counts.shape[1] > 2
    test = "test (characters)" if characters else "test"
    lines = [
        f"| {task} | MACs | parameters | channels, heads, units | {TASKS[task]}, dev | {test} | each seed |"
        " minus dense | minus `transformer` |",
        "| --- |" + " ---: |" * 8,
    ]
    for (method, budget), p in sorted(points.items(), key=lambda item: (list(METHODS).index(item[0][0]), -item[0][1])):
        cells = ["dense" if method == "dense" else f"`{method}` {budget:g}", f"{p.macs:.1%}", f"{p.params:.1%}"]
        cells.append(
            "" if method == "dense" else ", ".join(f"{p.kept(kind):.0%}" for kind in ("channels", "heads", "units"))
        )
        cells.append(f"{100 * p.dev_error():.2f}")
        cells.append(f"{100 * p.error():.2f}" + (f" ({100 * p.error(1):.2f})" if characters else ""))
        cells.append(", ".join(f"{100 * error:.1f}" for error in p.seed_errors()))
        cells.append("" if method == "dense" else in_points(interval(p, dense)))
        equal = points.get(("transformer", budget)) if method == "mac" else None
        cells.append(in_points(interval(p, equal)) if equal else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def judged(values, margin):
    """What an interval of a difference says, in words."""
    _, lower, upper = values
    return (
        "more accurate" if upper < 0 else "no worse" if upper < margin else "worse" if lower > 0 else "not told apart"
    )


def verdict(task, points):
    """Sentences on `mac` and on each part of the paper's claim, from the intervals alone."""
    dense = points["dense", 1.0]
    margin = MARGIN * dense.error()
    budgets = sorted((budget for method, budget in points if method == "mac"), reverse=True)
    than_dense = {b: interval(points["mac", b], dense) for b in budgets}
    than_other = {
        b: interval(points["mac", b], points["transformer", b]) for b in budgets if ("transformer", b) in points
    }
    said = [{b: judged(v, margin) for b, v in values.items()} for values in (than_dense, than_other)]

    def spelt(values, words):
        return "; ".join(f"at {b:g} {words[b]}, {in_points(v)}" for b, v in values.items()) or "no point"

    def shown(words, wanted, asked):
        found = [f"{b:g}" for b, word in words.items() if b in asked and word in wanted]
        return f"shown at {', '.join(found)}" if found else "not shown"

    sentences = [
        f"`mac` against dense: {spelt(than_dense, said[0])}.",
        f"`mac` against `transformer` at equal MACs: {spelt(than_other, said[1])}.",
        f"More accurate than dense with 10 to 30 % less computation: {shown(said[0], {'more accurate'}, TENTHS)}.",
        f"No worse than dense with 40 to 50 % less (by under {100 * margin:.2f} points, {MARGIN:.0%} of dense's error):"
        f" {shown(said[0], {'more accurate', 'no worse'}, HALVES)}.",
        f"More accurate than `transformer` at half of the MACs: {shown(said[1], {'more accurate'}, (0.5,))}.",
    ]
    speakers, total = len(dense.counts), dense.counts[:, 1].sum()
    head = f"{task.upper()}: {TASKS[task]} in % of {total:,.0f}, of {speakers} speakers never heard;"
    head += f" the dense model makes {100 * dense.error():.2f}."
    return "\n".join([head, "", *(f"- {sentence}" for sentence in sentences)])


# --- The figure ----------------------------------------------------------------------------------------------------


def panel(task, points, left):
    """SVG elements: error on test over MACs kept, with the interval of its difference from dense about each point."""
    dense = points["dense", 1.0]
    spans = {
        key: (dense.error(),) * 2 if key[0] == "dense" else [dense.error() + v for v in interval(p, dense)[1:]]
        for key, p in points.items()
    }
    low, high = min(lower for lower, _ in spans.values()), max(upper for _, upper in spans.values())
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    fewest = min(p.macs for p in points.values()) - 0.03

    def x(macs):
        return left + 380 * (macs - fewest) / (1.02 - fewest)

    def y(error):
        return 40 + 260 * (high - error) / (high - low)

    body = [
        f'<text x="{left + 190}" y="22" text-anchor="middle">{task.upper()}: {TASKS[task]} on test, %</text>',
        f'<rect x="{left}" y="40" width="380" height="260" fill="none" stroke="#888"/>',
        f'<path d="M{left} {y(dense.error()):.1f}h380" stroke="#000" stroke-dasharray="4 3"/>',
        f'<text x="{left + 190}" y="336" text-anchor="middle">MACs kept, %</text>',
    ]
    body += [
        f'<text x="{x(t / 100):.1f}" y="316" text-anchor="middle">{t}</text>'
        for t in range(10, 101, 10)
        if t >= 100 * fewest
    ]
    step = next(s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1) if (high - low) / s <= 8)
    for tick in np.arange(np.ceil(low / step), high / step) * step:
        body.append(
            f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g}</text>'.replace("999999", "")
        )
        body.append(f'<path d="M{left} {y(tick):.1f}h380" stroke="#ddd"/>')
    for i, (method, colour) in enumerate(METHODS.items()):
        keys = sorted((key for key in points if key[0] == method), key=lambda key: -points[key].macs)
        at = {key: f"{x(points[key].macs):.1f},{y(points[key].error()):.1f}" for key in keys}
        body += [
            f'<circle cx="{a.split(",")[0]}" cy="{a.split(",")[1]}" r="3.5" fill="{colour}"/>' for a in at.values()
        ]
        body += [
            f'<path d="M{a.split(",")[0]} {y(spans[k][0]):.1f}V{y(spans[k][1]):.1f}" stroke="{colour}"/>'
            for k, a in at.items()
        ]
        body.append(f'<polyline points="{" ".join(at.values())}" fill="none" stroke="{colour}"/>')
        if keys:
            body.append(f'<text x="{left + 80 * i}" y="360" fill="{colour}">{method}</text>')
    return body


def figure(tasks):
    body = [element for i, (task, points) in enumerate(tasks.items()) for element in panel(task, points, 50 + 450 * i)]
    width = 450 * len(tasks)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="375" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "results.jsonl")
    parser.add_argument("--figure", type=Path, default=HERE / "curve.svg")
    options = parser.parse_args()
    tasks = read(options.results)
    print(
        "\n\n".join(
            [verdict(task, points) for task, points in tasks.items()] + [table(*item) for item in tasks.items()]
        )
    )
    options.figure.write_text(figure(tasks))


if __name__ == "__main__":
    main()
