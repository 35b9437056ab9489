"""What a run survives: death at any moment, signals, many processes, numbers that are not finite, a full disk."""

import copy
import hashlib
import itertools
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import LETTERS, TINY, as_processes, tiny
from test_data import make_librispeech, make_slurp
from test_script import FAST, refused, report_of, run
from torch import nn

import data
import sslprune
from gates import KINDS, Lagrangian, harden

RESUMABLE = (
    "--layer-drop 0.3 --time-mask 0.3 --batch-seconds 6 --evaluate-updates 2"
    " --dense-updates 2 --prune-updates 3 --finetune-updates 2"
).split()

def test_a_signal_during_an_evaluation_loses_nothing(small, capsys, monkeypatch, tmp_path):
    flags = (
        "--task slu --budget 0.8 --dense-updates 1 --prune-updates 2 --finetune-updates 1 --evaluate-updates 1".split()
    )
    moments, evaluate = [], sslprune.evaluate
    monkeypatch.setattr(sslprune, "evaluate", lambda *a, **more: moments.append(a) or evaluate(*a, **more))
    assert run(capsys, *flags, "--out", tmp_path / "whole")[0] == 0
    for moment in range(0, len(moments), 2):
        left = [moment]

        def stopping(*arguments, **more):
            if left[0] == 0:  # noqa: B023
                sslprune.stopping.append(signal.SIGTERM)
            left[0] -= 1  # noqa: B023
            return evaluate(*arguments, **more)

        monkeypatch.setattr(sslprune, "evaluate", stopping)
        assert run(capsys, *flags, "--out", tmp_path / str(moment))[0] == 128 + signal.SIGTERM
        monkeypatch.setattr(sslprune, "evaluate", evaluate)
        assert run(capsys, *flags, "--out", tmp_path / str(moment), "--resume")[0] == 0
        assert outcome(tmp_path / str(moment)) == outcome(tmp_path / "whole"), moment


def test_a_signal_to_one_of_two_processes_during_an_evaluation_loses_nothing(small, tmp_path):
    """They stop together, after the next update."""
    flags = "--task slu --budget 0.8 --dense-updates 1 --prune-updates 3 --finetune-updates 1 --evaluate-updates 1"

    def go(stop_at, out, *more):
        calls, evaluate = [], sslprune.evaluate

        def stopping(*arguments, **named):
            calls.append(1)
            if len(calls) == stop_at:
                sslprune.stopping.append(signal.SIGTERM)
            return evaluate(*arguments, **named)

        def work(rank):
            if rank == 1:
                sslprune.evaluate = stopping
            return sslprune.main([*flags.split(), *"--batch-seconds 6 --device cpu --out".split(), str(out), *more])

        return as_processes(2, work, tmp_path / "printed.txt")

    assert go(0, tmp_path / "whole") == [0, 0]
    assert go(4, tmp_path / "run") == [128 + signal.SIGTERM] * 2
    printed = (tmp_path / "printed.txt").read_text()
    assert "SIGTERM stopped the run (at prune" in printed
    assert "Traceback" not in printed
    assert go(0, tmp_path / "run", "--resume") == [0, 0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("signalled", [False, True])
def test_audio_that_is_never_read_ends_the_run_in_one_line_and_loses_nothing(
    small, capsys, monkeypatch, tmp_path, signalled
):
    flags = "--task slu --budget 0.8 --dense-updates 2 --prune-updates 3 --finetune-updates 2 --evaluate-updates 2"
    flags, calls, load_batch, never = flags.split(), [], data.load_batch, threading.Event()
    monkeypatch.setattr(data, "load_batch", lambda batch: calls.append(batch) or load_batch(batch))
    assert run(capsys, *flags, "--out", tmp_path / "whole")[0] == 0
    monkeypatch.setattr(sslprune, "PATIENCE", 60 if signalled else 1)
    of_dev = [number for number, batch in enumerate(calls) if "dev" in batch[0].name]
    for moment in (1, of_dev[-1]) if signalled else (of_dev[0],):  # in training and in evaluations
        left = [moment]

        def hanging(batch):
            left[0] -= 1  # noqa: B023
            if left[0] == -1:  # noqa: B023
                if signalled:
                    sslprune.stopping.append(signal.SIGTERM)
                never.wait()
            return load_batch(batch)

        monkeypatch.setattr(data, "load_batch", hanging)
        result = run(capsys, *flags, "--out", tmp_path / str(moment))
        if signalled:
            assert result[0] == 128 + signal.SIGTERM
        else:
            refused((result[0], "", result[2]), "could not be read in 1 s", "--resume")
        monkeypatch.setattr(data, "load_batch", load_batch)
        assert run(capsys, *flags, "--out", tmp_path / str(moment), "--resume")[0] == 0
        assert outcome(tmp_path / str(moment)) == outcome(tmp_path / "whole"), moment
    never.set()


def test_where_one_of_two_processes_cannot_read_its_audio_both_stop_before_the_update(small, tmp_path):
    flags = "--task slu --budget 0.8 --dense-updates 2 --prune-updates 2 --finetune-updates 1 --evaluate-updates 0"

    def go(out, hanging, *more):
        def work(rank):
            calls, load_batch = [], data.load_batch

            def load(batch):
                calls.append(1)
                if hanging and rank == 1 and len(calls) == 2:
                    time.sleep(60)
                return load_batch(batch)

            data.load_batch, sslprune.PATIENCE = load, 2 if hanging else 60
            return sslprune.main([*flags.split(), *"--batch-seconds 6 --device cpu --out".split(), str(out), *more])

        return as_processes(2, work, tmp_path / "printed.txt")

    assert go(tmp_path / "whole", False) == [0, 0]
    assert go(tmp_path / "run", True) == [2, 2]
    printed = (tmp_path / "printed.txt").read_text()
    assert printed.count("could not be read in 2 s") == 2
    assert "Traceback" not in printed
    assert go(tmp_path / "run", False, "--resume") == [0, 0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_folder_that_a_run_is_writing_to_is_refused_to_another(small, capsys, monkeypatch, tmp_path):
    arguments = ["--task", "slu", "--budget", "0.8", *FAST, "--out", tmp_path / "run"]
    results, train = [], sslprune.train

    def meanwhile(run_):
        if not results:
            results.append(run(capsys, *arguments, "--resume"))
        train(run_)

    monkeypatch.setattr(sslprune, "train", meanwhile)
    assert run(capsys, *arguments)[0] == 0
    refused(results[0], "another run is writing to it")
    assert not (tmp_path / "run" / "lock").exists()


def test_a_folder_in_which_another_run_began_a_moment_ago_is_refused(small, capsys, monkeypatch, tmp_path):
    """Between the look at the folder and its lock."""
    lock = sslprune.lock
    began = lambda folder, at_end: lock(folder, at_end) or (folder / "training.state").write_bytes(b"x")  # noqa: E731
    monkeypatch.setattr(sslprune, "lock", began)
    refused(run(capsys, *"--task slu --budget 0.8 --out".split(), tmp_path / "run", *FAST), "just written to it")
    assert (tmp_path / "run" / "training.state").read_bytes() == b"x"


def test_a_run_that_went_on_elsewhere_is_not_taken_up_from_an_older_state(dead, capsys, monkeypatch, tmp_path):
    lock, state = sslprune.lock, tmp_path / "run" / "training.state"
    newer = lambda folder, at_end: lock(folder, at_end) or state.write_bytes(b"y" + state.read_bytes())  # noqa: E731
    monkeypatch.setattr(sslprune, "lock", newer)
    refused(run(capsys, *dead, "--resume"), "just written to it", "--resume")
    assert state.read_bytes()[:1] == b"y"


def test_a_run_that_bad_audio_ended_goes_on_once_the_audio_is_mended(small, capsys, tmp_path):
    corpus = make_librispeech(tmp_path / "corpus", 30)
    bad = sorted(corpus.glob("train-clean-100/*/*/*.flac"))[3]
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-200])
    arguments = ["--task", "asr", "--budget", "0.9", "--data", corpus, "--out", tmp_path / "run", *FAST]
    for _ in range(2):  # it is counted anew
        status, _, errors = run(capsys, *arguments, *["--resume"] * (tmp_path / "run").exists())
        refused((status, "", errors.splitlines()[-1] + "\n"), bad.name, "--resume")
    bad.write_bytes(whole)
    assert run(capsys, *arguments, "--resume")[0] == 0
    assert report_of(tmp_path / "run")["skipped"] == 1


class Killed(BaseException):
    """Stands for a death: nothing catches it."""


def outcome(out):
    """What a run leaves, without the times."""
    report = report_of(out)
    del report["train_seconds"], report["dense"]["seconds"], report["pruned"]["seconds"]
    names = ("model.pt", "dense.pt", "metrics.jsonl", "curve.svg", "dev.tsv", "test.tsv")
    return report, *((out / name).read_bytes() if (out / name).exists() else None for name in names)


@pytest.mark.parametrize(
    ("task", "every", "arguments"),
    [
        ("asr", 1, "--budget 0.8 --dense-updates 1 --prune-updates 2 --finetune-updates 1".split()),
        ("slu", 3, ["--budget", "0.8", "--method", "sepsize", "--accumulate", "2"]),
        ("asr", 4, ["--budget", "1"]),
    ],
)
def test_a_run_that_died_at_any_moment_ends_in_the_same_bits(
    small, capsys, monkeypatch, tmp_path, task, every, arguments
):
    """At each of its saves, or at every so many of them."""
    corpus = {"asr": make_librispeech, "slu": make_slurp}[task](tmp_path / "corpus", count=6)
    bad = sorted(corpus.glob("slurp_real/audio-train-*.flac" if task == "slu" else "train-clean-100/*/*/*.flac"))[3]
    bad.write_bytes(bad.read_bytes()[:-200])  # truncated, which only training finds out
    arguments = ["--task", task, "--data", corpus, "--skip-bad", "--save-seconds", "0", *RESUMABLE, *arguments]
    saves, save, step = [], sslprune.Run.save, torch.optim.Adam.step
    monkeypatch.setattr(sslprune.Run, "save", lambda self: saves.append(self.phase) or save(self))
    assert run(capsys, *arguments, "--out", tmp_path / "whole")[0] == 0
    assert report_of(tmp_path / "whole")["skipped"] == 1
    assert {"dense", "prune", "finetune", "done"} == set(saves)
    for moment in range(1, len(saves) + 1, every):
        out, countdown = tmp_path / str(moment), [moment]

        def dying(self):
            save(self)
            countdown[0] -= 1
            if countdown[0] == 0:
                monkeypatch.setattr(
                    torch.optim.Adam, "step", die
                )  # before the next update, or at once between the phases
                if self.update == 0 or moment % 4 == 1:
                    raise Killed

        def die(self):
            raise Killed

        monkeypatch.setattr(sslprune.Run, "save", dying)
        try:
            run(capsys, *arguments, "--out", out)
        except Killed:
            pass
        monkeypatch.setattr(sslprune.Run, "save", save)
        monkeypatch.setattr(torch.optim.Adam, "step", step)
        torch.manual_seed(moment)  # whatever the new process begins with
        status, _, errors = run(capsys, *arguments, "--out", out, "--resume")
        assert (status, errors) == (0, "")
        assert outcome(out) == outcome(tmp_path / "whole"), saves[moment - 1]


def test_a_run_that_saves_every_zero_seconds_has_saved_each_update_before_the_next(
    small, capsys, monkeypatch, tmp_path
):
    out, saved, loss = tmp_path / "run", [], sslprune.SpeechModel.loss

    def watched(*arguments):
        state = sslprune.read_state(out, SimpleNamespace(resume=True))
        saved.append((state["run"]["phase"], state["run"]["update"]))
        return loss(*arguments)

    monkeypatch.setattr(sslprune.SpeechModel, "loss", watched)
    updates = "--dense-updates 3 --prune-updates 3 --finetune-updates 2 --batch-seconds 2 --evaluate-updates 0".split()
    assert run(capsys, *"--task slu --budget 0.8 --save-seconds 0 --out".split(), out, *updates)[0] == 0
    # A phase begins with what the one before it saved at its end.
    states = "dense 0, dense 1, dense 2, dense 3, prune 1, prune 2, prune 3, finetune 1"
    assert ", ".join(f"{phase} {update}" for phase, update in saved) == states


def test_a_run_that_died_before_its_first_save_begins_anew_and_one_that_ended_stays(small, capsys, tmp_path):
    arguments = ["--task", "slu", "--budget", "0.9", *FAST, "--out", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training.state.partial").write_text("half")
    status, printed, _ = run(capsys, *arguments, "--resume")
    assert status == 0
    assert "nothing to resume" in printed
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    status, printed, _ = run(capsys, *arguments, "--resume")
    assert status == 0
    assert "has run to its end" in printed
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.fixture
def dead(small, capsys, monkeypatch, tmp_path):
    """A run that died in its pruning phase: the arguments that began it."""
    arguments = [
        *"--task slu --budget 0.9 --data".split(),
        make_slurp(tmp_path / "corpus"),
        *FAST,
        "--out",
        tmp_path / "run",
    ]
    begin = sslprune.Run.begin

    def dying(self, phase):
        begin(self, phase)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sslprune.Run, "begin", dying)
        with pytest.raises(Killed):
            run(capsys, *arguments)
    capsys.readouterr()
    return arguments


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--seed", "1"], ["--seed was 0", "is 1 now"]),
        (["--budget", "0.8"], ["--budget was 0.9", "0.8"]),
        (["--finetune-updates", "9"], ["--finetune-updates was 2", "9"]),
        (["--max-seconds", "20"], ["--max-seconds"]),
        (["--evaluate-updates", "1"], ["--evaluate-updates was not given", "is 1 now"]),
    ],
)
def test_resuming_with_other_flags_is_refused_with_the_difference(dead, capsys, changed, words):
    refused(run(capsys, *dead, "--resume", *changed), *words)


def test_a_run_goes_on_in_smaller_batches_or_another_precision_where_memory_did_not_suffice(dead, capsys):
    status, printed, _ = run(capsys, *dead, *"--resume --batch-seconds 2 --accumulate 2 --dtype bfloat16".split())
    assert status == 0
    for name, then, now in (("batch-seconds", 10.0, 2.0), ("accumulate", 1, 2), ("dtype", "float32", "bfloat16")):
        assert f"--{name} was {then} when the run started, and is {now} now; the run goes on" in printed


def test_a_state_of_another_version_is_refused(dead, capsys, tmp_path):
    state = sslprune.read_state(tmp_path / "run", SimpleNamespace(resume=True))
    older = {name: value for name, value in state["run"].items() if name != "losses"}
    for fields in (older, state["run"] | {"laps": 1}):
        written = sslprune.torch_bytes(state | {"run": fields})
        sslprune.write(tmp_path / "run" / "training.state", hashlib.sha256(written).digest(), written)
        refused(run(capsys, *dead, "--resume"), "training.state", "another version")


def test_a_run_goes_on_with_as_many_processes_as_it_began_with(dead, capsys, monkeypatch):
    monkeypatch.setattr(sslprune, "ranks", lambda: 2)
    refused(run(capsys, *dead, "--resume"), "--nproc-per-node was 1", "is 2 now")


def test_flags_that_change_no_result_may_change(dead, capsys):
    assert run(capsys, *dead, "--resume", "--save-seconds", "5", "--device", "cpu", "--skip-bad")[0] == 0


def test_a_run_goes_on_with_its_corpus_wherever_that_lies_now(dead, capsys, monkeypatch, tmp_path):
    """And the last line counts the time of all its parts."""
    shutil.move(tmp_path / "corpus", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    state = sslprune.read_state(tmp_path / "run", sslprune.parse([*map(str, dead), "--resume"]))
    state["run"]["seconds"] = 7_200.0
    written = sslprune.torch_bytes(state)
    sslprune.write(tmp_path / "run" / "training.state", hashlib.sha256(written).digest(), written)
    status, printed, _ = run(capsys, *dead, "--resume", "--data", "moved/")
    assert status == 0
    assert "(trained for 2:00:0" in printed


def test_transcripts_that_do_not_fit_their_audio_are_found_before_anything_is_trained(small, capsys, tmp_path):
    path = make_librispeech(tmp_path / "corpus", 9)
    for transcripts in path.glob("train-clean-100/*/*/*.trans.txt"):
        transcripts.write_text("".join(f"{line} {'LONG ' * 99}\n" for line in transcripts.read_text().splitlines()))
    arguments = ["--task", "asr", "--budget", "0.8", *FAST, "--data", path, "--out", tmp_path / "run"]
    refused(run(capsys, *arguments), "--skip-bad", "frames")
    refused(run(capsys, *arguments, "--skip-bad"), "no utterance of the training split")
    assert not (tmp_path / "run").exists()


def test_resuming_with_a_damaged_state_or_another_corpus_or_none_is_refused(dead, capsys, tmp_path):
    annotations = tmp_path / "corpus" / "dataset" / "slurp" / "test.jsonl"
    annotations.write_text(annotations.read_text().splitlines()[0])
    refused(run(capsys, *dead, "--resume"), "corpus")
    state = tmp_path / "run" / "training.state"
    whole = state.read_bytes()
    for damaged in (whole[:-1], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], b""):
        state.write_bytes(damaged)
        refused(run(capsys, *dead, "--resume"), "training.state", "damaged")
    state.unlink()
    refused(run(capsys, *dead, "--resume"), "training.state")
    refused(run(capsys, *dead), "--out")


def test_without_resume_a_run_that_died_is_left_alone_and_resume_named(dead, capsys, tmp_path):
    before = (tmp_path / "run" / "training.state").read_bytes()
    refused(run(capsys, *dead), "--resume")
    assert (tmp_path / "run" / "training.state").read_bytes() == before


@pytest.mark.parametrize("numbers", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_a_signal_saves_the_run_and_says_how_to_go_on(small, tmp_path, numbers):
    """To the whole group of processes, as schedulers and terminals send it: those that load audio are to live on."""
    updates = ["--dense-updates", "100000", "--prune-updates", "1", "--finetune-updates", "1", "--workers", "2"]
    arguments = ["--task", "asr", "--budget", "0.8", *updates, "--out", str(tmp_path / "run")]
    printed, errors, begun, step = *(tmp_path / name for name in ("printed", "errors", "begun")), torch.optim.Adam.step

    def work():
        os.setsid()
        torch.optim.Adam.step = lambda self: step(self) or begun.touch()
        logging.getLogger().handlers.clear()
        sys.stdout, sys.stderr = open(printed, "w", buffering=1), open(errors, "w", buffering=1)  # noqa: SIM115
        sys.exit(sslprune.main(arguments))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while not begun.exists():
        assert process.is_alive(), errors.read_text()
        time.sleep(0.05)
    for number in numbers:
        os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + numbers[0]
    (error,) = errors.read_text().splitlines()
    updates = int(re.search(rf"{numbers[0].name} .*\(at dense (\d+)/100000; .*--resume", error)[1])
    state = sslprune.read_state(tmp_path / "run", sslprune.parse([*arguments, "--resume"]))
    assert state["run"]["update"] == updates > 0


def test_a_disk_that_fills_up_while_training_leaves_the_last_state(small, tmp_path):
    """A limit on the size of files is the nearest to a full disk that a test may make; Adam's moments do not fit.

    Where nothing fits, no partial file is left.
    """
    out, printed = tmp_path / "run", tmp_path / "printed.txt"

    def go(limit, *more):
        def work(rank):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return sslprune.main([*"--task asr --budget 0.8 --out".split(), str(out), *FAST, *more])

        return as_processes(1, work, printed)

    assert go(20_000) == [2]  # not even the weights fit
    *_, error = printed.read_text().splitlines()
    refused((2, "", error + "\n"), "training.state")
    assert not list(out.iterdir())
    assert go(200_000) == [2]
    *_, error = printed.read_text().splitlines()
    refused((2, "", error + "\n"), "training.state", "large")
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "metrics.jsonl", "training.state"]
    assert go(10**8, "--resume") == [0]
    assert "goes on at dense 0/2" in printed.read_text()


# --- Many processes ---

def test_two_processes_have_equal_weights_and_gates_and_the_evaluation_of_one(small, tmp_path):
    """Of an odd number of batches; what only the second one reads, and cannot, is skipped in the report, too."""
    corpus = make_librispeech(tmp_path / "corpus", 9)
    batches = data.batches(data.open_corpus(corpus, "asr").test, 4.0)
    assert len(batches) == 3
    bad = batches[1][1].audio
    bad.write_bytes(bad.read_bytes()[:-200])
    flags = ["--task", "asr", "--budget", "0.8", "--data", corpus, "--skip-bad", "--out", tmp_path / "run"]

    def work(rank):
        train, states = sslprune.train, []

        def spy(run_):
            states.append(torch.get_rng_state())
            train(run_)
            if run_.phase == "prune":
                torch.save([run_.model.state_dict(), states[0]], tmp_path / f"rank-{rank}.pt")

        sslprune.train = spy
        if rank:
            sslprune.torch_bytes = None  # it writes nothing, and need not make what is written
        status = sslprune.main([*map(str, flags), *RESUMABLE, *"--batch-seconds 4 --device cpu".split()])
        print(*(path.read_text() for path in Path("/proc/self/task").glob("*/comm")))
        return status

    printed = tmp_path / "printed.txt"
    assert as_processes(2, work, printed) == [0, 0], printed.read_text()
    assert printed.read_text().count("hardened, so") == 1
    assert "pt_gloo_runloop" not in printed.read_text()  # such a thread aborts a process that ends before it
    (first, random), (second, other) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert any(key.endswith("log_alpha") for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(random, other)  # masks and samples are each rank's own
    report = report_of(tmp_path / "run")
    assert report["processes"] == 2
    model, test = sslprune.load(tmp_path / "run" / "model.pt"), data.open_corpus(corpus, "asr", skip_bad=True)
    alone, rows = sslprune.evaluate(model, test, "test", 4.0)
    assert report["metrics"]["pruned"]["test"] == alone
    written = [row.split("\t") for row in (tmp_path / "run" / "test.tsv").read_text().splitlines()[1:]]
    assert written == [list(row) for row in rows] and len(rows) == 8
    assert report["skipped_reasons"] == list(test.skipped) and bad.name in report["skipped_reasons"][0]


def test_a_process_that_dies_ends_the_others_with_a_message(small, tmp_path):
    def work(rank):
        if rank == 1:
            torch.optim.Adam.step = lambda *arguments: os._exit(9)
        return sslprune.main([*"--task asr --budget 0.8 --device cpu --out".split(), str(tmp_path / "run"), *FAST])

    assert as_processes(2, work, tmp_path / "printed.txt") == [2, 9]
    printed = (tmp_path / "printed.txt").read_text()
    assert re.search(
        r"sslprune: the processes of this run could not agree \(.+\): where another process has ended", printed
    )
    assert "Traceback" not in printed


def test_batches_are_split_without_loss_or_repetition_and_accumulated(small, capsys, monkeypatch, tmp_path):
    """Three batches per update, of one process or three: each batch once, the last update of what is left."""
    seen, stream, step = {}, sslprune.stream, sslprune.step
    for ranks, accumulate in ((1, 3), (3, 1)):
        for rank in range(ranks):
            groups, counts = [], []
            with monkeypatch.context() as patch:
                patch.setattr(sslprune, "ranks", lambda: ranks)
                patch.setattr(sslprune, "rank", lambda: rank)
                patch.setattr(sslprune, "gather", lambda item: [item] * ranks)
                some_had = lambda tensors: tensors[1:] and tensors[0][1].fill_(1)  # noqa: E731
                patch.setattr(sslprune, "add_up", some_had)
                patch.setattr(sslprune, "evaluate", lambda *a, **more: ({"word_error_rate": 0.0}, []))
                patch.setattr(sslprune.SpeechModel, "loss", lambda self, *a: self.head.weight.sum())
                patch.setattr(sslprune, "write", lambda *a: None)
                patch.setattr(sslprune, "stream", lambda run: (groups.append(g) or g for g in stream(run)))
                patch.setattr(
                    sslprune,
                    "step",
                    lambda run, losses: counts.append(len(losses)) or step(run, losses),
                )
                arguments = [
                    *"--task asr --budget 1 --accumulate".split(),
                    accumulate,
                    "--batch-seconds",
                    "5",
                    "--out",
                    tmp_path / f"{ranks}-{rank}",
                ]
                updates = "--dense-updates 12 --prune-updates 0 --finetune-updates 0".split()
                assert run(capsys, *arguments, *updates)[0] == 0
            assert counts == list(map(len, groups))
            seen[ranks, rank] = [[tuple(u.name for u in batch) for batch in group] for group in groups]
    together = seen[1, 0]
    assert len(together) == 12
    assert together == [sum(parts, []) for parts in zip(*(seen[3, rank] for rank in range(3)))]
    names = [name for group in together for batch in group for name in batch]
    for epoch in range(len(names) // 40):
        assert len(set(names[40 * epoch : 40 * epoch + 40])) == 40
    assert len(names) > 80
    assert 3 > len(together[-1]) or any(len(group) < 3 for group in together)


def test_two_processes_and_two_batches_an_update_train_as_the_mean_over_both_batches(small, monkeypatch, tmp_path):
    """Worked out by hand for four updates. Each draw of gates is the same, and nothing else is random."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.02))  # so that gates are half open
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, dropout_p, **more: attention(*a, **more))
    flags = "--task slu --budget 0.6 --warmup-share 0.5 --batch-seconds 2 --evaluate-updates 0 --device cpu --seed 1"
    updates = "--dense-updates 0 --prune-updates 4 --finetune-updates 0"

    def go(count, name, *more):
        """For each update its batches, and what the optimizer then has: gradients, gates and multipliers."""
        batches, found, before, loss, step = [], [], [], sslprune.SpeechModel.loss, torch.optim.Adam.step

        def spy_loss(self, *batch):
            before[:] = before or [copy.deepcopy(self)]
            batches.append(batch)
            return loss(self, *batch)

        def spy_step(self):
            weights, *others = (group["params"] for group in self.param_groups)
            others = list(itertools.chain(*others))
            gradients = [p.grad.clone() for p in (*weights, *others)]
            step(self)
            found.append((gradients, [p.detach().clone() for p in others]))

        def work(rank):
            sslprune.SpeechModel.loss, torch.optim.Adam.step = spy_loss, spy_step
            status = sslprune.main([*flags.split(), *updates.split(), "--out", str(tmp_path / name), *more])
            torch.save((before[0], batches, found), tmp_path / f"{name}-{rank}.pt")
            return status

        assert as_processes(count, work, tmp_path / f"{name}.txt") == [0] * count
        return [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in range(count)]

    ((model, batches, accumulated),) = go(1, "one", "--accumulate", "2")
    (_, firsts, found), (_, seconds, same) = go(2, "two")
    names = [[u.name for u in batch] for _, _, batch in batches]
    assert len(names) == 8
    assert [[u.name for u in batch] for pair in zip(firsts, seconds) for _, _, batch in pair] == names

    lagrangian, gates = Lagrangian(model.encoder.shape, "mac", 0.6), model.encoder.gates
    weights = [p for name, p in model.named_parameters() if "log_alpha" not in name]
    others = [*(gate.log_alpha for gate in gates.values()), lagrangian.multipliers]
    slow, fast = torch.optim.Adam(weights, betas=(0.9, 0.98)), torch.optim.Adam(others, lr=0.2, betas=(0.0, 0.9))
    for p in (*weights, *others):
        p.grad = torch.zeros_like(p)
    for update in range(4):
        losses = [model.train().loss(*batch) for batch in batches[2 * update : 2 * update + 2]]
        (sum(losses) / 2 + lagrangian(gates, min(1, update / 2))).backward()
        lagrangian.multipliers.grad.neg_()  # they ascend
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        slow.param_groups[0]["lr"] = 5e-4 * sslprune.tri_stage(update / 4)
        gradients = [*(p.grad for p in weights), *(p.grad for p in others[:-1]), -others[-1].grad]
        expected = [g.clone() for g in gradients]
        slow.step()
        fast.step()
        for theirs, after in (accumulated[update], found[update], same[update]):
            assert all(torch.allclose(g, e, rtol=1e-3, atol=1e-5) for g, e in zip(theirs, expected, strict=True))
            assert all(torch.allclose(p, e, rtol=1e-3, atol=1e-5) for p, e in zip(after, others, strict=True))
        slow.zero_grad(set_to_none=False)
        fast.zero_grad(set_to_none=False)
    assert lagrangian.multipliers.abs().max() > 0.1


def run_of(optimizer):
    """What an update needs of a run."""
    options = sslprune.parse(["--task", "slu", "--budget", "1"])
    device = torch.device("cpu")
    return SimpleNamespace(
        optimizer=optimizer, options=options, device=device, saved=time.monotonic(), update=0, losses=[]
    )


def test_the_mean_of_the_gradients_of_two_batches_is_the_gradient_of_both_in_one(monkeypatch):
    monkeypatch.setattr(sslprune, "CLIP", torch.inf)
    model = sslprune.SpeechModel(tiny(), "slu", ["a", "b"])
    waveforms, lengths = torch.randn(2, 4_000), torch.tensor([4_000, 4_000])
    batch = [data.Utterance("", None, 0.25, "", intent) for intent in "ab"]
    run = run_of(sslprune.make_optimizer(model, None, 0.0))
    whole = model.loss(waveforms, lengths, batch)
    expected = torch.autograd.grad(whole, list(model.parameters()), allow_unused=True)
    losses = [model.loss(waveforms[i : i + 1], lengths[i : i + 1], batch[i : i + 1]) for i in range(2)]
    for loss in losses:
        loss.backward()
    assert not sslprune.step(run, [loss.detach() for loss in losses])
    assert run.losses == pytest.approx([whole.item()], rel=1e-5)
    assert all(torch.allclose(p.grad, e, atol=1e-6) for p, e in zip(model.parameters(), expected) if e is not None)


def test_the_gradients_of_weights_are_clipped_and_those_of_gates_are_not():
    model = sslprune.SpeechModel(tiny(KINDS["mac"]), "slu", ["a", "b"])
    lagrangian = Lagrangian(TINY, "mac", 0.5)
    optimizer = sslprune.make_optimizer(model, lagrangian, 0.0)
    weights, gates, multipliers = (group["params"] for group in optimizer.param_groups)
    for size, params in ((0.1, weights), (7.0, gates), (3.0, multipliers)):
        for p in params:
            p.grad = torch.full_like(p, size)
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in weights])).item()
    optimizer.param_groups[0]["lr"] = 0.0
    run = run_of(optimizer)
    run.saved -= 601
    assert sslprune.step(run, [torch.tensor(3.0)])  # and the state is to be saved
    assert (run.update, run.losses) == (1, [3.0])
    assert norm > 2 * sslprune.CLIP
    assert all(torch.allclose(p.grad, torch.tensor(0.1 * sslprune.CLIP / norm)) for p in weights)
    assert all((p.grad == 7).all() for p in gates)
    assert (multipliers[0].grad == 3).all()


# --- Numbers that are not finite ---


@pytest.mark.parametrize("where", ["loss", "gradient", "gate"])
def test_an_update_that_is_not_finite_is_left_out_and_counted(small, capsys, monkeypatch, tmp_path, where):
    calls, loss = [], sslprune.SpeechModel.loss

    def sometimes(self, *arguments):
        calls.append(1)
        value = loss(self, *arguments)
        if len(calls) != 6:
            return value
        if where == "loss":
            return value * torch.nan
        victim = self.head.weight if where == "gradient" else self.encoder.gates["units", 0].log_alpha
        return value + (victim - victim.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    monkeypatch.setattr(sslprune.SpeechModel, "loss", sometimes)
    updates = ["--dense-updates", "4", "--prune-updates", "4", "--finetune-updates", "4"]
    status, printed, _ = run(capsys, "--task", "slu", "--budget", "0.9", "--out", tmp_path / "run", *updates)
    assert status == 0
    assert printed.count("left out") == 1
    assert report_of(tmp_path / "run")["updates_left_out"] == 1
    assert all(tensor.isfinite().all() for tensor in sslprune.load(tmp_path / "run" / "model.pt").state_dict().values())


def test_many_updates_in_a_row_that_are_not_finite_stop_the_run(small, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sslprune.SpeechModel, "loss", lambda self, *a: self.head.weight.sum() * torch.inf)
    status, _, errors = run(
        capsys, "--task", "slu", "--budget", "0.9", "--out", tmp_path / "run", "--dense-updates", "50"
    )
    refused((status, "", errors.splitlines()[-1] + "\n"), "20 updates in a row", "--dense-lr")


def test_updates_that_are_not_finite_now_and_then_do_not_stop_the_run(small, capsys, monkeypatch, tmp_path):
    factors = itertools.cycle([torch.nan, 1.0])
    monkeypatch.setattr(sslprune.SpeechModel, "loss", lambda self, *a: self.head.weight.sum() * next(factors))
    updates = ["--dense-updates", "44", "--prune-updates", "0", "--finetune-updates", "0"]
    assert run(capsys, "--task", "slu", "--budget", "1", "--out", tmp_path / "run", *updates)[0] == 0
    assert report_of(tmp_path / "run")["updates_left_out"] == 22
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()  # which is not JSON


def test_ctc_with_too_few_frames_is_finite():
    model = sslprune.SpeechModel(tiny(), "asr", LETTERS)
    waveforms, batch = (
        torch.randn(2, 720),
        [data.Utterance("", None, 0.045, text) for text in ("A", "FAR TOO LONG FOR TWO FRAMES")],
    )
    loss = model.loss(waveforms, torch.tensor([720, 720]), batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_convolution_whose_gates_all_shut_neither_spoils_training_nor_the_sliced_model():
    model = tiny(KINDS["mac"])
    model.train()
    torch.nn.init.constant_(model.gates["channels", 3].log_alpha, -20)
    model.frontend.gates[6].log_alpha.data.fill_(-20)
    features, _ = model(torch.randn(2, 4_000), torch.tensor([4_000, 3_000]))
    (features.square().mean() + Lagrangian(TINY, "mac", 0.5)(model.gates, 1.0)).backward()
    assert features.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    harden(model.gates, TINY, "mac", 0.5)
    sliced = model.eval().slice()
    assert min(sliced.shape.channels) >= 1
    assert sliced(torch.randn(1, 4_000))[0].std() > 0


def test_a_constraint_that_has_not_converged_is_reported_with_what_to_change(small, capsys, tmp_path):
    _, printed, _ = run(capsys, "--task", "slu", "--budget", "0.8", "--out", tmp_path / "run", *FAST)
    assert "has not converged" in printed
    assert "--prune-updates" in printed
    assert report_of(tmp_path / "run")["converged"] is False
    options = sslprune.parse(["--task", "slu", "--budget", "0.8"])
    capsys.readouterr()
    for share, then in ((0.79, ""), (0.83, "shuts what training kept"), (0.77, "keeps what training shut")):
        sslprune.warn_unless_converged(options, [share])
        printed = capsys.readouterr().out
        assert then in printed
        assert bool(printed) == bool(then) == ("Give more --prune-updates, or a larger --gate-lr" in printed)


def test_over_long_utterances_are_left_out_of_training_only_and_counted(small, capsys, monkeypatch, tmp_path):
    seen, load_batch = set(), data.load_batch
    monkeypatch.setattr(
        data, "load_batch", lambda batch: seen.update(u.audio.parts[-4] + u.name for u in batch) or load_batch(batch)
    )
    corpus = make_librispeech(tmp_path / "corpus", 6)  # 0.5 s to 1 s
    assert (
        run(
            capsys,
            *"--task asr --budget 0.9 --data".split(),
            corpus,
            "--max-seconds",
            "0.75",
            *FAST,
            "--out",
            tmp_path / "run",
        )[0]
        == 0
    )
    assert report_of(tmp_path / "run")["too_long"] == 3
    assert report_of(tmp_path / "run")["skipped"] == 0
    assert sum(name.startswith("train") for name in seen) == 3
    assert sum(name.startswith("test") for name in seen) == 6
    refused(
        run(
            capsys,
            *"--task asr --budget 0.9 --data".split(),
            corpus,
            "--max-seconds",
            "0.3",
            *FAST,
            "--out",
            tmp_path / "none",
        ),
        "--max-seconds",
    )


def test_worker_processes_load_the_same(small, capsys, tmp_path):
    for workers in (0, 2):
        flags = f"--task slu --budget 0.9 --workers {workers} --out".split()
        assert run(capsys, *flags, tmp_path / str(workers), *FAST)[0] == 0
    assert outcome(tmp_path / "0") == outcome(tmp_path / "2")


def test_nothing_stays_on_the_cpu_that_belongs_on_a_device():
    """The meta device stands in for a GPU: a tensor that was left behind raises."""
    model = sslprune.SpeechModel(tiny(), "slu", ["a", "b"])
    model.encoder.add_gates(KINDS["mac"])
    model.encoder.layer_drop, model.encoder.projection.time_mask, model.encoder.projection.channel_mask = 0.1, 0.5, 0.5
    lagrangian = Lagrangian(TINY, "mac", 0.5).to("meta")
    model.to("meta").train()
    waveforms, batch = (
        torch.zeros(2, 4_000, device="meta"),
        [data.Utterance("", None, 0.25, "", intent) for intent in "ab"],
    )
    for lengths in (torch.tensor([4_000, 4_000]), torch.tensor([4_000, 3_000])):
        (model.loss(waveforms, lengths, batch) + lagrangian(model.encoder.gates, 1.0)).backward()
    assert {p.grad.device.type for p in model.encoder.frontend.parameters()} == {"meta"}
    assert lagrangian.multipliers.grad.device.type == "meta"
