"""Feed thousands of damaged files to everything that reads files: each must be read or refused in one line.

    python tests/checks/fuzz.py                                    # 2,000 files of each kind, some ten minutes
    python tests/checks/fuzz.py --kind flac --only 17              # that one file again, with the traceback

A crash, a hang (10 s), memory that grows by over 500 MB, or an exception that is not the loader's own is a defect, and
the exit status 1. The files are made from the seed; each kind is read in a process of its own, which is replaced when
it dies (Linux).
"""

import argparse
import json
import multiprocessing
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import HERE, state_dict, tiny, write_layout, write_safetensors
from test_data import make_librispeech, make_slurp

import data
import sslprune
from flops import UserError
from gates import KINDS
from transformer import load_pretrained

SECONDS, MEGABYTES = 10, 500
OURS = (UserError, OSError)
EXTREMES = [struct.pack("<q", value) for value in (0, 1, -1, 2**31 - 1, 2**63 - 1)] + [struct.pack(">i", 2**31 - 1)]


def make(kind, folder):
    """A valid file of this kind, and the function that reads it."""
    golden = torch.load(HERE / "golden.pt", weights_only=True)
    folder.mkdir()
    if kind in ("model.pt", "legacy.pt"):
        model = sslprune.SpeechModel(tiny(KINDS["mac"]).slice(), "slu", ["yes", "no"])
        torch.save(
            sslprune.contents_of(model), folder / "model.pt", _use_new_zipfile_serialization=kind == "model.pt"
        )
        return folder / "model.pt", sslprune.load
    if kind == "fairseq":
        return write_layout(folder, golden, "fairseq"), load_pretrained
    if kind == "safetensors":
        path = folder / "model.safetensors"
        write_safetensors(path, state_dict(golden, "hf_base"))
        return path, load_pretrained
    if kind == "config":
        write_layout(folder, golden, "hf_base")
        return folder / "config.json", lambda path: load_pretrained(path.parent)
    if kind == "slurp":
        root = make_slurp(folder / "corpus")
        return root / "dataset" / "slurp" / "train.jsonl", lambda path: data.open_corpus(root, "slu", skip_bad=True)
    if kind == "librispeech":
        root = make_librispeech(folder / "corpus")
        return next(root.glob("train*/*/*/*.txt")), lambda path: data.open_corpus(root, "asr", skip_bad=True)
    path = folder / f"x.{kind}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (4_000, 2)), 22_050)

    def read(path):
        data.checked("", data.Utterance("x", [path], 0.0, intent="x"), "slu", set())
        return data.read_audio(path)

    return path, read


KIND_NAMES = ("model.pt", "legacy.pt", "fairseq", "safetensors", "config", "slurp", "librispeech", "wav", "flac", "ogg")


def damaged(whole, rng):
    """These bytes after one to four accidents, half of them in the first or last kilobyte, where formats are."""
    found = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
        size = len(found)
        place = int(
            rng.choice(
                [rng.integers(size + 1), min(size, rng.integers(1024)), max(0, size - rng.integers(1024))],
                p=[0.5, 0.25, 0.25],
            )
        )
        length = int(rng.integers(1, 64))
        accident = rng.integers(7)
        if accident == 0 and place < size:
            found[place] ^= 1 << int(rng.integers(8))
        elif accident == 1:
            found[place : place + length] = rng.bytes(length)
        elif accident == 2:
            del found[place : place + length]
        elif accident == 3:
            found[place:place] = found[place : place + length] * int(rng.integers(1, 5))
        elif accident == 4:
            found[place : place + 8] = EXTREMES[rng.integers(len(EXTREMES))]
        elif accident == 5:
            digits = [i for i in range(size) if 48 <= found[i] <= 57] or [place]
            found[(i := digits[rng.integers(len(digits))]) : i + 1] = [
                b"-1",
                b"999999999999",
                b"null",
                b'"',
                b"[" * 2000,
            ][rng.integers(5)]
        elif rng.random() < 0.3:
            del found[place:]
    return bytes(found)


def status(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))) / 1024


def read_all(kind, indices, seed, pipe, raising=False):
    """In a process of its own: read the damaged files, and tell of each when it begins, and how it ended."""
    torch.set_num_threads(1)
    data.log.setLevel("CRITICAL")
    with tempfile.TemporaryDirectory() as folder:
        path, read = make(kind, Path(folder) / "files")
        whole = path.read_bytes()
        read(path)
        for index in indices:
            path.write_bytes(damaged(whole, np.random.default_rng([seed, index])))
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before, begin = status("VmRSS"), time.monotonic()
            pipe.send((index, "begins", 0, 0))
            try:
                read(path)
                how = "read"
            except OURS as error:
                how = "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"other: {error!r}"
            except BaseException as error:
                if raising:
                    raise
                how = f"other: {error!r}"
            pipe.send((index, how, status("VmHWM") - before, time.monotonic() - begin))


def fuzz(kind, indices, seed):
    """Read them all, whatever happens meanwhile: {what: [indices]}, the most memory and the longest time."""
    found, peak, slowest = {}, 0, 0
    left = list(indices)
    while left:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=read_all, args=(kind, left, seed, there))
        process.start()
        there.close()
        now = None
        try:
            while left:
                if not here.poll(SECONDS + 5):
                    found.setdefault("hang", []).append(now)
                    left.remove(now)
                    break
                now, how, memory, seconds = here.recv()
                if how != "begins":
                    left.remove(now)
                    peak, slowest = max(peak, memory), max(slowest, seconds)
                    found.setdefault(
                        "blow-up" if memory > MEGABYTES else "hang" if seconds > SECONDS else how, []
                    ).append(now)
        except EOFError:
            if now is None:
                sys.exit(f"{kind}: the undamaged file could not be read")
            found.setdefault("crash", []).append(now)
            left.remove(now)
        process.kill()
        process.join()
    return found, peak, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KIND_NAMES)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    if arguments.only is not None:
        read_all(
            arguments.kind,
            [arguments.only],
            arguments.seed,
            type("Print", (), {"send": lambda self, what: print(*what)})(),
            raising=True,
        )
        return
    bad = 0
    print(
        "| kind | files | read | refused | crashes | hangs | blow-ups | other | peak MB | slowest s |\n| --- |"
        + " ---: |" * 9,
        flush=True,
    )
    for kind in [arguments.kind] if arguments.kind else KIND_NAMES:
        found, peak, slowest = fuzz(kind, range(arguments.count), arguments.seed)
        counts = [len(found.get(how, [])) for how in ("read", "refused", "crash", "hang", "blow-up")]
        other = {how: which for how, which in found.items() if how not in ("read", "refused")}
        bad += sum(map(len, other.values()))
        row = [kind, arguments.count, *counts, arguments.count - sum(counts), f"{peak:.0f}", f"{slowest:.1f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        for how, which in other.items():
            print(f"  {how}: {json.dumps(which[:10])}", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
