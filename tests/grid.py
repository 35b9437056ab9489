"""The experiment behind the README's curves: each method at each budget, from one dense model per task, on spoken digits.

    python tests/grid.py --data free-spoken-digit-dataset --dense tests/curves/dense.pt --background  # hours; the same command again goes on
    python tests/grid.py --data free-spoken-digit-dataset --dense tests/curves/dense.pt --only asr/mac-0.5-seed0  # minutes: this point

All runs are sslprune.py's, each in a folder of its own in --out, and train without the speaker of --hold-out, so that each report
has the error on the test takes of the others and on a speaker who was never heard. A dense model is trained for recognition, and
from its encoder one for understanding: some thousand single digits are too few to begin with. --dense takes the former from a file
instead. tests/curves/dense.pt is the one behind the README's curves, runs/grid/asr/origin/dense.pt of a grid without --dense, with

    contents["weights"] = {key: tensor.bfloat16() for key, tensor in contents["weights"].items()}

to halve the file. A point trains from its task's dense model for the same number of updates in all; at budget 1.0, the reference,
without pruning. What a method cannot reach is left out. tests/curves.py makes tables and pictures of what is there, also while the grid is running.
"""

import argparse
import fcntl
import functools
import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from flops import SMALL
from gates import BudgetError, check_budget
from sslprune import load, write
from transformer import CheckpointError

MAIN = HERE.parent / "sslprune.py"
SEVEN, FOUR, THREE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), (0.9, 0.7, 0.5, 0.3), (0.7, 0.5, 0.3)
POINTS = {  # task: {method: (budgets, seeds)}
    "asr": {"mac": ((1.0, *SEVEN), 3), "transformer": (SEVEN, 3), "size": (THREE, 1), "sepsize": (THREE, 1)},
    "slu": {"mac": ((1.0, *FOUR), 3), "transformer": (FOUR, 3)},
}
RECIPE = ["--mask-probability", "0.1", "--speed-perturbation", "0.15", "--filter-decibels", "6", "--dtype", "bfloat16"]
ORIGIN = {"asr": ["--dense-updates", "12000"], "slu": ["--dense-updates", "1000"]}  # updates of the dense models
LATER = ["--prune-lr", "5e-4", "--finetune-lr", "5e-4"]
POINT = {  # of a point
    "asr": ["--prune-updates", "500", "--finetune-updates", "750", *LATER],
    "slu": ["--prune-updates", "300", "--finetune-updates", "450", *LATER],
}


def points():
    """Name and flags of each run, the first seed of all of them first, so that there is soon something of everything."""
    for seed in range(3):
        for task, methods in POINTS.items():
            for method, (budgets, seeds) in methods.items():
                for budget in budgets if seed < seeds else ():
                    try:
                        check_budget(SMALL, method, budget)
                    except BudgetError:
                        continue
                    name = f"{task}/{'dense' if budget == 1 else method}-{budget:g}-seed{seed}"
                    yield name, ["--task", task, "--method", method, "--budget", str(budget), "--seed", str(seed), *POINT[task]]


def work(options, chosen, lock):
    """Run what has not run yet; returns how many of the chosen points are there then."""
    shared = ["--data", options.data, "--hold-out", options.hold_out, "--resume"]

    def run(name, flags, threads):
        """Whether the run has come to its end, now or before."""
        out, begin = options.out / name, time.monotonic()
        command = [sys.executable, str(MAIN), *RECIPE, *flags, *shared, "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        ended = subprocess.run(command, check=False, env=environment, pass_fds=[lock], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = ended.stdout.strip().splitlines() or ["no word"]
        minutes, seconds = divmod(round(time.monotonic() - begin), 60)
        outcome = "done" if ended.returncode == 0 else f"exit status {ended.returncode}: {said[-1]}"
        print(f"{name}  {minutes}:{seconds:02}  {outcome}", flush=True)
        return ended.returncode == 0

    @functools.cache
    def origin(task):
        """The dense model of a task; None where it could not be trained."""
        if task == "asr" and options.dense:
            return options.dense
        flags = ["--task", task, "--budget", "1.0", "--prune-updates", "0", "--finetune-updates", "0", *ORIGIN[task]]
        if task == "slu":
            encoder = origin("asr")
            if encoder is None:
                return None
            flags += ["--checkpoint", str(encoder)]
        return options.out / task / "origin" / "dense.pt" if run(f"{task}/origin", flags, os.cpu_count()) else None

    threads = max(1, os.cpu_count() // options.jobs)  # of a point, however many are chosen, since its result depends on it
    with ThreadPoolExecutor(options.jobs) as pool:  # dense models in it too: Ctrl-C reaches what runs there, which then saves itself
        origins = {task: pool.submit(origin, task).result() for task in POINTS if any(name.startswith(task) for name in chosen)}
        ready = [name for name in chosen if origins[name.split("/")[0]]]
        ended = list(pool.map(lambda name: run(name, [*chosen[name], "--checkpoint", str(origins[name.split("/")[0]])], threads), ready))
    return sum(ended)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder of the Free Spoken Digit Dataset")
    parser.add_argument("--out", type=Path, default=Path("runs/grid"), help="folder of the runs (default %(default)s)")
    dense = "dense model to begin with, trained for recognition without the speaker of --hold-out (default: train it, half an hour)"
    parser.add_argument("--dense", type=Path, metavar="FILE", help=dense)
    parser.add_argument("--hold-out", default="lucas", metavar="SPEAKER", help="(default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, which share the cores (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="POINT", help="as in asr/mac-0.5-seed0 (default: all)")
    parser.add_argument("--background", action="store_true", help="go on without this terminal; grid.log in --out has what is said")
    options = parser.parse_args()

    if not Path(options.data, "recordings").is_dir():
        parser.error(f"{options.data}: holds no recordings/; --data takes the folder of the Free Spoken Digit Dataset")
    given = f"--data {options.data} --hold-out {options.hold_out}"
    if options.dense:
        try:
            model = load(options.dense)
        except CheckpointError as error:
            parser.error(str(error))
        if (model.task, model.encoder.shape) != ("asr", SMALL):
            parser.error(f"{options.dense}: is no small dense model for recognition; give a dense.pt that the grid trained")
        given += f" --dense {options.dense} (SHA-256 {hashlib.sha256(options.dense.read_bytes()).hexdigest()[:16]})"
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: give at least 1")
    chosen = dict(points())
    if options.only:
        unknown = set(options.only) - set(chosen)
        if unknown:
            parser.error(f"no such point: {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in options.only}
    if any(path.exists() and not path.is_dir() for path in (options.out, *options.out.parents)):
        parser.error(f"{options.out}: a file stands where --out needs a folder")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "lock").open("w") as lock:  # the runs inherit it, and hold it as long as one of them lives
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            parser.error(f"{options.out}: a grid is running there")
        begun = options.out / "begun.txt"
        if not begun.exists():
            write(begun, given.encode())
        elif begun.read_text() != given:  # points of another origin, or another speaker, could not be compared
            parser.error(f"{options.out}: was begun with {begun.read_text()}; do so again, or give another --out")
        if options.background and (process := os.fork()):
            print(f"in the background; {options.out / 'grid.log'} has what is said, and kill -- -{process} stops it")
            return 0
        if options.background:
            os.setsid()
            with open(options.out / "grid.log", "a") as file, open(os.devnull) as nothing:
                for stream, number in ((nothing, 0), (file, 1), (file, 2)):
                    os.dup2(stream.fileno(), number)
        try:
            ended = work(options, chosen, lock.fileno())
        except KeyboardInterrupt:
            parser.exit(130, "stopped; the same command goes on\n")
    print(f"{ended} of {len(chosen)} points are there", flush=True)
    return 0 if ended == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
