"""Tables and pictures of a folder of reports: error over MACs, a line for each method, and what each layer kept.

    python tests/curves.py runs/grid --out tests/curves

Reads every report.json under the folder, whatever its runs were named, and prints tables and curves as text; --out writes them as
SVG as well, with the reports' numbers in a file of their own (reports.jsonl, which takes the place of the folder next time).
Runs of one task, method and budget that differ in the seed make one point: the mean, with the lowest and the highest.
"""

import argparse
import html
import json
import signal
import statistics
from pathlib import Path

METHODS = {"dense": "#000000", "mac": "#0072b2", "transformer": "#d55e00", "size": "#009e73", "sepsize": "#cc79a7"}  # Okabe and Ito's colours
KINDS = {"channels": "conv", "heads": "heads", "units": "units"}
MARKS = {"dense": "d", "mac": "m", "transformer": "t", "size": "s", "sepsize": "x"}
WRONG = {"asr": "word errors", "slu": "intents wrong"}  # what the error of a task is
FIELDS = ("task", "method", "budget", "seed", "data", "hold_out", "checkpoint", "dtype", "updates", "expected", "converged",
          "metric", "metrics", "dense", "pruned", "train_seconds")  # of a report, that reports.jsonl has  # fmt: skip
JOINT = 0.6  # `mac` and `transformer` are compared at all budgets up to this together, too: where the frontend weighs most
TITLES = {"test": "test takes of speakers heard in training", "unseen": "a speaker never heard", "dev": "dev takes"}


def method_of(report):
    """A key of METHODS: what prunes nothing is no method's."""
    return report["method"] if report["budget"] < 1 else "dense"


class Refused(ValueError):
    """What cannot be made a curve of. The message names the report."""


ALIKE = ("data", "hold_out", "checkpoint", "dtype", "updates")  # what all runs of a task are to have in common


def read(source):
    """The reports of pruning runs, from a folder of runs or a reports.jsonl: {task: reports}. Raises Refused."""
    if source.is_dir():
        texts = {str(path): path.read_text() for path in sorted(source.rglob("report.json"))}
    elif source.is_file():
        texts = {f"{source}, line {number}": text for number, text in enumerate(source.read_text().splitlines(), 1)}
    else:
        raise Refused(f"{source}: there is no such file or folder")
    found = {}
    for name, text in texts.items():
        try:
            r = json.loads(text)
            if r["updates"]["prune"] or r["updates"]["finetune"]:
                alike = [r[key] for key in ALIKE] + [r["dense"]["shape"], sorted(r["metrics"]["pruned"])]
                key = r["task"], method_of(r), r["budget"], r["seed"]
                if key[1] not in METHODS or r["task"] not in WRONG:
                    raise ValueError(f"no task or method: {key}")
                found[name] = key, alike, {field: r[field] for field in FIELDS}
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{name}: is no whole report of sslprune ({error!r}); remove it, and run the point again") from error
    if not found:
        raise Refused(f"{source}: holds no report.json of a run that was pruned")
    models, names, tasks = {}, {}, {}
    for name, (key, alike, report) in found.items():
        known, like = models.setdefault(key[0], (name, alike))
        if alike != like:
            raise Refused(f"{name}: differs from {known} in model, splits or one of {', '.join(ALIKE)}; they make no common curve")
        if names.setdefault(key, name) != name:
            raise Refused(f"{name}: is the same point as {names[key]}; remove one")
        tasks.setdefault(key[0], []).append(report)
    return {task: tasks[task] for task in WRONG if task in tasks}


class Point:
    """The runs of one task, method and budget. A value is (mean, lowest, highest)."""

    def __init__(self, reports):
        first = reports[0]
        self.reports, self.budget = reports, first["budget"]
        self.method = method_of(first)
        self.macs, self.params, self.faster = (
            self._of(lambda r: r["pruned"]["macs"] / r["dense"]["macs"]),
            self._of(lambda r: r["pruned"]["params"] / r["dense"]["params"]),
            self._of(lambda r: r["dense"]["seconds"] / r["pruned"]["seconds"]),
        )
        self.errors = {split: self._of(lambda r, split=split: error(r, split)) for split in TITLES if split in first["metrics"]["pruned"]}

    def _of(self, value):
        values = [value(report) for report in self.reports]
        return statistics.fmean(values), min(values), max(values)

    def kept(self):
        """{(kind, layer): share that is kept, a mean}"""
        return {
            (kind, layer): statistics.fmean(r["pruned"]["shape"][kind][layer] / r["dense"]["shape"][kind][layer] for r in self.reports)
            for kind in KINDS
            for layer in range(len(self.reports[0]["dense"]["shape"][kind]))
        }


def error(report, split):
    """Word error rate, or intents wrong, as a fraction."""
    name = report["metric"]["name"]
    value = report["metrics"]["pruned"][split][name]
    return 1 - value if name.endswith("accuracy") else value


def points_of(reports):
    """{method: points by falling budget}, in the order of METHODS."""
    groups = {}
    for report in reports:
        groups.setdefault((method_of(report), report["budget"]), []).append(report)
    points = [Point(group) for _, group in sorted(groups.items(), key=lambda item: -item[0][1])]
    return {method: found for method in METHODS if (found := [p for p in points if p.method == method])}


def table(task, points):
    """Markdown: a line for each point."""
    splits = list(next(iter(points.values()))[0].errors)
    lines = [f"| method | budget | runs | MACs | parameters | faster by | {' | '.join(f'{WRONG[task]}, {split} (lowest to highest)' for split in splits)} |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(splits))
    for method, found in points.items():
        for p in found:
            errors = [f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})" for mean, low, high in p.errors.values()]
            cost = f"{100 * p.macs[0]:.1f} % | {100 * p.params[0]:.1f} % | {p.faster[0]:.2f}"
            lines.append(f"| {method} | {p.budget:g} | {len(p.reports)} | {cost} | {' | '.join(errors)} |")
    return "\n".join(lines)


def compare(points):
    """Where the claim is answered: each point of `mac` against the dense reference, and against `transformer` at the same budget.

    And against `transformer` at all budgets of at most JOINT together: for each seed, the mean over them.
    """
    lines, pairs = [], []

    def say(budget, other, split, ours, theirs):
        """ours, theirs: the error of each run."""
        apart = "within the spread"
        if min(len(ours), len(theirs)) == 1:
            apart = "a single run, so there is no spread"
        elif max(ours) < min(theirs):
            apart = "better by more than the spread"
        elif min(ours) > max(theirs):
            apart = "worse by more than the spread"
        lines.append(f"mac {budget} against {other:<11} {split:<6} {100 * (statistics.fmean(ours) - statistics.fmean(theirs)):+6.2f} points: {apart}")

    for p in points.get("mac", []):
        equals = [q for q in points.get("transformer", []) if q.budget == p.budget]
        pairs += [(p, q) for q in equals if p.budget <= JOINT]
        for other in points.get("dense", []) + equals:
            for split in p.errors:
                say(f"{p.budget:g}", other.method, split, *([error(r, split) for r in point.reports] for point in (p, other)))
    seeds = set.intersection(*({r["seed"] for r in point.reports} for pair in pairs for point in pair)) if len(pairs) > 1 else ()
    for split in pairs[0][0].errors if seeds else ():
        means = ([statistics.fmean(error(r, split) for point in side for r in point.reports if r["seed"] == seed) for seed in seeds] for side in zip(*pairs))
        say(" and ".join(f"{p.budget:g}" for p, _ in pairs), "transformer", split, *means)
    return "\n".join(lines)


def text_curve(points, split, width=60, height=15):
    """Error over MACs in characters: the mark of each method at its mean, * where several meet."""
    top = max(p.errors[split][0] for found in points.values() for p in found) * 1.05 or 0.01
    left = min(p.macs[0] for found in points.values() for p in found)
    cells = [[" "] * (width + 1) for _ in range(height + 1)]
    for method, found in points.items():
        for p in found:
            x, y = round((p.macs[0] - left) / (1 - left or 1) * width), height - round(p.errors[split][0] / top * height)
            cells[y][x] = MARKS[method] if cells[y][x] in (" ", MARKS[method]) else "*"
    lines = [f"{TITLES[split]}, error in % over MACs kept; {', '.join(f'{MARKS[m]} {m}' for m in points)}, * several"]
    lines += [f"{100 * top * (height - y) / height:5.1f} |{''.join(row).rstrip()}" for y, row in enumerate(cells)]
    return "\n".join([*lines, "      +" + "-" * width, f"       {100 * left:.0f} %{'100 %':>{width - 4}}"])


def text_kept(points):
    """What each layer kept, in % of its units, a column for each budget."""
    lines = []
    for method, found in points.items():
        found = [p for p in found if p.budget < 1]
        if found:
            kept = [p.kept() for p in found]
            lines.append(f"{method:<12}" + "".join(f"{p.budget:>6g}" for p in found))
            lines += [f"{KINDS[kind]:>9} {layer + 1:<2}" + "".join(f"{100 * k[kind, layer]:6.0f}" for k in kept) for kind, layer in kept[0]]
    return "\n".join(lines)


# --- SVG ---------------------------------------------------------------------------------------------------------------


def svg(width, height, body):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *body, "</svg>"]) + "\n"


def text(x, y, content, anchor="middle", **attributes):
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(content)}</text>'


def line(x1, y1, x2, y2, colour, width=1.0):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def ticks(top):
    """Round numbers from 0 up to `top`, some five of them."""
    step = next(step for power in (0.01, 0.1, 1, 10, 100) for step in (power, 2 * power, 5 * power) if top / step <= 6)
    return [step * i for i in range(int(top / step) + 1)]


def curve(points, task):
    """Error over MACs: a panel for each split, a line through the means of each method, bars from the lowest to the highest."""
    splits = list(next(iter(points.values()))[0].errors)
    wide, high, left, top = 380, 260, 60, 40
    body = []
    for number, split in enumerate(splits):
        x0, y0 = left + number * (wide + 70), top + high
        limit = max(p.errors[split][2] for found in points.values() for p in found) * 108 or 1  # in %
        least = min(p.macs[0] for found in points.values() for p in found)

        def x(share, x0=x0, least=least):
            return x0 + 10 + (share - least) / (1 - least or 1) * (wide - 20)

        def y(percent, y0=y0, limit=limit):
            return y0 - percent / limit * high

        body.append(text(x0 + wide / 2, top - 14, TITLES[split], font_weight="bold"))
        for tick in ticks(limit):
            body += [line(x0, y(tick), x0 + wide, y(tick), "#dddddd"), text(x0 - 6, y(tick) + 4, f"{tick:g}", "end")]
        for tick in range(10, 101, 10):
            if tick >= 100 * least:
                body += [line(x(tick / 100), y0, x(tick / 100), y0 + 4, "#000000"), text(x(tick / 100), y0 + 18, str(tick))]
        body += [line(x0, y0, x0 + wide, y0, "#000000"), line(x0, top, x0, y0, "#000000"), text(x0 + wide / 2, y0 + 36, "MACs kept, %")]
        body.append(text(x0 - 40, top + high / 2, f"{WRONG[task]}, %", transform=f"rotate(-90 {x0 - 40} {top + high / 2})"))
        for method, found in points.items():
            colour = METHODS[method]
            at = [(x(p.macs[0]), *(y(100 * value) for value in p.errors[split])) for p in found]
            if method == "dense":
                (_, mean, low, up) = at[0]
                body.append(f'<rect x="{x0}" y="{up:.1f}" width="{wide}" height="{low - up:.1f}" fill="{colour}" fill-opacity="0.12"/>')
                body.append(f'<line x1="{x0}" y1="{mean:.1f}" x2="{x0 + wide}" y2="{mean:.1f}" stroke="{colour}" stroke-dasharray="4 3"/>')
            path = " ".join(f"{px:.1f},{mean:.1f}" for px, mean, _, _ in at)
            body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            body += [line(px, low, px, up, colour) for px, _, low, up in at]
            body += [f'<circle cx="{px:.1f}" cy="{mean:.1f}" r="3.5" fill="{colour}"/>' for px, mean, _, _ in at]
    for number, method in enumerate(points):
        place = left + 110 * number
        body += [line(place, top + high + 58, place + 20, top + high + 58, METHODS[method], 2), text(place + 26, top + high + 62, method, "start")]
    return svg(left + max(len(splits) * (wide + 70) - 40, 110 * len(points)), top + high + 76, body)


def kept_picture(tasks):
    """What each layer kept: a block for each task and method, a row for each layer, a column for each budget; darker is more."""
    body, cell, row, x0, bottom = [], 40, 17, 20, 0
    for task, points in tasks.items():
        for method, found in points.items():
            found = [p for p in found if p.budget < 1]
            if not found:
                continue
            kept = [p.kept() for p in found]
            body.append(text(x0 + 58, 20, f"{task}, {method}", "start", font_weight="bold"))
            for column, p in enumerate(found):
                body.append(text(x0 + 58 + cell * (column + 0.5), 38, f"{p.budget:g}"))
            y0, before = 44, None
            for kind, layer in kept[0]:
                y0 += 8 * (before not in (None, kind))
                before = kind
                body.append(text(x0 + 52, y0 + 12, f"{KINDS[kind]} {layer + 1}", "end"))
                for column, shares in enumerate(kept):
                    share = shares[kind, layer]
                    grey = round(255 - 200 * share)
                    place = x0 + 58 + cell * column
                    body.append(f'<rect x="{place}" y="{y0}" width="{cell - 1}" height="{row - 1}" fill="rgb({grey},{grey},255)"/>')
                    body.append(text(place + cell / 2, y0 + 12, f"{100 * share:.0f}", fill="#ffffff" if share > 0.6 else "#000000", font_size=10))
                y0 += row
            bottom = max(bottom, y0)
            x0 += 58 + cell * len(found) + 24
    return svg(x0, bottom + 16, body)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, help="folder of runs, or a reports.jsonl")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: none are written)")
    options = parser.parse_args()
    if options.out and options.out.exists() and not options.out.is_dir():
        parser.error(f"{options.out}: a file stands where --out needs a folder")
    try:
        reports = read(options.reports)
    except (Refused, OSError, UnicodeDecodeError) as error:
        parser.error(error)
    tasks = {task: points_of(found) for task, found in reports.items()}
    for task, points in tasks.items():
        print(f"{task}\n\n{table(task, points)}\n\n{compare(points)}\n")
        for split in next(iter(points.values()))[0].errors:
            print(text_curve(points, split), end="\n\n")
        print(f"what each layer kept, in %\n{text_kept(points)}\n")
    reports = [r for found in reports.values() for r in found]
    loose = [f"{r['task']} {r['method']} {r['budget']:g} seed {r['seed']}" for r in reports if not r["converged"]]
    print(f"constraint not converged: {', '.join(loose) or 'nowhere'}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for task, points in tasks.items():
            (options.out / f"{task}.svg").write_text(curve(points, task))
        (options.out / "kept.svg").write_text(kept_picture(tasks))
        (options.out / "reports.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without a word
    main()
