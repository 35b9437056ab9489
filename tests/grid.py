"""Runs the experiment: one model, pruned by each method to each budget, from several seeds.

    .venv/bin/python tests/grid.py asr tables/strings --jobs 2
    .venv/bin/python tests/grid.py slu tables/commands --jobs 2
    .venv/bin/python tests/grid.py asr tables/strings --only mac-0.5-0    # one point: method, budget, seed

Each point is a run of sslprune.py on one thread, in runs/grid, with the flags below. Points of which the result is in
--results already are not run again, and one that was interrupted goes on. The most important ones come first. A result
is a line: what the report says, and the errors of each test speaker, which tests/curves.py makes intervals of.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from flops import UserError  # noqa: E402

# Flags of all points of a task, of the pruned ones, and of the dense reference; README says how they were chosen on dev.
COMMON = "--batch-seconds 10 --evaluate-updates 0 --dense-updates 0 --prune-updates 1200 --finetune-updates 800"
COMMON += " --dtype bfloat16"
FLAGS = {
    "asr": f"--checkpoint tests/recogniser.pt {COMMON}",
    "slu": f"--checkpoint tests/pretrained {COMMON}",
}
PRUNED = {"asr": "--prune-lr 1e-3 --finetune-lr 1e-3", "slu": "--prune-lr 1e-3 --finetune-lr 1e-3"}
DENSE = {"asr": "--prune-lr 3e-4 --finetune-lr 3e-4", "slu": "--prune-lr 5e-4 --finetune-lr 5e-4"}
POINTS = {  # (methods, budgets, seeds), by importance; budget 1 is the dense reference
    "asr": [
        ("mac", (1.0, 0.7, 0.5), 3),
        ("transformer", (0.5, 0.7), 3),
        ("mac", (0.8, 0.9, 0.6), 3),
        ("transformer", (0.9, 0.4), 3),
        ("mac", (0.4, 0.3), 3),
        ("size", (0.5, 0.7, 0.3), 1),
        ("sepsize", (0.5, 0.7, 0.3), 1),
    ],
    "slu": [
        ("mac", (1.0, 0.7, 0.5), 3),
        ("transformer", (0.5, 0.7), 3),
        ("mac", (0.9, 0.3), 3),
        ("transformer", (0.9, 0.3), 3),
    ],
}
FIELDS = ("task", "method", "budget", "seed", "expected_counts", "converged", "updates", "train_seconds")


def points_of(task):
    """(method, budget, seed) of each point, the most important first."""
    return [
        (method, budget, seed) for method, budgets, seeds in POINTS[task] for budget in budgets for seed in range(seeds)
    ]


def name_of(method, budget, seed):
    return f"{method if budget < 1 else 'dense'}-{budget:g}-{seed}"


def errors_by_speaker(task, rows, speakers):
    """{speaker: [errors, of how many]} of words and then, of a recogniser, of characters; rows: of test.tsv."""
    found = {}
    for name, reference, hypothesis in rows:
        if task == "asr":
            pairs = [
                (data.edit_distance(*map(split, (reference, hypothesis))), len(split(reference)))
                for split in (str.split, list)
            ]
        else:
            pairs = [(int(reference != hypothesis), 1)]
        row = found.setdefault(speakers[name], [0] * 2 * len(pairs))
        for i, number in enumerate(sum(pairs, ())):
            row[i] += number
    return dict(sorted(found.items()))


def run_point(task, corpus, point, out, speakers):
    """Run a point, or go on with it, and return its result, or None where that failed."""
    method, budget, seed = point
    flags = f"{FLAGS[task]} {PRUNED[task] if budget < 1 else DENSE[task]}"
    command = [sys.executable, "sslprune.py", "--task", task, "--data", str(corpus), "--out", str(out), "--resume"]
    command += ["--method", method, "--budget", f"{budget:g}", "--seed", str(seed), *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"{out}.log", "w") as log:
        if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False).returncode:
            return None
    report = json.loads((out / "report.json").read_text())
    rows = [line.split("\t") for line in (out / "test.tsv").read_text().splitlines()[1:]]
    return {
        "name": out.name,
        "flags": flags,
        **{field: report[field] for field in FIELDS},
        **{cost: report["pruned"][cost] / report["dense"][cost] for cost in ("macs", "params")},
        "dev": report["metrics"]["pruned"]["dev"],
        "speakers": errors_by_speaker(task, rows, speakers),
    }


def read_results(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=POINTS)
    parser.add_argument("corpus", type=Path, help="folder of the corpus, as sslprune.py's --data")
    parser.add_argument(
        "--only", action="append", metavar="POINT", help="a point, such as mac-0.5-0; any number of times"
    )
    parser.add_argument("--jobs", type=int, default=1, help="points at a time (default %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "results.jsonl")
    options = parser.parse_args()
    points = {name_of(*point): point for point in points_of(options.task)}
    unknown = set(options.only or ()) - set(points)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such point; there are {', '.join(points)}")
    done = {r["name"] for r in read_results(options.results) if r["task"] == options.task}
    wanted = [name for name in points if name not in done and name in (options.only or points)]
    corpus = options.corpus.resolve()
    try:
        speakers = {u.name: u.speaker for u in data.open_corpus(corpus, options.task).test}
    except UserError as error:
        parser.exit(2, f"grid: {error}\n")
    runs = ROOT / "runs" / "grid" / options.task
    runs.mkdir(parents=True, exist_ok=True)

    def run(name):
        """Run a point and keep its result; returns whether it ended well."""
        result = run_point(options.task, corpus, points[name], runs / name, speakers)
        if result is None:
            print(f"{name}: has failed; the end of {runs / name}.log says why", file=sys.stderr, flush=True)
            return False
        with open(options.results, "a") as file:
            file.write(json.dumps(result) + "\n")
        dev = ", ".join(f"{key.replace('_', ' ')} {value:.2%}" for key, value in result["dev"].items())
        print(f"{name}: dev {dev}; {result['macs']:.1%} of the MACs; {result['train_seconds']:.0f} s", flush=True)
        return True

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        ended = list(pool.map(run, wanted))
    print(f"{len(done) + sum(ended)} of {len(points)} points are in {options.results}")
    return 0 if all(ended) else 2


if __name__ == "__main__":
    sys.exit(main())
