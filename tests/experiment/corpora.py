"""Writes tables (train.tsv, dev.tsv, test.tsv) for two corpora of real speech that anyone can clone.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    .venv/bin/python tests/experiment/corpora.py digits free-spoken-digit-dataset tables/digits --test lucas
    .venv/bin/python sslprune.py --task asr --budget 0.5 --data tables/digits --out runs/digits
    .venv/bin/python tests/experiment/corpora.py commands SPEECH_COMMANDS tables

`digits`, the Free Spoken Digit Dataset: recordings/DIGIT_SPEAKER_TAKE.wav. The speakers named by --test are the test
set. Of the others, takes 5 to 9 of each digit are the dev set (takes 0 to 4 are the corpus's own test set, and are left
out of training, too).

`commands`, Speech Commands (Warden 2018): a folder a word, WORD/SPEAKER_nohash_TAKE.wav, or its test set with the
classes `_unknown_` (whose files' names begin with the word) and `_silence_` (nobody's, and left out). It becomes twelve
corpora, TABLES/TASK-AMOUNT-FOLD. Speakers stand in the order of their numbers. Every third is a test speaker, from the
first, second or third on in fold 0, 1 or 2; of the others, every fifth is a dev speaker and the rest train: all of
them, or every fourth (a quarter). The utterances of `slu` are the words. Those of `asr` are strings of two to five
words of one speaker, whose recordings follow each other in random order: each recording is in eight strings of train,
two of dev and one of test (a speaker's last ones may be shorter). The audio of strings is in TABLES/strings.

`path` in a table is from the table's folder; move them together.
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


def commands(folder, audio):
    """(corpus, split, path, text, intent, speaker) of each word and string of Speech Commands, in each corpus."""
    pattern = r"(?:(\w+)_)?([0-9a-f]{8})_nohash_\d+(?:\.wav)+"
    named = [(path, re.fullmatch(pattern, path.name)) for path in listed(folder, "*/*.wav")]
    if not any(match for _, match in named):
        refuse(f"{folder}: holds no recordings WORD/SPEAKER_nohash_TAKE.wav; give the corpus's own folder")
    spoken = {}  # {speaker: recordings}
    for path, match in named:
        if match:
            label = path.parent.name.strip("_")
            spoken.setdefault(match[2], []).append((path, match[1] or label, label, match[2]))
    audio.mkdir(parents=True, exist_ok=True)
    strung = {speaker: list(strings(recordings, audio)) for speaker, recordings in spoken.items()}
    for fold in range(3):
        for amount in ("all", "quarter"):
            for speaker, split in splits(sorted(spoken), fold, amount):
                for row in spoken[speaker]:
                    yield f"slu-{amount}-{fold}", split, *row
                for number, row in strung[speaker]:
                    if number < {"train": 8, "dev": 2, "test": 1}[split]:
                        yield f"asr-{amount}-{fold}", split, *row


def splits(speakers, fold, amount):
    """(speaker, split) of each speaker who is in a split."""
    others = [speaker for i, speaker in enumerate(speakers) if i % 3 != fold]
    train = [speaker for i, speaker in enumerate(others) if i % 5]
    yield from ((speaker, "test") for speaker in speakers[fold::3])
    yield from ((speaker, "dev") for speaker in others[::5])
    yield from ((speaker, "train") for speaker in (train[::4] if amount == "quarter" else train))


def strings(recordings, audio):
    """(number of the drawing, (path, text, "", speaker)) of strings of one speaker's recordings, written as audio."""
    speaker = recordings[0][-1]
    draw, count = random.Random(speaker), itertools.count()
    for number in range(8):
        left = draw.sample(recordings, len(recordings))
        while left:
            length = draw.randint(2, 5)
            string, left = left[:length], left[length:]
            samples, rates = zip(*(soundfile.read(path, dtype="int16") for path, *_ in string))
            path = audio / f"{speaker}-{next(count)}.flac"
            soundfile.write(path, np.concatenate(samples), rates[0])
            yield number, (path, " ".join(text for _, text, *_ in string), "", speaker)


def write_tables(rows, folder):
    """Write rows (split, path, ...) into a table for each split, and say how many there are, of how many speakers."""
    folder.mkdir(parents=True, exist_ok=True)
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
    options = parser.parse_args()
    if options.corpus == "digits":
        write_tables(list(digits(options.folder, options.test.split(","))), options.tables)
        return
    corpora = {}
    for name, *row in commands(options.folder, options.tables / "strings"):
        corpora.setdefault(name, []).append(row)
    for name, rows in corpora.items():
        write_tables(rows, options.tables / name)


if __name__ == "__main__":
    main()
