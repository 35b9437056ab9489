"""What the experiment says: differences with intervals, the verdict on the paper's claim, and the figure.

    .venv/bin/python tests/experiment/curves.py                     # the page's, from results.jsonl
    .venv/bin/python tests/experiment/curves.py runs/results.jsonl  # your own, from grid.py
    .venv/bin/python tests/experiment/curves.py --draw-seeds        # intervals that are also over the seeds

prints the verdict and the table, as they stand in the README, and draws curve.svg beside the results.

A point is a method at a budget. Its errors are those of all its seeds, added up for each test speaker. The interval of
a difference is a bootstrap over speakers (Bisani and Ney, ICASSP 2004): 10,000 times, as many speakers as there are are
drawn with replacement, the same ones for both points, and the difference is counted again; the interval holds the
middle 95 %. With --draw-seeds the seeds are drawn so, too. What the words of `judged` mean, and MARGIN, were fixed
before the test set was looked at.
"""

import argparse
import functools
import textwrap
from pathlib import Path

import grid
import numpy as np
from grid import UserError

from gates import KINDS

MARGIN = 0.02  # of the dense model's error
DRAWS = 10_000
METHODS = {  # in the figure
    "dense": ("#000000", "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z"),
    "mac": ("#0072b2", "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z"),
    "transformer": ("#d55e00", "M-3.2-3.2h6.4v6.4h-6.4Z"),
    "size": ("#009e73", "M0-4.6L4.6 0L0 4.6L-4.6 0Z"),
    "sepsize": ("#cc79a7", "M0-4.8L4.4 3.2H-4.4Z"),
}
TASKS = {"asr": "word errors", "slu": "intents wrong"}
MORE_ACCURATE, NO_WORSE, LITTLE_WORSE = "more accurate", "no worse", "worse by less than the margin"
SHOWS_BETTER, SHOWS_NO_WORSE = {MORE_ACCURATE}, {MORE_ACCURATE, NO_WORSE, LITTLE_WORSE}
CLAIMS = [  # (the claim, what is compared with what, at which budgets, which words show it)
    ("`mac` more accurate than dense with 10 to 30 % less", "mac", "dense", (0.9, 0.8, 0.7), SHOWS_BETTER),
    ("`mac` no worse than dense with 40 to 50 % less", "mac", "dense", (0.6, 0.5), SHOWS_NO_WORSE),
    ("`mac` more accurate than `transformer`", "mac", "transformer", (0.9, 0.7, 0.5, 0.4), SHOWS_BETTER),
    ("`transformer` against dense, which is no claim", "transformer", "dense", (0.9, 0.7, 0.5, 0.4), None),
]


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


@functools.cache
def drawn(*sizes):
    """How often each of so many speakers, and each of so many seeds, is drawn: (DRAWS, size) each, always the same."""
    random = np.random.RandomState(0)
    return [random.multinomial(size, [1 / size] * size, size=DRAWS) for size in sizes]


def difference(point, other, draw_seeds=False):
    """Point's error less other's, in the seeds that both have, and its interval: (difference, lower, upper).

    None where one of them is None, or they have no seed in common.
    """
    seeds = point.counts.keys() & other.counts.keys() if point and other else None
    if not seeds:
        return None
    changes = np.array([point.counts[seed][:, 0] - other.counts[seed][:, 0] for seed in seeds])  # (seeds, speakers)
    total = point.counts[min(seeds)][:, 1]  # of a seed; every one has the same test set
    speakers, draws = drawn(len(total), len(seeds))
    errors = (speakers @ changes.T * (draws if draw_seeds else 1)).sum(1)
    lower, upper = np.percentile(errors / (speakers @ total * len(seeds)), (2.5, 97.5))
    return changes.sum() / (total.sum() * len(seeds)), lower, upper


def read(path):
    """{task: {(method, budget): Point}} of a file of results. Raises UserError."""
    groups, alike = {task: {} for task in TASKS}, {}
    for number, result in enumerate(grid.read_results(path), 1):
        task, budget, seed = result["task"], result["budget"], result["seed"]
        method = result["method"] if budget < 1 else "dense"
        test_set = {speaker: counts[1::2] for speaker, counts in result["speakers"].items()}
        same = {task: (result["inputs"], test_set, result["updates"]), (task, method == "dense"): result["flags"]}
        group = groups[task].setdefault((method, budget), {})
        if seed in group or any(alike.setdefault(key, value) != value for key, value in same.items()):
            raise UserError(
                f"{path}, line {number}: is the same point as an earlier line, or differs from one in checkpoint,"
                " corpus, flags or updates; remove one of them"
            )
        group[seed] = result
    if not any(groups.values()):
        raise UserError(f"{path}: has no results; tests/experiment/grid.py makes them")
    for task, points in groups.items():
        if points and (("dense", 1.0) not in points or len(points) == 1):
            raise UserError(f"{path}: has no dense reference and pruned point of {task}; grid.py runs them")
    return {
        task: {key: Point(list(seeds.values())) for key, seeds in points.items()}
        for task, points in groups.items()
        if points
    }


# --- Words ---------------------------------------------------------------------------------------------------------


def in_points(values):
    """A difference with its interval."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * value for value in values)) if values else ""


def judged(values, margin):
    """What the interval of a difference says, in words."""
    if values is None:
        return "not measured"
    _, lower, upper = values
    if upper < 0:
        return MORE_ACCURATE
    if upper < margin:
        return NO_WORSE if lower <= 0 else LITTLE_WORSE
    return "worse" if lower > 0 else "not told apart"


def compared(points, method, other, budgets, draw_seeds):
    """{budget: what the interval says}; with a margin where the other is dense."""
    dense, found = points["dense", 1.0], {}
    for budget in budgets:
        against = dense if other == "dense" else points.get((other, budget))
        margin = MARGIN * np.mean(dense.errors()) if other == "dense" else 0
        found[budget] = judged(difference(points.get((method, budget)), against, draw_seeds), margin)
    return found


def verdict(tasks, draw_seeds=False):
    """What is compared, and whether each part of the paper's claim is shown, from the intervals alone."""
    heads = []
    for task, points in tasks.items():
        dense = points["dense", 1.0]
        error, counts = 100 * np.mean(dense.errors()), dense.counts[min(dense.counts)]
        of = f"of {counts[:, 1].sum():,}, by {len(counts)} speakers; margin {MARGIN * error:.2f} points"
        heads.append(f"{task.upper()} {error:.2f} % {TASKS[task]} ({of})")
    lines = [f"Dense on test: {'; '.join(heads)}."]
    for claim, method, other, budgets, wanted in CLAIMS:
        said = []
        for task, points in tasks.items():
            words = compared(points, method, other, budgets, draw_seeds)
            each = ", ".join(f"{budget:g} {word}" for budget, word in words.items())
            if wanted:
                where = " and ".join(f"{budget:g}" for budget, word in words.items() if word in wanted)
                each = f"{f'shown at {where}' if where else 'not shown'} ({each})"
            said.append(f"{task.upper()} {each}")
        lines.append(f"{claim}: {'; '.join(said)}.")
    return "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in lines)


def table(tasks, draw_seeds=False):
    """Markdown: a line for each point, by task, method and falling budget."""
    lines = [
        "| wrong, in % | MACs | parameters | expected channels, heads, units | on dev | on test (characters) |"
        " each seed | minus dense | minus `transformer` |",
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
                "" if p is dense else in_points(difference(p, dense, draw_seeds)),
                in_points(difference(p, equal, draw_seeds)) if method == "mac" else "",
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


def sign(method, x, y):
    """An SVG element: a method's sign about a place."""
    colour, path = METHODS[method]
    return f'<path class="{method}" transform="translate({x:.2f} {y:.2f})" d="{path}" fill="{colour}"/>'


def panel(task, points, left):
    """SVG elements: error on test over MACs kept, as the table has them, each with an interval about it.

    The interval is that of its difference from dense. Points of one seed are compared with that seed of dense, and so
    the line of dashes, all seeds of dense, is not what it is to be held against.
    """
    reference = np.mean(points["dense", 1.0].errors())
    spans = {}  # error, and the ends of the interval
    for key, p in points.items():
        if found := difference(p, points["dense", 1.0]):
            spans[key] = [np.mean(p.errors()) + value - found[0] for value in found]
    low, high = min(span[1] for span in spans.values()), max(span[2] for span in spans.values())
    margin = 0.05 * max(high - low, 0.01)
    low, high = low - margin, high + margin
    fewest = min(p.macs for p in points.values()) - 0.03

    def x(macs):
        return left + 380 * (macs - fewest) / (1.02 - fewest)

    def y(error):
        return 40 + 260 * (high - error) / (high - low)

    body = axes(task, left, x, y, fewest, low, high)
    body.append(f'<path d="M{left} {y(reference):.1f}h380" stroke="#000" stroke-dasharray="4 3"/>')
    for i, (method, (colour, _)) in enumerate(METHODS.items()):
        mine = sorted((points[key].macs, span) for key, span in spans.items() if key[0] == method)
        places = [(x(macs), *map(y, span)) for macs, span in mine]
        # Where MACs are equal, intervals lie on each other: thin and half transparent, both are seen.
        line = f'stroke="{colour}" stroke-opacity="0.6"'
        body += [f'<path d="M{px:.1f} {bottom:.1f}V{top:.1f}" {line}/>' for px, _, bottom, top in places]
        through = " ".join(f"{px:.1f},{at:.1f}" for px, at, *_ in places)
        body.append(f'<polyline points="{through}" fill="none" {line}/>')
        body += [sign(method, px, at) for px, at, *_ in places]
        if mine:
            body.append(sign(method, left + 80 * i + 4, 356))
            body.append(f'<text x="{left + 80 * i + 13}" y="360" fill="{colour}">{method}</text>')
    return [f'<g id="{task}">', *body, "</g>"]


def figure(tasks):
    body = [element for i, (task, points) in enumerate(tasks.items()) for element in panel(task, points, 50 + 450 * i)]
    width = 450 * len(tasks)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="375" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>", ""])


def report(tasks, draw_seeds=False):
    """The verdict and the table, as Markdown."""
    return f"{verdict(tasks, draw_seeds)}\n\n{table(tasks, draw_seeds)}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"curves: {message}\n")
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--draw-seeds", action="store_true", help="intervals over speakers and seeds")
    options = parser.parse_args()
    try:
        tasks = read(options.results)
        options.results.with_name("curve.svg").write_text(figure(tasks))
    except (UserError, OSError) as error:
        parser.error(error)
    print(report(tasks, options.draw_seeds), end="")


if __name__ == "__main__":
    main()
