"""A corpus of 30,000 files: how long a run takes to start, and whether its memory grows with the epochs (Linux).

    python tests/checks/scale.py                    # some five minutes; 300 MB in the folder for temporary files

The files are half a second of noise each, in LibriSpeech's layout; the model is the tests' tiny one, so that what is
measured is the handling of data. Memory is the resident memory of the process that trains, after the first and the last
epoch.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import TINY

import data
import sslprune


def make_corpus(root, count):
    """LibriSpeech's layout: a chapter of 100 utterances in each folder."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 16_000).astype(np.float32)
    for subset, size in (("train-clean-100", count), ("dev-clean", 100), ("test-clean", 100)):
        for start in range(0, size, 100):
            folder = root / subset / str(start) / "1"
            folder.mkdir(parents=True)
            names = [f"{start}-1-{i:04}" for i in range(100)]
            for name in names:
                begin = rng.integers(8_000)
                soundfile.write(folder / f"{name}.flac", noise[begin : begin + rng.integers(6_000, 8_000)], 16_000)
            (folder / f"{start}-1.trans.txt").write_text("".join(f"{name} GO ON\n" for name in names))


def megabytes():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=30_000)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    sslprune.SMALL = replace(TINY, units=(60,) * 3)
    training_batches, begin, epochs = data.training_batches, time.monotonic(), 0

    class Enough(BaseException):
        pass

    def spy(*given):  # called once in each epoch of training, before its first update
        nonlocal epochs
        if epochs == 0:
            print(f"start-up: {time.monotonic() - begin:.1f} s", flush=True)
        elif epochs in (1, arguments.epochs):
            print(f"after {epochs} epochs: {megabytes():.0f} MB, {time.monotonic() - begin:.0f} s", flush=True)
        epochs += 1
        if epochs > arguments.epochs:
            raise Enough
        return training_batches(*given)

    data.training_batches = spy
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder) / "corpus", arguments.files)
        print(f"{arguments.files} files; before: {megabytes():.0f} MB", flush=True)
        begin = time.monotonic()
        with contextlib.suppress(Enough):
            sys.exit(sslprune.main([
                "--task", "asr", "--budget", "0.9", "--data", f"{folder}/corpus", "--out", f"{folder}/run",
                "--dense-updates", "1000000", "--batch-seconds", "50", "--workers", "1",
            ]))  # fmt: skip


if __name__ == "__main__":
    main()
