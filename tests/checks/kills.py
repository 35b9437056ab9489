"""Kill a run at random moments, resume it each time, and compare what it leaves with a run that was never disturbed.

    python tests/checks/kills.py           # 20 kills (SIGKILL) of a short run on the demo corpus, some ten minutes
    python tests/checks/kills.py --kills 5 -- --task slu --budget 0.5 --method sepsize --dense-updates 60 ...

Both runs are processes of their own, with the flags after `--`. Equal must be model.pt and dense.pt to the last bit,
and report.json but for its times.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAIN = Path(__file__).parents[2] / "sslprune.py"
FLAGS = (
    "--task asr --budget 0.5 --dense-updates 350 --prune-updates 350 --finetune-updates 300"
    " --layer-drop 0.1 --time-mask 0.2 --channel-mask 0.2"
).split()


def start(out, flags):
    command = [sys.executable, str(MAIN), *flags, "--out", str(out), "--resume", "--save-seconds", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def result(out):
    """What the run left, without the times."""
    report = json.loads((out / "report.json").read_text())
    for part, key in ((report, "train_seconds"), (report["dense"], "seconds"), (report["pruned"], "seconds")):
        del part[key]
    return report, *((out / name).read_bytes() for name in ("model.pt", "dense.pt") if (out / name).exists())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", default=FLAGS)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        begin = time.monotonic()
        process = start(whole, arguments.flags)
        printed, _ = process.communicate()
        if process.returncode:
            sys.exit(printed)
        seconds = time.monotonic() - begin
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        kills = 0
        while True:
            process = start(killed, arguments.flags)
            # So that the deaths are spread over the whole run: each life begins with five seconds of imports.
            wait = rng.uniform(0, 2 * (5 + 0.4 * seconds / arguments.kills)) if kills < arguments.kills else None
            try:
                printed, _ = process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                process.kill()
                printed, _ = process.communicate()
                kills += 1
                print(f"kill {kills} after {wait:4.1f} s: {(printed.splitlines() or ['no word'])[-1]}", flush=True)
                continue
            if process.returncode:
                sys.exit(printed)
            break
        same = result(whole) == result(killed)
    if kills < arguments.kills:
        sys.exit(f"the run ended after {kills} kills; give it more updates")
    print(f"{kills} kills: the results are {'the same, bit for bit' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
