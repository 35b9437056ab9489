"""Writes tables (train.tsv, dev.tsv, test.tsv) for two corpora of real speech that anyone can clone.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    .venv/bin/python tests/experiment/corpora.py digits free-spoken-digit-dataset tables/digits --test lucas
    .venv/bin/python tests/experiment/corpora.py commands SPEECH_COMMANDS tables/commands
    .venv/bin/python tests/experiment/corpora.py commands SPEECH_COMMANDS tables/strings --strings
    .venv/bin/python sslprune.py --task asr --budget 0.5 --data tables/digits --out runs/digits

`digits`, the Free Spoken Digit Dataset: recordings/DIGIT_SPEAKER_TAKE.wav. The speakers named by --test are the test
set. Of the others, takes 5 to 9 of each digit are the dev set (takes 0 to 4 are the corpus's own test set, and are left
out of training, too).

`commands`, Speech Commands (Warden 2018): a folder a word, WORD/SPEAKER_nohash_TAKE.wav, or its test set with the
classes `_unknown_` (whose files' names begin with the word) and `_silence_` (nobody's, and left out). It is split by
speaker: a speaker is in the test set where its number, the hexadecimal in the name, has a remainder of under 45 when
divided by 100; under 55, in the dev set; else in the training set. With --strings the utterances are strings of two to
five words of one speaker, whose recordings follow each other in random order: each recording is in eight strings of the
training set, or in two of the others (a speaker's last ones may be shorter). They are written beside the tables.

`path` in a table is from the table's folder; move the two together.
"""

import argparse
import glob
import itertools
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import soundfile

DIGITS = "zero one two three four five six seven eight nine".split()


def refuse(message):
    """End with one line that says what is wrong."""
    print(f"corpora: {message}", file=sys.stderr)
    sys.exit(2)


def listed(folder, pattern):
    """The files that match a pattern, without those whose names begin with a dot, as macOS's archives leave them."""
    if not folder.is_dir():
        refuse(f"{folder}: there is no such folder")
    return [folder / path for path in sorted(glob.glob(pattern, root_dir=folder))]


def digits(folder, test_speakers):
    """(split, path, text, intent, speaker) of each recording of the Free Spoken Digit Dataset that is in a split."""
    named = [(path, re.fullmatch(r"(\d)_(\w+)_(\d+)\.wav", path.name)) for path in listed(folder, "recordings/*.wav")]
    recordings = [(path, *match.groups()) for path, match in named if match]
    if not recordings:
        refuse(f"{folder}: holds no recordings/DIGIT_SPEAKER_TAKE.wav; give the corpus's own folder")
    unknown = set(test_speakers) - {speaker for _, _, speaker, _ in recordings}
    if unknown:
        refuse(f"{folder}: has no speaker {', '.join(sorted(unknown))}")
    for path, digit, speaker, take in recordings:
        split = (
            "test" if speaker in test_speakers else "train" if int(take) >= 10 else "dev" if int(take) >= 5 else None
        )
        if split:
            yield split, path, DIGITS[int(digit)], DIGITS[int(digit)], speaker


def commands(folder):
    """(split, path, text, intent, speaker) of each recording of Speech Commands of which the speaker is known."""
    pattern = r"(?:(\w+)_)?([0-9a-f]{8})_nohash_\d+(?:\.wav)+"
    found = [(path, re.fullmatch(pattern, path.name)) for path in listed(folder, "*/*.wav")]
    if not any(match for _, match in found):
        refuse(f"{folder}: holds no recordings WORD/SPEAKER_nohash_TAKE.wav; give the corpus's own folder")
    for path, match in found:
        if match:
            place = int(match[2], 16) % 100
            label = path.parent.name.strip("_")
            yield "test" if place < 45 else "dev" if place < 55 else "train", path, match[1] or label, label, match[2]


def strings(rows, folder):
    """(split, path, text, "", speaker) of strings of a speaker's recordings, whose audio goes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    by_speaker = {}
    for split, path, text, _, speaker in rows:
        by_speaker.setdefault((split, speaker), []).append((path, text))
    for (split, speaker), recordings in sorted(by_speaker.items()):
        count = itertools.count()
        for _ in range(8 if split == "train" else 2):
            left = draw.sample(recordings, len(recordings))
            while left:
                length = draw.randint(2, 5)
                string, left = left[:length], left[length:]
                audio, rates = zip(*(soundfile.read(path, dtype="int16") for path, _ in string))
                path = folder / f"{speaker}-{next(count)}.flac"
                soundfile.write(path, np.concatenate(audio), rates[0])
                yield split, path, " ".join(text for _, text in string), "", speaker


def write_tables(rows, folder):
    """Write the rows into a table for each split, and say how many there are, of how many speakers."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    for split in ("train", "dev", "test"):
        lines = [(os.path.relpath(path, folder), *rest) for name, path, *rest in rows if name == split]
        if not lines:
            refuse(f"{folder}: nothing was found for {split}.tsv; give the corpus's own folder")
        text = "\n".join("\t".join(line) for line in [("path", "sentence", "intent", "speaker"), *lines])
        (folder / f"{split}.tsv").write_text(text + "\n", encoding="utf-8")
        print(f"{folder / split}.tsv: recordings: {len(lines)}, speakers: {len({line[-1] for line in lines})}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=("digits", "commands"))
    parser.add_argument("folder", type=Path, help="of the corpus")
    parser.add_argument("tables", type=Path, help="the folder to write into")
    parser.add_argument("--test", default="lucas", metavar="NAMES", help="test speakers of digits, joined by commas")
    parser.add_argument("--strings", action="store_true", help="of commands: strings of a speaker's words")
    options = parser.parse_args()
    if options.strings and options.corpus != "commands":
        refuse("--strings is for commands")
    rows = digits(options.folder, options.test.split(",")) if options.corpus == "digits" else commands(options.folder)
    write_tables(strings(rows, options.tables / "audio") if options.strings else rows, options.tables)


if __name__ == "__main__":
    main()
