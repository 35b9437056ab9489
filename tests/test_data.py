"""Audio, corpora in the layouts in which people have them, batches, and error rates worked out by hand."""

import json
import os
import random
import re
import struct
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import soundfile
import torch
from conftest import HERE, LETTERS

import data
from data import open_corpus
from flops import BASE, UserError

# --- Audio ---


def tone(frequency, rate, seconds=0.4):
    t = np.arange(round(rate * seconds)) / rate
    return np.sin(2 * np.pi * frequency * t) * np.hanning(len(t))


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_resampling_leaves_a_tone_a_tone(tmp_path, rate):
    soundfile.write(tmp_path / "tone.wav", tone(1_000, rate), rate, subtype="FLOAT")
    samples = data.read_audio(tmp_path / "tone.wav")
    assert samples.dtype == np.float32
    assert len(samples) == 6_400
    assert np.abs(samples - tone(1_000, 16_000)).max() < 1e-3


def test_resampling_removes_what_16_khz_cannot_hold():
    samples = data.resample(tone(11_000, 48_000).astype(np.float32), 48_000)
    assert np.abs(samples).max() < 1e-3


def test_channels_are_averaged(tmp_path):
    left, right = tone(300, 16_000), tone(500, 16_000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    assert np.allclose(data.read_audio(tmp_path / "stereo.wav"), (left + right) / 2, atol=1e-6)


def test_waveforms_have_zero_mean_and_unit_variance():
    samples = data.waveform(data.Utterance("x", np.arange(50, dtype=np.float32), 0.01))
    assert samples.mean() == pytest.approx(0, abs=1e-5)
    assert samples.std() == pytest.approx(1, abs=1e-5)
    silence = data.waveform(data.Utterance("x", np.zeros(100, np.float32), 0.01))
    assert (silence == 0).all()


def make_bad(path, how):
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    if how == "missing":
        return
    if how == "NaN":
        noise[7] = np.nan
    soundfile.write(
        path, noise[: 0 if how == "empty" else None], 16_000, subtype="FLOAT" if path.suffix == ".wav" else None
    )
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    if how == "not audio":
        path.write_text("this is not audio\n" * 50)
    if how == "no bytes":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("a.wav", "missing", "missing"),
        ("a.wav", "NaN", "not finite"),
        ("a.wav", "empty", "empty"),
        ("a.wav", "not audio", "not readable audio"),
        ("a.wav", "no bytes", "not readable audio"),
        ("a.wav", "truncated", "truncated"),
        ("a.flac", "truncated", ""),
    ],
)
def test_bad_audio_is_an_error_that_names_file_and_reason(tmp_path, name, how, reason):
    make_bad(tmp_path / name, how)
    with pytest.raises(UserError) as info:
        data.read_audio(tmp_path / name)
    assert str(tmp_path / name) in str(info.value)
    assert reason in str(info.value)


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("wav", {}),
        ("flac", {}),
        ("ogg", {}),
        ("mp3", {}),
        ("aiff", {}),
        ("au", {}),
        ("caf", {}),
        ("w64", {}),
        ("opus", {"format": "OGG", "subtype": "OPUS"}),
    ],
)
@pytest.mark.parametrize("name", ["x", "x.raw", "no ending"])
def test_audio_of_any_format_is_known_by_what_is_in_it(tmp_path, ending, options, name):
    soundfile.write(tmp_path / f"x.{ending}", tone(500, 16_000, 1.0), 16_000, **options)
    expected, _ = soundfile.read(tmp_path / f"x.{ending}", dtype="float32")
    path = tmp_path / (name + f".{ending}" if name == "x" else name)
    (tmp_path / f"x.{ending}").rename(path)
    assert np.allclose(data.read_audio(path), expected, atol=1e-5)
    assert data.checked("", data.Utterance("x", [path], 0.0, "a"), "asr", set()).seconds == pytest.approx(
        len(expected) / 16_000
    )


@pytest.mark.parametrize(
    "ending", ["wav", "flac", "mp3", "aiff", "au", "caf", "ogg", "opus", "w64", "rf64", "voc", "nist"]
)
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_shortened_audio_is_not_taken_for_a_whole_one(tmp_path, ending, share):
    path = tmp_path / f"x.{ending}"
    kind = {"opus": ("OGG", "OPUS"), "nist": ("NIST", "PCM_16")}.get(ending, (None, None))
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 48_000), 16_000, format=kind[0], subtype=kind[1])
    assert len(data.read_audio(path)) == 48_000
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"x\.\w+: is (truncated|not readable)"):
        data.read_audio(path)


def test_what_is_wrong_behind_the_sound_does_not_matter(tmp_path):
    """A RIFF size that counts its own header, and a chunk at the end that was cut off."""
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(500, 16_000, 1.0), 16_000)
    whole, expected = path.read_bytes(), data.read_audio(path)
    for changed in (
        whole[:4] + struct.pack("<I", len(whole)) + whole[8:],
        whole + b"LIST" + struct.pack("<I", 26) + b"INFOIART",
    ):
        path.write_bytes(changed)
        assert np.array_equal(data.read_audio(path), expected)


def test_audio_of_which_libsndfile_reads_a_part_is_refused(tmp_path):
    """An mp3 of variable rate without the frame that says its length, a chained Ogg, a FLAC that does not say it."""
    sound, path = np.random.default_rng(0).normal(0, 0.1, 160_000), tmp_path / "x"
    soundfile.write(path, sound, 16_000, format="MP3")
    whole = path.read_bytes()
    second = whole.find(whole[:2], 2)
    path.write_bytes(whole[second:])
    with pytest.raises(UserError, match="more than libsndfile reads"):
        data.read_audio(path)
    soundfile.write(path, sound, 16_000, format="OGG")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="more than libsndfile reads"):
        data.read_audio(path)
    soundfile.write(path, sound, 16_000, format="FLAC")
    header = bytearray(path.read_bytes())
    header[21] &= 0xF0
    header[22:26] = bytes(4)
    path.write_bytes(header)
    for read in (data.read_audio, lambda path: data.checked("", data.Utterance("x", [path], 0.0, "a"), "asr", set())):
        with pytest.raises(UserError, match="does not say how long"):
            read(path)


@pytest.mark.parametrize("blocks", [50, 51])
def test_telephony_audio_that_cannot_be_sought_in_is_read(tmp_path, blocks):
    """Blocks of 65 bytes: behind an odd number of them is a byte that libsndfile takes for one more."""
    sound, path = tone(500, 16_000, 1.02)[: 320 * blocks], tmp_path / "x.wav"
    soundfile.write(path, sound, 16_000, format="WAV", subtype="GSM610")
    samples = data.read_audio(path)
    assert len(samples) == 320 * blocks
    assert np.corrcoef(samples, sound)[0, 1] > 0.9
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="truncated"):
        data.read_audio(path)


@pytest.mark.parametrize("size", [2**32 - 1, 2**31 - 1, 2**31 - 2**12])
def test_a_header_of_unknown_length_as_a_pipe_has_it_is_read_to_the_end(tmp_path, size):
    soundfile.write(tmp_path / "x.wav", tone(500, 16_000), 16_000)
    whole = bytearray((tmp_path / "x.wav").read_bytes())
    for place in (4, whole.index(b"data") + 4):
        whole[place : place + 4] = struct.pack("<I", size)
    expected = data.read_audio(tmp_path / "x.wav")
    (tmp_path / "pipe.wav").write_bytes(whole)
    assert np.array_equal(data.read_audio(tmp_path / "pipe.wav"), expected)


def test_a_pipe_is_read(tmp_path):
    soundfile.write(tmp_path / "x.wav", tone(500, 16_000), 16_000)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "x.wav").read_bytes()))
    writer.start()
    assert np.array_equal(data.read_audio(tmp_path / "pipe"), data.read_audio(tmp_path / "x.wav"))
    writer.join()


# --- Batches ---


def utterances(seconds):
    return [data.Utterance(f"u{i}", None, s) for i, s in enumerate(seconds)]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_batches_hold_every_utterance_once_and_keep_to_their_seconds(seed):
    rng = np.random.default_rng(5)
    corpus = utterances(rng.uniform(0.5, 17, 300).tolist() + [60.0])
    found = data.batches(corpus, 40, None if seed is None else np.random.default_rng(seed))
    assert sorted(u.name for batch in found for u in batch) == sorted(u.name for u in corpus)
    for batch in found:
        longest = max(u.seconds for u in batch)
        assert longest * len(batch) <= 40 or len(batch) == 1
    padding = 1 - sum(u.seconds for u in corpus) / sum(max(u.seconds for u in b) * len(b) for b in found)
    assert padding < 0.15


def test_a_long_utterance_stands_alone_and_the_short_ones_fill_their_batches():
    found = data.batches(utterances([1.0] * 10 + [60.0] + [1.0] * 10), 10)
    assert [[u.seconds for u in batch] for batch in found] == [[60.0], [1.0] * 10, [1.0] * 10]


def test_random_batches_differ_each_time_and_repeat_with_their_seed():
    corpus = utterances(np.linspace(1, 5, 50).tolist())
    rng = np.random.default_rng(0)
    first, second = data.batches(corpus, 20, rng), data.batches(corpus, 20, rng)
    assert first != second
    assert first == data.batches(corpus, 20, np.random.default_rng(0))


def test_loading_pads_and_leaves_out_what_it_cannot_read(tmp_path):
    make_bad(tmp_path / "bad.wav", "NaN")
    good = [
        data.Utterance(str(n), np.random.default_rng(n).normal(size=n).astype(np.float32), n / 16_000)
        for n in (500, 700)
    ]
    bad = data.Utterance("bad", tmp_path / "bad.wav", 1.0)
    batch, waveforms, lengths, reasons = data.load_batch([good[0], bad, good[1]])
    assert batch == good
    assert lengths.tolist() == [500, 700]
    assert torch.equal(waveforms[0, :500], torch.from_numpy(data.waveform(good[0])))
    assert (waveforms[0, 500:] == 0).all()
    assert "bad.wav" in reasons[0]
    assert data.load_batch([bad])[:3] == ([], None, None)


# --- Text and errors ---


def test_the_vocabulary_is_the_blank_the_space_and_what_the_transcripts_hold():
    assert (
        data.vocabulary(["ŒUVRE 3", "Ø'1"])
        == ["<pad>", "|", *sorted("ŒUVRE3Ø'1".replace("E", "", 1) + "E")][: 2 + len(set("ŒUVRE3Ø'1"))]
    )
    assert data.vocabulary(["ДА НЕТ"]) == ["<pad>", "|", *"АДЕНТ"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what's  new?", "WHAT'S NEW"),
        ("it\u2019s caf\u00e9-time", "IT'S CAFÉ TIME"),
        ("rock`n\u00b4roll \u02bcn", "ROCK'N'ROLL 'N"),
        ("cafe\u0301", "CAFÉ"),  # composed
        ("  ", ""),
        ("a\x00b\n\tc\u202e", "A B C"),
        ("naïve straße", "NAÏVE STRASSE"),
        ("œuvre, ørsted; 42 % von 007", "ŒUVRE ØRSTED 42 VON 007"),
        ("Да, нет!", "ДА НЕТ"),
        ("हिन्दी", "हिन्दी"),  # vowel signs are marks
        ("１２ ﬁne", "12 FINE"),
        ("日本語。", "日本語"),
        ("ılık İzmir izmir", "ILIK İZMIR IZMIR"),
        ("el col·legi · l·", "EL COL·LEGI L"),
        ("o‘zbek oʻ ʼn ŉ didn＇t", "O'ZBEK O' 'N 'N DIDN'T"),
        ("ක්‍රියා می‌خواهم‌", "ක්‍රියා می‌خواهم"),
        ("kʰa ˧ m² ꜜ", "KʰA ˧ M² ꜜ"),
        ("二〇二五年", "二〇二五年"),
        ("co\u00adop\u2060er\ufeffate a\u200bb", "COOPERATE A B"),
        ("a \u2764\ufe0f \U0001f469\u200d\U0001f4bb b \U0001f3fd", "A B"),
        ("<unk> hi [noise]{breath}(laughs)＜unk＞【笑】</s>", "HI"),
        ("the house (la maison) is (I think so) old", "THE HOUSE LA MAISON IS I THINK SO OLD"),
        ("i <3 you and you > me (2 of us)", "I 3 YOU AND YOU ME 2 OF US"),
        (f"({'a' * 41})", "A" * 41),
        ("'Hello,' he said. 'No!' ‚Ja‘ ‘so it is’ ``yes''", 'HELLO HE SAID NO JA SO IT IS YES'),
        ("'tis the dogs' bone, rock 'n' roll '", "'TIS THE DOGS' BONE ROCK N ROLL"),
        ('ինչո՞ւ', 'ԻՆՉՈՒ'),
        ('צה"ל אמר "כן"', 'צה״ל אמר כן'),
        ('അവന്\u200d', 'അവന്\u200d'),
        ('col•legi • ۽ ၎င်း', 'COL•LEGI ۽ ၎င်း'),
        ('EU:n S:t 12:30 note: 你：好', 'EU:N S:T 12 30 NOTE 你 好'),
        ("[ laughs ][=! laughs][1 second pause]<*a>< unk >( laughs )(door-slam.){noise: a door, and behind it} 5", "5"),
    ],
)
def test_transcripts_keep_letters_marks_digits_and_apostrophes_of_any_script(text, expected):
    assert data.normalise(text) == expected
    assert data.normalise(expected) == expected


def test_normalising_twice_changes_nothing_more():
    often = "<>[](){}'`·/ |aŉßΐİ\u0301\u0345\u00ad\u200b\u200c\u200d"
    characters, draw = [*map(chr, range(0, 0x30000, 7)), *often * 500], random.Random(0)
    for _ in range(20_000):
        once = data.normalise(text := "".join(draw.choices(characters, k=6)))
        assert data.normalise(once) == once, ascii(text)


def test_each_character_that_is_left_out_is_counted():
    dropped = Counter()
    data.normalise("a, b,\tc? <unk> d·e · \u00ad<unk> [Noise]", dropped)
    assert dropped == {",": 2, "?": 1, "<unk>": 2, "[Noise]": 1, "·": 1, "\u00ad": 1}
    data.normalise("straße ’n ｆ", dropped := Counter())
    assert not dropped


def test_raw_transcripts_keep_all_but_white_space_controls_and_the_word_delimiter():
    assert data.transcript(" S s\u3000<unk>|ˈtʃ\x00,\n\ud800 ﬁ ", raw_text=True) == "S s <unk> ˈtʃ , ﬁ"
    assert data.transcript("S s, ", raw_text=False) == "S S"


def test_labels_of_several_characters_are_output_and_marks_are_not():
    labels = ["<pad>", "tʃ", "ɑː", "▁the", "▁", "|", "<s>", "[UNK]", "<", "["]
    assert [label for label in labels if data.MARK.fullmatch(label)] == ["<pad>", "<s>", "[UNK]"]
    assert data.decode(torch.tensor([0, 1, 1, 2, 6, 3, 4, 1, 5, 2, 7, 8, 9, 0, 9]), labels) == "tʃɑː the tʃ ɑː<[["
    assert data.decode(torch.tensor([0, 1, 0]), ["x", "y"]) == "y"  # the first is the blank, whatever its name


def test_decoding_collapses_repeats_and_then_removes_blanks():
    units = {character: index for index, character in enumerate(LETTERS)}
    spoken = "HH_E_LL_LO||_W_OO_O"  # "_" is a blank
    frames = torch.tensor([0 if c == "_" else units[c] for c in spoken])
    assert data.decode(frames, LETTERS) == "HELLO WOO"
    assert data.decode(data.encode("IT'S A Q", units), LETTERS) == "IT'S A Q"
    others = ["<pad>", "<s>", "[UNK]", "|", "A"]
    assert data.decode(torch.tensor([0, 1, 2, 3, 3, 4, 1, 4, 0]), others) == "AA"


@pytest.mark.parametrize("text", ["HELLO ALL", "A", "AAB", "ABAB", "SEE ME"])
def test_frames_needed_is_where_ctc_becomes_possible(text):
    target = data.encode(text, {character: index for index, character in enumerate(LETTERS)})
    for frames, possible in ((data.frames_needed(text), True), (data.frames_needed(text) - 1, False)):
        log_probabilities = torch.zeros(frames, 1, len(LETTERS)).log_softmax(2)
        loss = (
            torch.nn.functional.ctc_loss(log_probabilities, target, torch.tensor([frames]), torch.tensor([len(target)]))
            if frames
            else torch.tensor(torch.inf)
        )
        assert loss.isfinite() == possible


def test_edit_distance_is_the_shortest_path():
    @cache
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 7))) for _ in range(2))
        assert data.edit_distance(a, b) == slow(a, b)
    assert data.edit_distance("kitten", "sitting") == 3


def test_error_rates_are_over_the_whole_corpus():
    references, hypotheses = ["THE CAT SAT", "YES"], ["THE BAT SAT DOWN", ""]
    assert data.error_rates(references, hypotheses)["word_error_rate"] == 3 / 4  # each of the three once
    assert data.error_rates(["AB"], ["ACB"])["character_error_rate"] == 1 / 2
    assert set(data.error_rates(references, references).values()) == {0}
    assert data.error_rates(references, hypotheses, characters=False) == {"word_error_rate": 3 / 4}
    assert data.error_rates(["AB"], ["ACB"]) == {"word_error_rate": 1, "character_error_rate": 1 / 2}
    with pytest.raises(ValueError, match="argument"):
        data.error_rates(["A"], [])


# --- Corpora ---


def speak(path, seconds=0.5, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(len(path.name)).normal(0, 0.1, round(seconds * rate)), rate)


def make_librispeech(root, count=3):
    for subset in ("train-clean-100", "dev-clean", "test-clean"):
        folder = root / subset / "84" / "121123"
        lines = []
        for i in range(count):
            speak(folder / f"84-121123-{i:04}.flac", 0.5 + i % 10 / 10)
            lines.append(f"84-121123-{i:04} GO ON NUMBER {'ABCDEFGHIJKLMNOP'[i % 16]}")
        (folder / "84-121123.trans.txt").write_text("\n".join(lines) + "\n")
    return root


def test_librispeech(tmp_path):
    corpus = open_corpus(make_librispeech(tmp_path), "asr")
    assert [u.text for u in corpus.train] == ["GO ON NUMBER A", "GO ON NUMBER B", "GO ON NUMBER C"]
    assert [u.seconds for u in corpus.dev] == [0.5, 0.6, 0.7]
    assert len(corpus.test) == 3
    both = open_corpus(tmp_path, "asr", subsets={"train": "train-clean-100,dev-clean"})
    assert len(both.train) == 6
    with pytest.raises(UserError, match=r"train-clean-360.*--train"):
        open_corpus(tmp_path, "asr", subsets={"train": "train-clean-360"})
    with pytest.raises(UserError, match="slu"):
        open_corpus(tmp_path, "slu")


def test_text_files_may_have_a_byte_order_mark_blank_lines_and_other_line_ends(tmp_path, caplog):
    make_librispeech(tmp_path)
    (tmp_path / "manifest.jsonl").write_text("{}")  # which does not make it SLURP's
    path = tmp_path / "train-clean-100" / "84" / "121123" / "84-121123.trans.txt"
    lines = path.read_text().splitlines()
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join([*lines, "../x GO"]).encode())
    corpus = open_corpus(tmp_path, "asr", skip_bad=True)
    assert [u.text for u in corpus.train] == ["GO ON NUMBER A", "GO ON NUMBER B", "GO ON NUMBER C"]
    assert "line 7 is not" in caplog.text
    make_slurp(tmp_path / "slurp")
    path = tmp_path / "slurp" / "dataset" / "slurp" / "test.jsonl"
    path.write_text(path.read_text().replace("will it rain", "will it\u2028rain\u0085"))
    assert open_corpus(tmp_path / "slurp", "asr").test[0].text == "WILL IT RAIN"


def test_librispeech_with_other_audio_ids_and_white_space(tmp_path):
    make_librispeech(tmp_path)
    folder = tmp_path / "train-clean-100" / "84" / "121123"
    for i, ending in enumerate(("wav", "ogg", "mp3")):
        (folder / f"84-121123-{i:04}.flac").unlink()
        speak(folder / f"a.b.{i}.{ending}")
    (folder / "84-121123.trans.txt").write_text("a.b.0\tONE\na.b.1 \t  TWO  THREE \r\n\na.b.2 FOUR\n")
    corpus = open_corpus(tmp_path, "asr")
    assert [(u.name, u.text, u.speaker) for u in corpus.train] == [
        ("a.b.0", "ONE", "84"),
        ("a.b.1", "TWO THREE", "84"),
        ("a.b.2", "FOUR", "84"),
    ]


# --- Tables and Kaldi data directories ---


def make_table(
    root,
    splits=("train", "dev", "test"),
    columns=("path", "sentence", "intent", "client_id"),
    clips="clips",
    count=12,
    names=None,
):
    """As Common Voice has them, with other columns and quotation marks; three speakers."""
    for split in splits:
        rows = ["\t".join(["up_votes", *columns, "locale"])]
        for i in range(count):
            speak(root / clips / f"{split}-{i}.mp3")
            values = {
                "path": f"{split}-{i}.mp3",
                "sentence": f'"Grüß Gott, Nummer {i % 3}',
                "text": f"Grüß Gott, Nummer {i % 3}",
                "intent": ("gruß", "frage")[i % 2],
            }
            rows.append("\t".join(["2", *(values.get(column, f"speaker{i % 3}") for column in columns), "de"]))
        (root / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "columns", [("path", "sentence", "intent", "client_id"), ("intent", "text", "speaker", "path")]
)
@pytest.mark.parametrize("clips", ["clips", "."])
def test_a_table(tmp_path, columns, clips):
    root = make_table(tmp_path, columns=columns, clips=clips)
    for task in ("asr", "slu"):
        corpus = open_corpus(root, task)
        assert [len(split) for split in (corpus.train, corpus.dev, corpus.test)] == [12, 12, 12]
        first = corpus.dev[1]
        assert (first.name, first.text, first.intent, first.speaker) == (
            "dev-1.mp3",
            "GRÜSS GOTT NUMMER 1",
            "frage",
            "speaker1",
        )
        assert first.seconds == pytest.approx(0.5, abs=0.01)
    assert data.vocabulary(u.text for u in corpus.train) == ["<pad>", "|", *sorted("GRÜSOTNUME012")]


def test_subsets_of_a_table_are_named_by_flags_and_joined(tmp_path):
    root = make_table(tmp_path, splits=("validated", "other", "dev", "test"))
    corpus = open_corpus(root, "asr", subsets={"train": "validated,other"})
    assert len(corpus.train) == 24
    with pytest.raises(UserError, match=r"train\.tsv.*--train"):
        open_corpus(root, "asr")
    with pytest.raises(UserError, match=r"invalidated\.tsv.*--dev"):
        open_corpus(root, "asr", subsets={"train": "other", "dev": "invalidated"})


@pytest.mark.parametrize(
    ("columns", "task", "words"),
    [(("text",), "asr", "path"), (("path", "intent"), "asr", "sentence or text"), (("path", "text"), "slu", "intent")],
)
def test_a_table_without_a_column_that_is_needed_is_refused(tmp_path, columns, task, words):
    with pytest.raises(UserError, match=rf"train\.tsv.*{words}"):
        open_corpus(make_table(tmp_path, columns=columns), task)


def test_rows_of_a_table_that_cannot_be_used_are_skipped_with_their_reason(tmp_path):
    root = make_table(tmp_path)
    path = root / "train.tsv"
    path.write_text(path.read_text() + "2\tmissing.mp3\ta\tb\tc\td\n2\ttrain-0.mp3\n2\ttrain-0.mp3\t...\tb\tc\td\n")
    corpus = open_corpus(root, "asr", skip_bad=True)
    assert len(corpus.train) == 12
    assert [
        word in reason
        for word, reason in zip(("missing.mp3: is missing", ".tsv: line 15", "transcript is empty"), corpus.skipped)
    ] == [True] * 3
    path.write_text(path.read_text() + "2\ttrain-1.mp3\ta\t \tc\td\n")
    assert any("intent" in reason for reason in open_corpus(root, "slu", skip_bad=True).skipped)
    for text in ("", "\n", "path\tsentence\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"train"):
            open_corpus(root, "asr")


def test_reading_a_large_corpus_says_every_ten_seconds_how_far_it_is(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    root, seconds = make_librispeech(tmp_path, 9), iter(range(0, 10_000, 6))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(seconds))
    open_corpus(root, "asr")
    of_train = [record.message for record in caplog.records if "utterances of train-clean-100" in record.message]
    assert of_train == [f"looked at {n} utterances of train-clean-100" for n in (1, 3, 5, 7)]


def test_without_a_dev_split_every_tenth_speaker_is_lent_and_it_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    root = make_table(tmp_path, splits=("train", "test"), count=33)
    path = root / "train.tsv"
    path.write_text(
        re.sub(r"speaker\d", lambda match, n=iter(range(33)): f"speaker{next(n) // 3:02}", path.read_text())
    )  # eleven, each with three
    corpus = open_corpus(root, "asr")
    assert sorted({u.speaker for u in corpus.dev}) == ["speaker00", "speaker10"]
    assert (len(corpus.dev), len(corpus.train), corpus.size) == (6, 27, 66)
    assert not {u.speaker for u in corpus.dev} & {u.speaker for u in corpus.train}
    assert "no dev split" in caplog.text
    evaluated = open_corpus(root, "asr", splits=("dev", "test"))
    assert evaluated.dev == corpus.dev
    whole = path.read_text()
    for speakers in ({}, {"speaker00": "other"}, {"speaker00": ""}):  # one speaker, one who has nearly all, and none
        path.write_text(re.sub(r"speaker\d+", lambda match: speakers.get(match[0], "most"), whole))
        corpus = open_corpus(root, "asr")
        assert (len(corpus.dev), len(corpus.train)) == (4, 29)
    path.write_text("\n".join(whole.split("\n")[:2]))
    with pytest.raises(UserError, match="too small to take"):
        open_corpus(root, "asr")


def test_tables_in_the_folder_of_another_corpus_are_what_is_read(tmp_path):
    make_kaldi(make_librispeech(tmp_path))
    (tmp_path / "notes.jsonl").write_text("{}")
    assert open_corpus(tmp_path, "asr", subsets={"train": "train-clean-100"}).kind == "LibriSpeech"
    assert open_corpus(make_table(tmp_path), "asr").kind == "table"


def test_a_name_that_no_file_can_have_is_skipped(tmp_path):
    path = make_table(tmp_path) / "train.tsv"
    path.write_text(path.read_text().replace("train-3.mp3", "x" * 3000))
    (reason,) = open_corpus(tmp_path, "asr", skip_bad=True).skipped
    assert "xxx" in reason and reason.endswith("(File name too long)") and len(reason) < 600


def test_corpora_that_anyone_can_clone_become_tables(tmp_path):
    """No speaker of the test set is in another, and what a name says is what the table says."""
    for speaker in ("ann", "bob", "cyd"):
        for digit, take in ((7, 2), (7, 6), (8, 11), (0, 40)):
            speak(tmp_path / "digits" / "recordings" / f"{digit}_{speaker}_{take}.wav", rate=8_000)
    speakers = [f"{7 * number:08x}" for number in range(15)]
    for word, extra in (("yes", ""), ("_unknown_", "tree_"), ("_silence_", None)):
        for speaker in speakers:
            name = "12" if extra is None else f"{extra}{speaker}_nohash_0.wav"
            speak(tmp_path / "commands" / word / f"{name}.wav")
    for corpus in ("digits", "commands"):
        extra = ["--test", "bob,cyd"] if corpus == "digits" else []
        command = [
            sys.executable,
            HERE / "experiment" / "corpora.py",
            corpus,
            tmp_path / corpus,
            tmp_path / f"{corpus}-tables",
            *extra,
        ]
        subprocess.run(command, check=True, capture_output=True)
    found = open_corpus(tmp_path / "digits-tables", "asr")
    assert {(u.text, u.speaker) for u in found.train} == {("EIGHT", "ann"), ("ZERO", "ann")}
    assert [(u.text, u.speaker) for u in found.dev] == [("SEVEN", "ann")]
    assert Counter(u.speaker for u in found.test) == {"bob": 4, "cyd": 4}
    tested, tables = [], tmp_path / "commands-tables"
    for fold in range(3):
        words, strings = (open_corpus(tables / f"{task}-all-{fold}", task) for task in ("slu", "asr"))
        assert {(u.text, u.intent) for u in words.dev} == {("YES", "yes"), ("TREE", "unknown")}
        splits = [{u.speaker for u in split} for split in (words.train, words.dev, words.test)]
        assert list(map(len, splits)) == [8, 2, 5] and set.union(*splits) == set(speakers)
        tested += splits[2]
        assert [{u.speaker for u in split} for split in (strings.train, strings.dev, strings.test)] == splits
        assert len(strings.train) == 8 * 8 and len(strings.dev) == 2 * 2
        first = {f"{speaker}-0.flac" for speaker in splits[2]}
        assert {os.path.basename(u.name) for u in strings.test} == first
        for utterance in strings.train + strings.dev + strings.test:
            assert sorted(utterance.text.split()) == ["TREE", "YES"]
            assert utterance.seconds == 1  # two words of half a second
        for task, corpus in (("slu", words), ("asr", strings)):
            quarter = open_corpus(tables / f"{task}-quarter-{fold}", task)
            assert [u.name for u in quarter.dev + quarter.test] == [u.name for u in corpus.dev + corpus.test]
            assert len({u.speaker for u in quarter.train}) == 2
            assert {u.name for u in quarter.train} < {u.name for u in corpus.train}
    assert sorted(tested) == speakers
    (tmp_path / "commands" / "_silence_").rename(tmp_path / "silence")
    (tmp_path / "digits" / "recordings" / "._0_ann_3.wav").touch()
    for corpus, folder, words in (
        ("digits", "nowhere", "no such folder"),
        ("commands", "nowhere", "no such folder"),
        ("digits", "commands", "holds no recordings"),
        ("commands", "silence", "holds no recordings"),
        ("digits", "digits", "no speaker lucas"),
    ):
        command[2:] = [corpus, tmp_path / folder, tmp_path / "wrong"]
        wrong = subprocess.run(command, check=False, capture_output=True, text=True)
        assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1) and words in wrong.stderr


def write_manifest(root, ending, texts, write, audio="x.wav"):
    """The same utterances as train, dev and test. write: from the texts to the manifest's content."""
    speak(root / audio)
    for split in ("train", "dev", "test"):
        (root / f"{split}{ending}").write_bytes(write(texts))
    return root


def texts_of(root, **flags):
    return [u.text for u in open_corpus(root, "asr", **flags).train]


def quoted(delimiter, end="\n", encoding="utf-8"):
    def write(texts):
        rows = [delimiter.join(("audio_file", "transcript"))]
        rows += [delimiter.join(("x.wav", '"' + text.replace('"', '""') + '"')) for text in texts]
        return end.join(rows).encode(encoding)

    return write


def objects(texts, **others):
    return "\n".join(json.dumps({"audio_filepath": "x.wav", "text": text, **others}) for text in texts).encode()


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        (".jsonl", objects),
        (".JSONL", lambda texts: b"\xef\xbb\xbf\n" + objects(texts)),
        (".csv", quoted(",")),
        (".CSV", quoted(";", "\r\n", "utf-8-sig")),
        (".csv", quoted("\t")),
        (".TSV", quoted("\t", "\r\n")),
    ],
)
def test_manifests_are_read_as_their_writers_mean_them(tmp_path, ending, write):
    root = write_manifest(tmp_path, ending, ['one "two",\n\n; three', "four", "five"], write)
    assert texts_of(root) == ["ONE TWO THREE", "FOUR", "FIVE"]
    assert texts_of(root, raw_text=True)[0] == 'one "two", ; three'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['path\tsentence\tid', 'x.wav\t"a b\t1', 'x.wav\tc d"\t2'], ["A B", "C D"]),
        (['path\tsentence', 'x.wav\t"a', 'x.wav\tb"'], ["A", "B"]),
        (['path\tsentence', 'x.wav\t"a" b', 'x.wav\t"c'], ["A B", "C"]),
        (['sentence\tpath', '"a\tx.wav', 'b"\tx.wav'], ["A", "B"]),
        (['path\tsentence\tid', 'x.wav\ta\t"1', '2"\tx.wav\tb', 'x.wav\tb\t3'], ["A", "B"]),
    ],
)
def test_quotation_marks_that_are_part_of_the_sentences_are_no_quoting(tmp_path, lines, expected):
    root = write_manifest(tmp_path, ".tsv", [], lambda texts: "\n".join(lines).encode())
    assert texts_of(root, skip_bad=True) == expected


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "[]",
        "7",
        "{",
        '{"text": "a"}',
        '{"audio_filepath": "x.wav"}',
        '{"audio_filepath": "x.wav", "text": null}',
        '{"audio_filepath": "x.wav", "text": NaN}',  # of pandas, where there is none
        '{"audio_filepath": "x.wav", "text": ["a"]}',
        '{"audio_filepath": {"a": 1}, "text": "a"}',
        '{"audio_filepath": "a\\u0000\\n", "text": "a"}',
        '{"audio_filepath": "\\ud800", "text": "a"}',
    ],
)
def test_a_line_of_a_manifest_that_cannot_be_used_is_skipped_with_its_reason(tmp_path, line):
    write_manifest(tmp_path, ".jsonl", ["a", 7], objects)
    (tmp_path / "train.jsonl").write_bytes(objects(["a", 7]) + b"\n\n" + line.encode())
    corpus = open_corpus(tmp_path, "asr", skip_bad=True)
    assert [u.text for u in corpus.train] == ["A", "7"]
    (reason,) = corpus.skipped
    assert "train.jsonl: line 4 " in reason


@pytest.mark.parametrize(
    ("ending", "content", "words"),
    [
        (".csv", b'path,text\nx.wav,"a" b\n', r"train\.csv: line 2 is no CSV"),
        (".tsv", "path\ttext\nx.wav\ta\n".encode("utf-16"), r"train\.tsv: is not UTF-8"),
        (".tsv", "path\ttext\nx.wav\ta\n".encode("utf-16-le"), r"train\.tsv: its first line names no column path"),
        (".csv", b"path,text\nx.wav,\0\n", "transcript is empty"),
        (".csv", b"path,text\nx.wav,a,b\n", r"train\.csv: line 2 has 3 fields"),
        (".csv", b"path;sentences\nx.wav;a\n", "no column sentence or text"),
        (".jsonl", objects(["a"], offset=1.5), r"train\.jsonl: line 1 is a part of x\.wav; cut"),
        (".csv", b"path,text,offset\nx.wav,a,0.0\nx.wav,b,0.50\n", r"line 3 is a part of x\.wav; cut"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why_in_one_line(tmp_path, ending, content, words):
    write_manifest(tmp_path, ending, [], lambda texts: content)
    with pytest.raises(UserError, match=words) as info:
        open_corpus(tmp_path, "asr")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "keys", [("scenario", "action", "sentence", "recordings"), ("audio_filepath", "text", "offset")]
)
def test_objects_of_any_depth_are_skipped(tmp_path, keys):
    slurp = "recordings" in keys
    root = make_slurp(tmp_path) if slurp else write_manifest(tmp_path, ".jsonl", ["a"], objects)
    path = next(root.rglob("train.jsonl"))
    lines = path.read_text().rstrip()
    for depth in range(100, 1_100, 25):
        nested = "[" * depth + "]" * depth
        entry = ", ".join(f'"{key}": {nested}' for key in keys)
        path.write_text(f"{lines}\n{{{entry}}}\n{nested}\n")
        assert len(open_corpus(root, "slu" if slurp else "asr", skip_bad=True).skipped) == 2


def test_huge_fields_and_an_offset_of_zero_are_no_trouble(tmp_path):
    table = b"path,text,array,offset\nx.wav,a,\"" + b"1 " * 100_000 + b'",0.0\n'
    assert texts_of(write_manifest(tmp_path, ".csv", [], lambda texts: table)) == ["A"]


def test_paths_of_windows_of_the_current_folder_and_columns_in_capitals(tmp_path, monkeypatch):
    speak(tmp_path / "corpus" / "clips" / "x.wav")
    paths = {"train": "corpus/clips/x.wav", "val": "clips\\x.wav", "test": tmp_path / "corpus/clips/x.wav"}
    for split, path in paths.items():
        (tmp_path / "corpus" / f"{split}.csv").write_text(f"Path,Sentence\n{path},a\n")
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus("corpus", "asr", subsets={"test": "test.csv, val"})
    assert [len(split) for split in (corpus.train, corpus.dev, corpus.test)] == [1, 1, 2]


def test_common_voice_without_mp3_and_librispeech_with_endings_in_capitals(tmp_path):
    root = make_table(tmp_path / "table")
    for path in root.glob("*.tsv"):
        path.write_text(path.read_text().replace(".mp3", ""))
    assert len(open_corpus(root, "asr").train) == 12
    for path in make_librispeech(tmp_path / "libri").glob("*/*/*/*.flac"):
        path.rename(path.with_suffix(".FLAC"))
    assert len(open_corpus(tmp_path / "libri", "asr").train) == 3


def test_a_layout_is_known_by_the_subsets_that_are_asked_for(tmp_path):
    root = make_librispeech(tmp_path)
    for name in ("durations.tsv", "._train.tsv", "._test.tsv", "notes.jsonl", "a.csv"):
        (root / name).write_text("a\tb\n")
    os.mkfifo(root / "train.tsv")
    assert open_corpus(root, "asr").kind == "LibriSpeech"
    (root / "train.tsv").unlink()
    make_table(root, splits=("dev", "test"))  # two of the three
    assert open_corpus(root, "asr").kind == "LibriSpeech"
    for name in ("dev", "test"):
        (root / f"{name}.tsv").unlink()
    make_table(root, splits=("train", "mine"))
    assert open_corpus(root, "asr", splits=("dev", "test")).kind == "LibriSpeech"
    (root / "train.tsv").unlink()
    assert open_corpus(root, "asr", subsets={"train": "mine"}, splits=("train",)).kind == "table"
    with pytest.raises(UserError, match=r"mine\.tsv|other\.tsv|train-clean-360"):
        open_corpus(root, "asr", subsets={"train": "train-clean-360"}, splits=("train",))
    for name in ("dev", "test"):
        (root / f"{name}-clean").rename(root / f"{name}-other")
    (root / "train-clean-100").rename(root / "train-other-500")
    with pytest.raises(UserError, match=r"train-clean-100: there is no such train subset.*--train"):
        open_corpus(root, "asr")
    make_slurp(tmp_path / "slurp")
    (tmp_path / "slurp" / "dataset" / "slurp").rename(tmp_path / "annotations")
    for path in (tmp_path / "annotations").iterdir():
        path.rename(tmp_path / "slurp" / path.name)
    assert open_corpus(tmp_path / "slurp", "slu").kind == "SLURP"


def test_names_that_begin_with_a_dot_are_passed_over(tmp_path):
    for path in list(make_librispeech(tmp_path).glob("*/*/*/*")):
        path.with_name(f"._{path.name}").write_bytes(b"\xa3\xff")
    (tmp_path / "train-clean-100" / "84" / ".DS_Store").write_bytes(b"\xff")
    hidden = tmp_path / "train-clean-100" / ".cache" / "1" / "x.trans.txt"
    hidden.parent.mkdir(parents=True)
    hidden.write_bytes(b"x A\n")
    corpus = open_corpus(tmp_path, "asr")
    assert (len(corpus.train), corpus.skipped) == (3, {})


def test_a_pipe_in_a_corpus_is_skipped_and_never_waited_for(tmp_path):
    path = make_kaldi(tmp_path) / "WAVE" / "train" / "train.u-1.WAV"
    path.unlink()
    os.mkfifo(path)
    unblock = threading.Timer(5, path.write_bytes, [b""])  # or the test would never end if it failed
    unblock.daemon = True
    unblock.start()
    (reason,) = open_corpus(tmp_path, "asr", skip_bad=True).skipped
    unblock.cancel()
    assert reason == f"{path}: is no regular file"


def test_the_splits_that_are_there_are_opened_for_evaluation(tmp_path):
    root, splits = make_table(tmp_path, splits=("test",)), ("dev", "test")
    corpus = open_corpus(root, "asr", splits=splits)
    assert (corpus.train, corpus.dev, len(corpus.test)) == ([], [], 12)
    for asked in (("dev",), ("train", "dev", "test")):
        with pytest.raises(UserError, match=rf"{asked[0]}\.tsv: there is no such {asked[0]} subset.*--{asked[0]}"):
            open_corpus(root, "asr", splits=asked)
    with pytest.raises(UserError, match=r"mine\.tsv: there is no such dev subset"):  # what is named must be there
        open_corpus(root, "asr", splits=splits, subsets={"dev": "mine"})
    make_table(root, splits=("train",), count=1)
    assert len(open_corpus(root, "asr", splits=splits).test) == 12  # one utterance is too few to lend one
    make_table(root, splits=("train",))
    assert open_corpus(root, "asr", splits=splits).dev
    (root / "test.tsv").unlink()
    corpus = open_corpus(root, "asr", splits=splits)
    assert corpus.dev and not corpus.test


def test_a_corpus_is_known_by_what_is_in_it_and_not_by_where_it_is(tmp_path):
    first = open_corpus(make_table(tmp_path / "a"), "asr")
    assert re.fullmatch("[0-9a-f]{64}", first.fingerprint)
    assert open_corpus((tmp_path / "a").rename(tmp_path / "b"), "asr").fingerprint == first.fingerprint
    seen = {first.fingerprint}
    for change in ({"name": "x"}, {"text": "x"}, {"intent": "x"}, {"seconds": 0.502}):
        seen.add(replace(first, dev=[replace(first.dev[0], **change), *first.dev[1:]]).fingerprint)
    seen.add(replace(first, dev=first.test, test=first.dev).fingerprint)
    seen.add(replace(first, kind="Kaldi").fingerprint)
    assert len(seen) == 7
    same = replace(first, dev=[replace(u, seconds=u.seconds + 1e-5) for u in first.dev])
    assert same.fingerprint == first.fingerprint


def test_what_is_left_out_of_transcripts_is_said_once_with_how_often(tmp_path, caplog):
    caplog.set_level("INFO")
    root = write_manifest(tmp_path, ".jsonl", ["a, b, <unk>", "c\u202e?"], objects)
    open_corpus(root, "asr")
    (line,) = [record.getMessage() for record in caplog.records if "--raw-text" in record.getMessage()]
    assert ": , (6), <unk> (3), " in line and "U+202E (3)" in line and "? (3)" in line
    caplog.clear()
    assert open_corpus(root, "asr", raw_text=True).test[0].text == "a, b, <unk>"
    assert "--raw-text" not in caplog.text


def test_the_folder_of_a_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert data.corpus_folder("demo") is None
    assert str(data.corpus_folder("mine")) == "mine"
    for path in ("nowhere", "x" * 5_000):
        with pytest.raises(UserError, match="no such folder"):
            data.corpus_folder(path)


def make_kaldi(root, splits=("train", "dev", "test"), count=4):
    for split in splits:
        folder = root / split
        folder.mkdir(parents=True)
        lines = {name: [] for name in ("wav.scp", "text", "utt2spk", "utt2intent")}
        for i in range(count):
            name = f"{split}.u-{i}"
            speak(root / "WAVE" / split / f"{name}.WAV")
            lines["wav.scp"].append(f"{name}\tWAVE/{split}/{name}.WAV")
            lines["text"].append(f"{name} ПРИВЕТ {i}")
            lines["utt2spk"].append(f"{name} s{i % 2}")
            lines["utt2intent"].append(f"{name} {('hello', 'bye')[i % 2]}")
        for name, found in lines.items():
            (folder / name).write_text("\n".join(found) + "\n", encoding="utf-8")
    return root


def test_a_kaldi_data_directory(tmp_path, caplog):
    caplog.set_level("INFO")
    root = make_kaldi(tmp_path)
    corpus = open_corpus(root, "asr")
    assert [(u.name, u.text, u.speaker) for u in corpus.dev] == [
        (f"dev.u-{i}", f"ПРИВЕТ {i}", f"s{i % 2}") for i in range(4)
    ]
    assert [u.intent for u in open_corpus(root, "slu").test] == ["hello", "bye"] * 2
    for folder in ("train", "dev", "test"):
        for file in ("utt2spk", "utt2intent"):
            (root / folder / file).unlink()
    assert open_corpus(root, "asr").dev[0].speaker == ""
    assert "utt2intent" not in caplog.text
    assert open_corpus(root, "slu").test[1].intent == "ПРИВЕТ 1"
    assert "has no utt2intent" in caplog.text


def test_paths_of_a_kaldi_data_directory_may_be_from_the_current_folder(tmp_path, monkeypatch):
    root = make_kaldi(tmp_path / "data")
    (root / "WAVE").rename(tmp_path / "WAVE")
    with pytest.raises(UserError, match="is missing"):
        open_corpus(root, "asr")
    monkeypatch.chdir(tmp_path)
    assert len(open_corpus("data", "asr").train) == 4


def test_a_kaldi_archive_is_named_as_such(tmp_path):
    path = make_kaldi(tmp_path) / "train" / "wav.scp"
    path.write_text(path.read_text().replace("WAVE/train/train.u-2.WAV", "raw/wav.1.ark:1234"))
    (reason,) = open_corpus(tmp_path, "asr", skip_bad=True).skipped
    assert "train.u-2 is in a Kaldi archive, which is not read; write its audio to a file" in reason


def test_a_command_in_wav_scp_is_refused_and_never_run(tmp_path):
    root, trap = make_kaldi(tmp_path), tmp_path / "trap"
    path = root / "train" / "wav.scp"
    path.write_text(path.read_text().replace("WAVE/train/train.u-2.WAV", f"touch {trap} |"))
    corpus = open_corpus(root, "asr", skip_bad=True)
    assert [u.name for u in corpus.train] == ["train.u-0", "train.u-1", "train.u-3"]
    (reason,) = corpus.skipped
    assert "train.u-2" in reason and "command" in reason
    assert not trap.exists()


def test_a_kaldi_data_directory_that_cannot_be_used_says_why(tmp_path):
    root = make_kaldi(tmp_path)
    path = root / "train" / "text"
    path.write_text(path.read_text().replace("train.u-1 ", "train.u-7 ").replace("ПРИВЕТ 3", ""))
    corpus = open_corpus(root, "asr", skip_bad=True)
    found = sorted(reason.removeprefix(f"{root}/") for reason in corpus.skipped)
    assert found == [
        "train.u-3: its transcript is empty",
        "train/text: has no line for train.u-1",
        "train/wav.scp: has no line for train.u-7",
    ]
    with open(root / "test" / "wav.scp", "a") as file:
        file.write("test.u-0 once/more.wav\nno-path\n")
    found = open_corpus(root, "asr", splits=["test"], skip_bad=True).skipped
    assert [reason.removeprefix(f"{root}/") for reason in found] == [
        "test/wav.scp: line 5 has test.u-0 once more",
        "test/wav.scp: no-path has no path",
    ]
    (root / "dev" / "segments").write_text("a b 0 1\n")
    with pytest.raises(UserError, match="segments"):
        open_corpus(root, "asr")


def make_slurp(root, audio="slurp_real", count=3):
    """Annotations as SLURP has them; `intent` of the second lacks the scenario, as on 1.5 % of the real lines."""
    for split in ("train", "devel", "test"):
        lines = []
        for i in range(count):
            scenario, action = (("weather", "query"), ("iot", "hue_lightoff"))[i % 2]
            files = [f"audio-{split}-{i}.flac", f"audio-{split}-{i}-headset.flac"]
            for file in files:
                speak(root / audio / file)
            entry = {
                "slurp_id": i,
                "sentence": "will it rain",
                "intent": action if i == 1 else f"{scenario}_{action}",
                "scenario": scenario,
                "action": action,
                "recordings": [{"file": file, "wer": 0.0} for file in files],
            }
            lines.append(json.dumps(entry))
        path = root / "dataset" / "slurp" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("audio", ["slurp_real", "audio/slurp_real", "scripts/audio/slurp_real"])
def test_slurp(tmp_path, audio):
    corpus = open_corpus(make_slurp(tmp_path, audio), "slu")
    assert [u.intent for u in corpus.dev] == ["weather_query"] * 2 + ["iot_hue_lightoff"] * 2 + ["weather_query"] * 2
    assert len(corpus.train) == 6
    assert open_corpus(tmp_path, "asr").test[0].text == "WILL IT RAIN"


def test_slurp_without_its_audio_and_with_names_that_leave_it(tmp_path):
    make_slurp(tmp_path)
    secret = tmp_path.parent / "secret.flac"
    speak(secret)
    path = tmp_path / "dataset" / "slurp" / "train.jsonl"
    lines = path.read_text().splitlines()
    for i, name in enumerate(["../../secret.flac", str(secret), "..", "", "a\0.flac", "\x1b[2J.flac", "a" * 300]):
        entry = json.loads(lines[0])
        entry["recordings"] = [{"file": name}]
        path.write_text("\n".join([*lines, json.dumps(entry)]))
        corpus = open_corpus(tmp_path, "slu", skip_bad=True)
        assert len(corpus.train) == 6, i
        assert len(corpus.skipped) == 1
    for folder in tmp_path.glob("slurp_*"):
        folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="slurp_real"):
        open_corpus(tmp_path, "slu")


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"scenario": "\\u001b[2J", "action": "x", "sentence": "x", "recordings": []}',
        '{"scenario": "", "action": "x", "sentence": "x", "recordings": []}',
        "{",
        "[]",
        "7",
        '{"scenario": "a"}',
        '{"scenario": 1, "action": 2, "sentence": "x", "recordings": [{}]}',
        '{"scenario": 1, "action": 2, "sentence": "x", "recordings": 5}',
    ],
)
def test_a_malformed_annotation_is_skipped_with_its_line(tmp_path, line):
    path = make_slurp(tmp_path) / "dataset" / "slurp" / "train.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"1 of 19 .*train.jsonl: line 4"):
        open_corpus(tmp_path, "slu")
    assert len(open_corpus(tmp_path, "slu", skip_bad=True).train) == 6


@pytest.mark.parametrize(
    ("rate", "channels", "frames"), [(16_000, 1, 2**30), (1, 1, 8_000), (2**31 - 1, 1, 8_000), (16_000, 2_000, 10**6)]
)
def test_audio_headers_that_promise_too_much_are_refused_before_anything_is_allocated(tmp_path, rate, channels, frames):
    path = tmp_path / "x.wav"
    size = min(2**32 - 100, frames * channels)
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        size + 36,
        b"WAVE",
        b"fmt ",
        16,
        1,
        channels,
        rate,
        min(2**32 - 1, rate * channels),
        channels,
        8,
        b"data",
        size,
    )
    path.write_bytes(head + bytes(16_000))
    with pytest.raises(UserError, match="x.wav: "):
        data.read_audio(path)
    if (rate, channels) != (16_000, 1):  # of that one, libsndfile tells what the file really holds
        with pytest.raises(UserError, match="no recording of speech|not readable"):
            data.checked("", data.Utterance("x", [path], 0.0), "slu", set())


def test_what_is_skipped_is_said_without_control_characters(caplog):
    corpus = data.Corpus("x")
    corpus.skip("a\x1b[2Jb\r\u202ec")
    assert list(corpus.skipped) == ["a?[2Jb??c"]
    assert "\x1b" not in caplog.text


def test_speed_perturbation_plays_audio_faster_or_slower_with_its_pitch():
    time = np.arange(32_000) / 16_000
    tone = np.sin(2 * np.pi * 400 * time).astype(np.float32)
    utterances = [data.Utterance(str(i), tone, 2.0, "A", "b") for i in range(400)]
    played = data.perturb_speed(utterances, 0.2, np.random.default_rng(0))
    counts = Counter(u.speed for u in played)
    assert sorted(counts) == [0.8, 1.0, 1.2]
    assert min(counts.values()) > 100
    for before, u in zip(utterances[:20], played):
        assert (u.name, u.text, u.intent, u.audio) == (before.name, before.text, before.intent, before.audio)
        samples = data.waveform(u)
        assert len(samples) == round(u.seconds * 16_000) == round(32_000 / u.speed)
        spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
        assert spectrum.argmax() * 16_000 / len(samples) == pytest.approx(400 * u.speed, abs=1)
    again = data.perturb_speed(utterances, 0.2, np.random.default_rng(0))
    assert [u.speed for u in again] == [u.speed for u in played]


def test_an_epoch_has_every_utterance_once_and_no_speed_that_does_not_fit():
    needed = (399 + data.frames_needed("ZERO") * 320) / 16_000
    utterances = [data.Utterance("fits", None, needed, "ZERO"), data.Utterance("long", None, 30.0, "ZERO")]
    seen = set()
    for seed in range(20):
        batches = data.training_batches(utterances, BASE, True, 0.5, 40.0, np.random.default_rng(seed))
        found = {u.name: u.speed for batch in batches for u in batch}
        assert set(found) == {"fits", "long"}
        assert found["fits"] <= 1 <= found["long"]
        seen |= set(found.values())
    assert seen == {0.5, 1.0, 1.5}


def test_utterances_too_short_for_a_frame_or_their_transcript_are_skipped():
    def utterance(name, samples, text):
        return data.Utterance(name, None, samples / 16_000, text)

    utterances = [
        utterance("no frame", 399, "A"),
        utterance("one frame", 400, "A"),
        utterance("two letters", 400, "AB"),
        utterance("repeat", 720, "AA"),
        utterance("fits", 720, "AB"),
    ]
    corpus = data.Corpus("x")
    assert [u.name for u in data.usable(utterances, corpus, BASE, ctc=True)] == ["one frame", "fits"]
    assert len(corpus.skipped) == 3
    usable = data.usable(utterances, data.Corpus("x"), BASE, ctc=False)
    assert [u.name for u in usable] == ["one frame", "two letters", "repeat", "fits"]


@pytest.mark.parametrize("task", ["asr", "slu"])
def test_the_demo_trains_on_what_the_seed_gives_and_tests_on_the_same(monkeypatch, task):
    monkeypatch.setattr(data, "DEMO_SIZES", {"train": 30, "dev": 4, "test": 4})
    a, b, c = (open_corpus("demo", task, seed) for seed in (1, 1, 2))
    for first, second in zip(a.train, b.train, strict=True):
        assert (first.text, first.intent) == (second.text, second.intent)
        assert np.array_equal(first.audio, second.audio)
    assert any(x.text != y.text for x, y in zip(a.train, c.train))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert not any(x.text == y.text and np.array_equal(x.audio, y.audio) for x in a.train for y in a.test)
    assert all(
        x.text == y.text and np.array_equal(x.audio, y.audio)
        for x, y in zip(a.dev + a.test, c.dev + c.test, strict=True)
    )
    for u in a.train:
        samples = u.audio
        assert np.isfinite(samples).all()
        assert 0.4 < np.abs(samples).max() <= 0.5
        assert len(samples) == round(u.seconds * 16_000)
        assert u.text == data.normalise(u.text) != ""


def test_every_word_of_the_demo_can_be_spoken():
    words = {word for commands in data.SENTENCES.values() for command in commands for word in command.split()} - {
        "#"
    } | set(data.ASR_WORDS)
    assert words <= set(data.WORDS)
    assert {phone for word in data.WORDS.values() for phone in word} <= set(data.PHONES)
    assert len({data.WORDS[word] for word in data.ASR_WORDS}) == len(data.ASR_WORDS)  # no two sound alike


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "missing"),
        ("no bytes", "not readable audio"),
        ("not audio", "not readable audio"),
        ("no transcript", "transcript is empty"),
        ("not a line", "not `ID TEXT`"),
    ],
)
def test_each_bad_utterance_is_skipped_with_its_reason_and_too_many_are_an_error(tmp_path, how, reason):
    make_librispeech(tmp_path, 40)
    folder = tmp_path / "train-clean-100" / "84" / "121123"
    transcripts = folder / "84-121123.trans.txt"
    for i, allowed in ((0, True), (1, False)):  # 1 of 120 is under one per cent, 2 are not
        path = folder / f"84-121123-{i:04}.flac"
        if how == "no transcript":
            transcripts.write_text(
                transcripts.read_text().replace(f"84-121123-{i:04} GO ON NUMBER {'AB'[i]}", f"84-121123-{i:04} ...")
            )
        elif how == "not a line":
            transcripts.write_text(transcripts.read_text().replace(f"84-121123-{i:04} ", f"../84-121123-{i:04} "))
        else:
            path.unlink()
            make_bad(path, how)
        if allowed:
            corpus = open_corpus(tmp_path, "asr")
            assert len(corpus.train) == 39
            (why,) = corpus.skipped
            assert reason in why
        else:
            with pytest.raises(UserError, match="2 of 120"):
                open_corpus(tmp_path, "asr")
            assert len(open_corpus(tmp_path, "asr", skip_bad=True).skipped) == 2


def test_folders_that_are_no_corpus_are_refused(tmp_path):
    for path, match in ((tmp_path, "no known corpus"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(UserError, match=match):
            open_corpus(path, "asr")
    for folder in ("train-clean-100/1/2", "dev-clean", "test-clean"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "train-clean-100" / "1" / "2" / "1-2.trans.txt").write_text("\n")
    with pytest.raises(UserError, match="train split has no usable utterance"):
        open_corpus(tmp_path, "asr")


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_an_utterance_has_the_seconds_that_it_takes_at_any_rate(tmp_path, rate):
    for path in make_librispeech(tmp_path).glob("*/*/*/*.flac"):
        speak(path, 0.75, rate)
    assert [u.seconds for u in open_corpus(tmp_path, "asr").test] == [0.75] * 3


def test_a_change_of_rate_or_channels_is_said_once(tmp_path, caplog):
    caplog.set_level("INFO")
    for path in make_librispeech(tmp_path).glob("*/*/*/*.flac"):
        soundfile.write(path, np.zeros((4_000, 2)), 8_000)
    open_corpus(tmp_path, "asr")
    assert caplog.text.count("8000 Hz, resampled to 16000; 2 channels, mixed down") == 1


def test_parts_of_recordings_are_refused_also_the_first_part_of_each(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.ones(32_000) * 0.1, 16_000)
    for row in ({"start": 0.5}, {"start_time": "1"}, {"offset": 0.5, "duration": 1}):
        (tmp_path / "test.jsonl").write_text(json.dumps({"path": "x.wav", "text": "a", **row}) + "\n")
        with pytest.raises(UserError, match="part of x.wav; cut"):
            data.open_corpus(tmp_path, "asr", splits=("test",))
    for duration, usable in ((2, True), (1, False), ("?", True)):
        row = {"path": "x.wav", "text": "a", "offset": 0, "duration": duration}
        (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
        if usable:
            assert data.open_corpus(tmp_path, "asr", splits=("test",)).test[0].seconds == 2
        else:
            with pytest.raises(UserError, match="only 1 s of its 2 are meant"):
                data.open_corpus(tmp_path, "asr", splits=("test",))


def test_a_manifest_may_be_named_json_and_lie_beside_its_audio(tmp_path):
    """As NeMo names its manifests, and datasets its AudioFolder."""
    (tmp_path / "data" / "test").mkdir(parents=True)
    soundfile.write(tmp_path / "data" / "test" / "x.wav", np.ones(9_000) * 0.1, 16_000)
    row = {"file_name": "x.wav", "transcription": "a"}
    (tmp_path / "data" / "test" / "metadata.json").write_text(json.dumps(row) + "\n")
    corpus = data.open_corpus(tmp_path, "asr", subsets={"test": "data/test/metadata"}, splits=("test",))
    assert [u.text for u in corpus.test] == ["A"]
