"""What the experiment says: differences with intervals, the verdict on the paper's claim, and the figure.

    .venv/bin/python tests/curves.py                          # the README's, from tests/results.jsonl
    .venv/bin/python tests/curves.py runs/results.jsonl       # your own, from tests/grid.py

prints the verdict and the table, as they stand in the README, and draws curve.svg beside the results.

A point is a method at a budget. Its errors are those of all its seeds, added up for each test speaker. The interval of
a difference is a bootstrap over speakers (Bisani and Ney, ICASSP 2004): 10,000 times, as many speakers as there are are
drawn with replacement, the same ones for both points, and the difference is counted again; the interval holds the
middle 95 %. What was decided before the test set was looked at: "more accurate" is an interval below 0, and "no worse"
one that ends under MARGIN of the dense model's error.
"""

import argparse
import textwrap
from pathlib import Path

import grid
import numpy as np
from grid import UserError

from gates import KINDS

MARGIN = 0.02  # of the dense model's error
DRAWS = 10_000
METHODS = {"dense": "#000000", "mac": "#0072b2", "transformer": "#d55e00", "size": "#009e73", "sepsize": "#cc79a7"}
TASKS = {"asr": "word errors", "slu": "intents wrong"}
LESS_10_TO_30, LESS_40_TO_50, EQUAL = (0.9, 0.8, 0.7), (0.6, 0.5), (0.9, 0.7, 0.5, 0.4)  # budgets of the claims
NOT_WORSE = ("more accurate", "no worse", "worse by less than the margin")


class Point:
    """The runs of a task, method and budget, which differ in their seeds."""

    def __init__(self, results):
        self.results = sorted(results, key=lambda result: result["seed"])
        self.macs, self.params = (np.mean([r[cost] for r in results]) for cost in ("macs", "params"))
        # {seed: (speakers, numbers)}: errors, of how many; in recognition, of characters after those of words
        self.counts = {r["seed"]: np.array([r["speakers"][s] for s in sorted(r["speakers"])]) for r in self.results}

    def errors(self, which=0):
        """Part of the words or intents (0), or of the characters (1), that is wrong, for each seed."""
        sums = [counts.sum(0)[2 * which : 2 * which + 2] for counts in self.counts.values()]
        return [wrong / total for wrong, total in sums]

    def dev(self):
        """The same as errors, of the dev set, a mean."""
        metrics = [result["dev"] for result in self.results]
        return np.mean([m["word_error_rate"] if "word_error_rate" in m else 1 - m["intent_accuracy"] for m in metrics])


def difference(point, other):
    """Point's error less other's, in the seeds that both have, and its interval: (difference, lower, upper)."""
    seeds = point.counts.keys() & other.counts.keys()
    change = sum(point.counts[seed][:, 0] - other.counts[seed][:, 0] for seed in seeds)  # of each speaker
    total = sum(point.counts[seed][:, 1] for seed in seeds)
    draws = np.random.RandomState(0).multinomial(len(total), [1 / len(total)] * len(total), size=DRAWS)
    lower, upper = np.percentile(draws @ change / (draws @ total), (2.5, 97.5))
    return change.sum() / total.sum(), lower, upper


def read(path):
    """{task: {(method, budget): Point}} of a file of results. Raises UserError."""
    groups, alike = {}, {}
    for number, result in enumerate(grid.read_results(path), 1):
        try:
            task, budget, seed = result["task"], result["budget"], result["seed"]
            method = result["method"] if budget < 1 else "dense"
            test_set = {speaker: counts[1::2] for speaker, counts in result["speakers"].items()}
            same = {task: (result["inputs"], test_set, result["updates"]), (task, method == "dense"): result["flags"]}
            if method not in METHODS or task not in TASKS:
                raise ValueError(f"no such method or task: {method}, {task}")
            group = groups.setdefault(task, {}).setdefault((method, budget), {})
            if seed in group or any(alike.setdefault(key, value) != value for key, value in same.items()):
                raise UserError(
                    f"{path}, line {number}: is the same point as an earlier line, or differs from one in checkpoint,"
                    " corpus, flags or updates; remove one of them"
                )
            group[seed] = result
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: is no result of tests/grid.py ({error!r}); remove it") from error
    for task, points in groups.items():
        if ("dense", 1.0) not in points or len(points) == 1:
            raise UserError(f"{path}: has no dense reference and pruned point of {task}; tests/grid.py runs them")
    if not groups:
        raise UserError(f"{path}: has no results; tests/grid.py makes them")
    return {
        task: {key: Point(list(seeds.values())) for key, seeds in groups[task].items()}
        for task in TASKS
        if task in groups
    }


# --- Words ---------------------------------------------------------------------------------------------------------


def in_points(values):
    """A difference with its interval."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * value for value in values))


def judged(values, margin):
    """What the interval of a difference says, in words."""
    _, lower, upper = values
    if upper < 0:
        return "more accurate"
    if upper < margin:
        return "no worse" if lower <= 0 else "worse by less than the margin"
    return "worse" if lower > 0 else "not told apart"


def shown(points, others, budgets, margin, *wanted):
    """At which of these budgets a part of the claim is shown, in words. points, others: Points by budget."""
    words = {
        budget: judged(difference(points[budget], others[budget]), margin)
        for budget in budgets
        if budget in points and budget in others
    }
    where = " and ".join(f"{budget:g}" for budget, word in words.items() if word in wanted)
    each = ", ".join(f"{budget:g} {word}" for budget, word in words.items())
    return f"{f'shown at {where}' if where else 'not shown'} ({each or 'not measured'})"


def verdict(tasks):
    """What is compared, and whether each part of the paper's claim is shown, from the intervals alone."""
    heads, claims = [], {}
    for task, points in tasks.items():
        dense = points["dense", 1.0]
        error, counts = np.mean(dense.errors()), dense.counts[min(dense.counts)]
        mac, transformer = (
            {budget: p for (name, budget), p in points.items() if name == method} for method in ("mac", "transformer")
        )
        heads.append(
            f"{task.upper()}: {TASKS[task]} in % of {counts[:, 1].sum():,}, by {len(counts)} unheard speakers; the"
            f' dense model makes {100 * error:.2f}, and the margin of "no worse" is {100 * MARGIN * error:.2f} points.'
        )
        everywhere, margin = dict.fromkeys(mac, dense), MARGIN * error
        found = {
            "More accurate than dense with 10 to 30 % less computation": shown(
                mac, everywhere, LESS_10_TO_30, margin, "more accurate"
            ),
            "No worse than dense with 40 to 50 % less": shown(mac, everywhere, LESS_40_TO_50, margin, *NOT_WORSE),
            "More accurate than `transformer` at equal MACs": shown(mac, transformer, EQUAL, 0, "more accurate"),
        }
        for claim, words in found.items():
            claims.setdefault(claim, []).append(f"{task.upper()} {words}")
    lines = heads + [f"{claim}: {'; '.join(said)}." for claim, said in claims.items()]
    return "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in lines)


def table(tasks):
    """Markdown: a line for each point, by task, method and falling budget."""
    lines = [
        "| | MACs | parameters | expected channels, heads, units | wrong on dev | on test (characters) | each seed |"
        " minus dense | minus `transformer` |",
        "| --- |" + " ---: |" * 8,
    ]
    for task, points in tasks.items():
        for method, budget in sorted(points, key=lambda key: (list(METHODS).index(key[0]), -key[1])):
            p, dense, equal = (points.get(key) for key in ((method, budget), ("dense", 1.0), ("transformer", budget)))
            name = f"{task} {f'`{method}` {budget:g}' if p is not dense else method}"
            name += "" if all(r["converged"] for r in p.results) else " (not converged)"
            kept = [] if p is dense else [np.mean([r["expected"][kind] for r in p.results]) for kind in KINDS["mac"]]
            errors = [f"{100 * np.mean(p.errors(which)):.2f}" for which in range(2 if task == "asr" else 1)]
            cells = [
                name,
                f"{p.macs:.1%}",
                f"{p.params:.1%}",
                ", ".join(f"{share:.0%}" for share in kept),
                f"{100 * p.dev():.2f}",
                errors[0] + "".join(f" ({error})" for error in errors[1:]),
                ", ".join(f"{100 * error:.1f}" for error in p.errors()),
                "" if p is dense else in_points(difference(p, dense)),
                in_points(difference(p, equal)) if method == "mac" and equal else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- The figure ----------------------------------------------------------------------------------------------------


def axes(task, left, x, y, fewest, low, high):
    """SVG elements: a frame, its ticks and titles. x, y: from MACs and errors to places; what follows: their ranges."""
    step = next(s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 8)
    body = []
    for tick in np.arange(np.ceil(low / step), high / step) * step:
        body.append(f'<path d="M{left} {y(tick):.1f}h380" stroke="#ddd"/>')
        body.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.3g}</text>')
    for tick in range(10, 101, 10):
        if tick >= 100 * fewest:
            body.append(f'<text x="{x(tick / 100):.1f}" y="316" text-anchor="middle">{tick}</text>')
    return [
        *body,
        f'<rect x="{left}" y="40" width="380" height="260" fill="none" stroke="#888"/>',
        f'<text x="{left + 190}" y="22" text-anchor="middle">{task.upper()}: {TASKS[task]} on test, %</text>',
        f'<text x="{left + 190}" y="336" text-anchor="middle">MACs kept, %</text>',
    ]


def panel(task, points, left):
    """SVG elements: error on test over MACs kept, with the interval of its difference from dense about each point."""
    reference = np.mean(points["dense", 1.0].errors())
    spans = {k: [reference + v for v in difference(p, points["dense", 1.0])] for k, p in points.items()}
    low, high = min(span[1] for span in spans.values()), max(span[2] for span in spans.values())
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    fewest = min(p.macs for p in points.values()) - 0.03

    def x(macs):
        return left + 380 * (macs - fewest) / (1.02 - fewest)

    def y(error):
        return 40 + 260 * (high - error) / (high - low)

    body = axes(task, left, x, y, fewest, low, high)
    body.append(f'<path d="M{left} {y(reference):.1f}h380" stroke="#000" stroke-dasharray="4 3"/>')
    for i, (method, colour) in enumerate(METHODS.items()):
        mine = sorted((points[key].macs, span) for key, span in spans.items() if key[0] == method)
        beside = 3 * (i - 1)  # or equal MACs would lie on each other
        places = [(x(macs) + beside, *map(y, span)) for macs, span in mine]
        body += [f'<path d="M{px:.1f} {bottom:.1f}V{top:.1f}" stroke="{colour}"/>' for px, _, bottom, top in places]
        body += [f'<circle cx="{px:.1f}" cy="{at:.1f}" r="3.5" fill="{colour}"/>' for px, at, _, _ in places]
        line = " ".join(f"{px:.1f},{at:.1f}" for px, at, _, _ in places)
        body.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        if mine:
            body.append(f'<text x="{left + 80 * i}" y="360" fill="{colour}">{method}</text>')
    return body


def figure(tasks):
    body = [element for i, (task, points) in enumerate(tasks.items()) for element in panel(task, points, 50 + 450 * i)]
    width = 450 * len(tasks)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="375" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>", ""])


def report(tasks):
    """The verdict and the table, as Markdown."""
    return f"{verdict(tasks)}\n\n{table(tasks)}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).with_name("results.jsonl"))
    results = parser.parse_args().results
    try:
        tasks = read(results)
        results.with_name("curve.svg").write_text(figure(tasks))
    except (UserError, OSError) as error:
        parser.exit(2, f"curves: {error}\n")
    print(report(tasks), end="")


if __name__ == "__main__":
    main()
