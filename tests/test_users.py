"""What users do with the program: their corpora, their fine-tuned models, their runs watched, their long recordings."""

import json
import math
import re
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch
from conftest import LETTERS, tiny
from test_checkpoints import write_ctc
from test_data import make_kaldi, make_librispeech, make_table
from test_script import FAST, report_of, run

import data
import sslprune
import transformer
from flops import SAMPLES, Shape, UserError, cost
from gates import METHODS


def test_the_run_is_watched(small, capsys, monkeypatch, tmp_path):
    out, losses, loss = tmp_path / "run", [], sslprune.SpeechModel.loss

    def recorded(*arguments):
        losses.append(loss(*arguments))
        return losses[-1]

    monkeypatch.setattr(sslprune.SpeechModel, "loss", recorded)
    updates = "--dense-updates 4 --prune-updates 8 --finetune-updates 4 --evaluate-updates 3 --warmup-share 0.5".split()
    status, printed, _ = run(capsys, "--task", "asr", "--budget", "0.8", "--method", "sepsize", "--out", out, *updates)
    assert status == 0
    entries, report = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], report_of(out)
    moments = [
        ("dense", 3),
        ("dense", 4),
        ("prune", 0),
        ("prune", 3),
        ("prune", 6),
        ("prune", 8),
        ("finetune", 0),
        ("finetune", 3),
        ("finetune", 4),
    ]
    assert [(entry["phase"], entry["update"]) for entry in entries] == moments
    for entry in entries:
        assert list(entry) == ["phase", "update", "loss", "lr", "target", "expected", "multipliers", "dev"]
        assert (entry["loss"] is None) == (entry["update"] == 0)
        assert (entry["multipliers"] is None) == (entry["phase"] != "prune")
    # The loss is the task's, without the penalty, and a mean over the updates since the entry before.
    spans = [(0, 3), (3, 4), (4, 7), (7, 10), (10, 12), (12, 15), (15, 16)]
    means = [torch.stack(losses[first:last]).mean().item() for first, last in spans]
    assert [entry["loss"] for entry in entries if entry["update"]] == pytest.approx(means)
    assert max(entries[5]["multipliers"][0]) > 0.1  # so that there was a penalty
    # The rate is the weights' at the last update before: of 4 the 3rd and 4th, of 8 the 3rd, 6th and 8th.
    stages = [1, 0.05**0.5, 1, 0.05**0.25, 0.05**0.75, 1, 0.05**0.5]
    assert [entry["lr"] for entry in entries if entry["update"]] == pytest.approx([1e-3 * stage for stage in stages])
    targets = [1, 1, 1, 1 - 0.2 * 0.75, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert [entry["target"] for entry in entries] == pytest.approx(targets)
    assert entries[1]["dev"] == report["metrics"]["dense"]["dev"]["word_error_rate"]
    assert entries[-1]["dev"] == report["metric"]["dev"]
    assert entries[5]["expected"] == report["expected"]
    counts = {(kind, i): n for kind, row in report["expected_counts"].items() for i, n in enumerate(row)}
    dense = Shape.from_dict(report["dense"]["shape"])
    for constraint, expected in zip(METHODS["sepsize"], report["expected"]):
        low, high = (  # the counts are rounded to a tenth, and a cost grows with each of them
            constraint.measure(cost(dense.with_counts({place: n + off for place, n in counts.items()}), SAMPLES))
            for off in (-0.05, 0.05)
        )
        assert low <= expected * constraint.measure(cost(dense, SAMPLES)) <= high
    assert entries[0]["expected"] == [1, 1]
    assert entries[6]["expected"] == entries[8]["expected"] == report["kept"]  # right after slicing
    assert re.search(
        r"prune 6/8 .*loss \d\.\d+  gates keep \d+\.\d% of the frontend parameters, \d+\.\d% of the other parameters"
        r" \(target 80\.0%\)  dev word error rate \d+\.\d\d%",
        printed,
    )
    phases = polylines(out)
    lines = [sum(phases[i : i + 3], []) for i in range(0, len(phases), 3)]
    assert [len(line) for line in lines] == [9] * 4  # the error, two expected costs and the target
    assert [x for x, _ in lines[0]] == pytest.approx(
        [50 + 600 * n / 16 for n in (3, 4, 4, 7, 10, 12, 12, 15, 16)], abs=0.1
    )
    assert [y for _, y in lines[3]] == pytest.approx([230 + 160 * (1 - target) for target in targets], abs=0.1)


def polylines(out):
    """The points of the lines in a run's picture."""
    lines = ElementTree.parse(out / "curve.svg").getroot().findall("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines]


def test_the_error_is_measured_twenty_times_a_phase_and_the_loss_is_the_mean_since(
    small, capsys, monkeypatch, tmp_path
):
    losses, loss = [], sslprune.SpeechModel.loss

    def recorded(*arguments):
        losses.append(loss(*arguments))
        return losses[-1]

    monkeypatch.setattr(sslprune.SpeechModel, "loss", recorded)
    flags = "--task slu --budget 1 --dense-updates 40 --prune-updates 0 --finetune-updates 0".split()
    assert run(capsys, *flags, "--out", tmp_path / "run")[0] == 0
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in entries[:20]] == list(range(2, 42, 2))
    means = [sum(losses[i : i + 2]).item() / 2 for i in range(0, 40, 2)]
    assert [entry["loss"] for entry in entries[:20]] == pytest.approx(means)


def test_what_was_said_is_beside_what_was_recognised(small, capsys, monkeypatch, tmp_path):
    corpus = make_table(tmp_path / "corpus", count=20)
    monkeypatch.setattr(
        sslprune.SpeechModel, "transcribe", lambda self, waveforms, lengths: ["x\ty\n"] * len(waveforms)
    )
    flags = ["--task", "asr", "--budget", "0.8", "--data", corpus, "--out", tmp_path / "run", *FAST]
    assert run(capsys, *flags)[0] == 0
    header, *rows = (tmp_path / "run" / "test.tsv").read_text(encoding="utf-8").splitlines()
    assert header == "name\treference\thypothesis"
    assert sorted(rows)[0] == "test-0.mp3\tGRÜSS GOTT NUMMER 0\tX Y"
    assert len(rows) == 20


def test_evaluation_while_training_changes_nothing(small, capsys, tmp_path):
    for name, every in (("a", "1"), ("b", "0")):
        arguments = f"--task slu --budget 0.8 --layer-drop 0.3 --time-mask 0.3 --evaluate-updates {every}".split()
        assert run(capsys, *arguments, *FAST, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "a" / "model.pt").read_bytes() == (tmp_path / "b" / "model.pt").read_bytes()
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in "ab"]
    assert lines == [8, 2]  # of b, what the report has anyway
    # The dense phase ends after a third. Nothing was measured in between, so no line leads from there to the end.
    assert [[x for x, _ in line] for line in polylines(tmp_path / "b")] == [[250], [], [650]] * 3


@pytest.mark.parametrize(
    ("make", "task", "words"),
    [
        (make_table, "asr", "GRÜSS"),
        (make_table, "slu", "frage"),
        (make_kaldi, "asr", "ПРИВЕТ"),
        (make_kaldi, "slu", "hello"),
    ],
)
def test_users_own_corpora_run_end_to_end(small, capsys, tmp_path, make, task, words):
    corpus = make(tmp_path / "corpus", splits=("train", "test"), count=20)
    status, printed, errors = run(
        capsys, "--task", task, "--budget", "0.8", "--data", corpus, "--out", tmp_path / "out", *FAST
    )
    assert (status, errors) == (0, "")
    assert "no dev split" in printed
    assert words in (tmp_path / "out" / "test.tsv").read_text()
    recording = next(path for path in corpus.rglob("*") if path.suffix in (".mp3", ".WAV"))
    assert run(capsys, "--predict", tmp_path / "out" / "model.pt", recording)[0] == 0
    assert run(capsys, "--evaluate", tmp_path / "out" / "model.pt", "--data", corpus, "--train", "train")[0] == 0


def test_a_fine_tuned_ctc_model_is_used_as_it_is_and_pruned_from_where_it_is(golden, capsys, tmp_path):
    """Its head is kept, its error measured before pruning, and outputs are added for characters that it lacks."""
    (tmp_path / "from").mkdir()
    letters = dict(zip("|GONUMBER A"[:9], range(9)))
    bias = torch.zeros(11)
    bias[letters["G"]] = 100  # so that it is all that is heard
    write_ctc(tmp_path / "from", golden, letters | {"<pad>": 10, "[UNK]": 9}, bias, pad_token_id=10)
    corpus = make_librispeech(tmp_path / "LibriSpeech")
    recording = next(corpus.rglob("*.flac"))
    status, printed, _ = run(capsys, "--predict", tmp_path / "from", recording)
    assert status == 0
    assert printed == f"{recording}\tG\n"
    arguments = ["--checkpoint", tmp_path / "from", "--data", corpus, "--out", tmp_path / "out", *FAST[2:]]
    status, printed, errors = run(capsys, *"--task asr --budget 0.8 --method size".split(), *arguments)
    assert (status, errors) == (0, "")
    assert "had no output for A C" in printed
    assert "word_error_rate" in report_of(tmp_path / "out")["metrics"]["dense"]["test"]
    assert printed.index("before pruning: dev") < printed.index("phase 1 of 2, prune")
    labels = sslprune.load(tmp_path / "out" / "model.pt").labels
    assert labels[:2] == ["<pad>", "|"]
    assert {"[UNK]", "A", "C", "G"} <= set(labels)


def test_added_outputs_change_nothing_of_the_others():
    model, waveforms = sslprune.SpeechModel(tiny(), "asr", ["<pad>", "|", "A"]).eval(), torch.randn(1, 5_000)
    with torch.no_grad():
        before, _ = model(waveforms)
        model.add_labels(["B", "C"])
        after, _ = model(waveforms)
    assert torch.allclose(after[..., :3], before, atol=1e-6)
    assert torch.allclose(after[..., 3:], model.head.bias[:3].min())  # as unlikely as any
    assert model.outputs == {"<pad>": 0, "|": 1, "A": 2, "B": 3, "C": 4}
    assert model.head.weight.requires_grad


# --- Recordings of any length ---


def test_a_long_recording_has_the_intent_of_most_of_it():
    class Model(sslprune.SpeechModel):
        def forward(self, waveforms, lengths=None):
            return torch.tensor([[1.0, 0.0] if waveforms.shape[1] > 900_000 else [0.0, 2.0]]), None

    assert Model(tiny(), "slu", ["first", "rest"]).transcribe(torch.randn(1, 70 * 16_000)) == ["first"]


def test_one_path_is_one_path(tmp_path):
    model = sslprune.SpeechModel(tiny(), "slu", ["a"]).eval()
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).normal(0, 0.1, 9_000), 16_000)
    assert (
        model.predict(str(tmp_path / "x.wav"))
        == model.predict(tmp_path / "x.wav")
        == model.predict([tmp_path / "x.wav"])
        == ["a"]
    )


def test_many_files_are_recognised_in_batches_as_each_alone(tmp_path, monkeypatch):
    model, rng, calls = sslprune.SpeechModel(tiny(seed=3), "asr", LETTERS).eval(), np.random.default_rng(0), []
    files = [tmp_path / f"{i}.wav" for i in range(30)]
    for file in files:
        soundfile.write(file, rng.normal(0, 0.1, rng.integers(5_000, 60_000)), 16_000, subtype="FLOAT")
    alone = [model.predict(file)[0] for file in files]
    model.register_forward_hook(lambda module, inputs, _: calls.append(tuple(inputs[0].shape)))
    monkeypatch.setattr(transformer, "GROUP_SECONDS", 30)
    assert model.predict(files) == alone
    assert len(calls) < 10
    (tmp_path / "3.wav").write_text("no audio")
    found = list(model.recognise(files))
    assert isinstance(found[3], UserError)
    assert found[:3] + found[4:] == alone[:3] + alone[4:]


@pytest.mark.parametrize("piece", [60, 2])  # the longest of the batch is within it, or is recognised in pieces
def test_a_padded_batch_is_transcribed_as_each_utterance_alone(monkeypatch, piece):
    """Also where features of 0, which padding has, give letters."""
    monkeypatch.setattr(transformer, "PIECE_SECONDS", piece)
    monkeypatch.setattr(transformer, "OVERLAP_SECONDS", 1)
    torch.manual_seed(0)
    model = sslprune.SpeechModel(tiny(seed=3), "asr", LETTERS).eval()
    with torch.no_grad():
        model.head.bias.copy_(torch.linspace(0, 0.5, len(LETTERS)))
    lengths = torch.tensor([80_000, 500, 16_000, 31_000, 32_001, 47_000, 62_345])
    waveforms = torch.randn(len(lengths), 80_000)
    alone = [model.transcribe(waveform[None, :n])[0] for waveform, n in zip(waveforms, lengths.tolist())]
    assert model.transcribe(waveforms, lengths) == alone
    silence = model.head(torch.zeros(model.head.in_features))
    assert LETTERS[silence.argmax()] == "Z"
    assert not all(text.endswith("Z") for text in alone)  # which a frame of padding would add


def test_the_pieces_of_a_long_recording_have_each_of_its_frames_once(monkeypatch):
    """Of every length: each sample is its own number, so that a frame's first sample says which frame it is."""
    monkeypatch.setattr(transformer, "PIECE_SECONDS", 2)
    monkeypatch.setattr(transformer, "OVERLAP_SECONDS", 1)
    monkeypatch.setattr(data, "decode", lambda outputs, labels: outputs.tolist())

    class Model(sslprune.SpeechModel):
        def forward(self, waveforms, *_):
            assert waveforms.shape[1] <= 32_000 + 80  # the last frame reaches over the next one's beginning
            first = waveforms[0, : waveforms.shape[1] - 400 + 1 : 320].long() // 320
            return torch.nn.functional.one_hot(first, 500)[None].float(), None

    model, samples = Model(tiny(), "asr", LETTERS), torch.arange(140_000.0)[None]
    near = [middle + off for middle in (48_000, 64_000) for off in range(-400, 401, 80)]
    for length in [*range(32_001, 140_000, 1_117), *near]:
        (found,) = model.transcribe(samples[:, :length])
        assert found == list(range((length - 400) // 320 + 1)), length


@pytest.mark.parametrize("task", ["asr", "slu"])
def test_a_long_recording_is_recognised_in_pieces_nearly_as_the_whole(tmp_path, task, caplog, monkeypatch):
    caplog.set_level("INFO")
    model, samples, longest = sslprune.SpeechModel(tiny(seed=1), task, LETTERS).eval(), [], []
    rng, outputs, decode = np.random.default_rng(0), [], data.decode
    monkeypatch.setattr(data, "decode", lambda best, labels: outputs.append(best) or decode(best, labels))
    for _ in range(60):
        samples += [data.synthesise(rng.choice(data.ASR_WORDS, 4), rng) * rng.uniform(0.3, 1)]
    samples = np.concatenate(samples)
    soundfile.write(tmp_path / "x.wav", samples, 16_000, subtype="FLOAT")
    whole = torch.from_numpy(data.waveform(data.Utterance("", samples, 0.0)))[None]
    first = model.encoder.frontend.convolutions[0]
    with torch.no_grad():
        patches = whole.unfold(1, 10, 5).transpose(1, 2)
        for found, expected in zip(first.moments_of_long(whole, 100_000), first.moments_of(patches, None)):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
        scores = model(whole)[0]
    model.register_forward_hook(lambda module, inputs, _: longest.append(inputs[0].shape[1]))
    monkeypatch.setattr(time, "monotonic", lambda: 11.0 * len(longest))
    (found,) = model.predict(tmp_path / "x.wav")
    assert max(longest) <= 60 * 16_000 + 400 < len(samples)
    pieces = math.ceil((len(samples) / 16_000 - 10) / 50)
    assert f"recognised 1 of {pieces} pieces" in caplog.text
    utterance = data.Utterance("x", tmp_path / "x.wav", len(samples) / 16_000, "A", "A")
    assert first.moments is None  # what the pieces shared is forgotten
    _, rows = sslprune.evaluate(model, data.Corpus("", test=[utterance]), "test", 100)
    assert rows == [("x", "A", found)] and max(longest) <= 60 * 16_000 + 400  # evaluation does the same
    # The model is random, its best outputs hardly better than others: they differ sooner than a trained one's.
    if task == "slu":
        assert scores[0, LETTERS.index(found)] > scores.max() - 0.05
    else:
        assert (outputs[0] != scores[0].argmax(-1)).float().mean() < 0.02
