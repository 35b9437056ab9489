"""The program from its command line, at a size that takes seconds: runs, their results, and every wrong use."""

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import CONSTRAINED, HERE, LETTERS, TINY, check_budget_is_kept, tiny, write_layout
from test_data import make_bad, make_librispeech, make_slurp

import data
import sslprune
from flops import BASE, SAMPLES, Shape, UserError, cost
from gates import ALIGN, KINDS, METHODS, harden
from transformer import Wav2Vec2

MAIN = str(HERE.parent / "sslprune.py")
FAST = ["--dense-updates", "2", "--prune-updates", "2", "--finetune-updates", "2"]


def run(capsys, *arguments):
    """Exit status, standard output and standard error of the program, in this process."""
    logging.getLogger().handlers.clear()  # logging.basicConfig takes effect once, and this is not once
    try:
        status = sslprune.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def report_of(out):
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["asr", "slu"])
def test_a_whole_run(small, capsys, tmp_path, task, method):
    out = tmp_path / "run"
    budget = 0.8
    status, printed, errors = run(capsys, "--task", task, "--budget", budget, "--method", method, "--out", out, *FAST)
    assert (status, errors) == (0, "")
    report = report_of(out)
    assert {key: report[key] for key in ("task", "method", "budget", "seed", "data", "checkpoint")} == {
        "task": task, "method": method, "budget": budget, "seed": 0, "data": "demo", "checkpoint": None,
    }  # fmt: skip
    check_budget_is_kept(*(Shape.from_dict(report[which]["shape"]) for which in ("pruned", "dense")), method, budget)
    measured = {"mac": "macs", "transformer": "macs", "size": "params", "sepsize": "params"}[method]
    assert report["achieved"] == report["pruned"][measured] / report["dense"][measured]
    if method == "transformer":
        assert report["pruned"]["shape"]["channels"] == report["dense"]["shape"]["channels"]
    for key in ("dense", "pruned"):
        assert report[key]["seconds"] > 0
    assert report["metric"]["name"] == {"asr": "word_error_rate", "slu": "intent_accuracy"}[task]
    assert report["skipped"] == 0
    assert report["train_seconds"] > 0
    model = sslprune.load(out / "model.pt")
    assert model.encoder.shape.as_dict() == report["pruned"]["shape"]
    c = cost(model.encoder.shape, 160_000)
    assert (c.macs, c.params) == (report["pruned"]["macs"], report["pruned"]["params"])
    assert sum(p.numel() for p in model.encoder.parameters()) == c.params
    assert not any(name.endswith("log_alpha") for name in model.state_dict())
    files = [
        "curve.svg",
        "dense.pt",
        "dev.tsv",
        "log.txt",
        "metrics.jsonl",
        "model.pt",
        "report.json",
        "test.tsv",
        "training.state",
    ]
    assert sorted(path.name for path in out.iterdir()) == files
    log = (out / "log.txt").read_text()
    for line in (
        "phase 1 of 3, dense",
        "phase 2 of 3, prune",
        "phase 3 of 3, finetune",
        "what each layer kept",
        "forward (10 s of audio)",
    ):
        assert line in printed
        assert line in log

    # The metric is the model's: predict and evaluate again, from the file.
    corpus = data.open_corpus("demo", task)
    found = []
    for i, u in enumerate(corpus.test):
        soundfile.write(tmp_path / f"{i}.wav", u.audio, 16_000, subtype="FLOAT")
        found.append(tmp_path / f"{i}.wav")
    predicted = model.predict(found)
    if task == "asr":
        assert report["metric"]["test"] == data.error_rates([u.text for u in corpus.test], predicted)["word_error_rate"]
    else:
        assert report["metric"]["test"] == sum(p == u.intent for p, u in zip(predicted, corpus.test)) / len(corpus.test)
    status, printed, _ = run(capsys, "--predict", out / "model.pt", *found)
    assert status == 0
    assert printed.splitlines() == [f"{path}\t{label}" for path, label in zip(found, predicted)]
    status, printed, _ = run(capsys, "--evaluate", out / "model.pt")
    assert status == 0
    assert f"test {report['metric']['name'].replace('_', ' ')} {report['metric']['test']:.2%}" in printed


def test_the_same_command_gives_the_same_model_and_another_seed_another(small, capsys, monkeypatch, tmp_path):
    """From the same batches and from others. The corpus is the same: the demo's depends on the seed, too."""
    corpus, seen, loss = make_librispeech(tmp_path / "corpus", 9), [], sslprune.SpeechModel.loss
    monkeypatch.setattr(
        sslprune.SpeechModel, "loss", lambda self, *batch: seen.append([u.name for u in batch[2]]) or loss(self, *batch)
    )
    flags = ["--task", "asr", "--budget", "0.6", "--data", corpus, *"--time-mask 0.3 --layer-drop 0.3".split(), *FAST]
    models, batches = {}, {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        seen.clear()
        assert run(capsys, *flags, "--batch-seconds", 3, "--seed", seed, "--out", tmp_path / name)[0] == 0
        models[name], batches[name] = (tmp_path / name / "model.pt").read_bytes(), seen[2:]  # the first by length
    assert models["a"] == models["b"] != models["c"]
    assert batches["a"] == batches["b"] != batches["c"]


def test_bfloat16_computes_in_bfloat16_and_keeps_the_weights_in_float32(small, capsys, tmp_path):
    arguments = ["--task", "asr", "--budget", "0.7", "--dtype", "bfloat16", "--out", tmp_path / "run", *FAST]
    assert run(capsys, *arguments)[0] == 0
    assert report_of(tmp_path / "run")["dtype"] == "bfloat16"
    model = sslprune.load(tmp_path / "run" / "model.pt")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    waveforms, lengths = torch.randn(2, 20_000), torch.tensor([20_000, 9_000])
    with torch.no_grad():
        exact, _ = model(waveforms, lengths)
        model.dtype = torch.bfloat16
        rounded, _ = model(waveforms, lengths)
        assert rounded.dtype == torch.bfloat16
        assert 0 < (rounded - exact).norm() / exact.norm() < 0.05
        assert (rounded[:1] - model(waveforms[:1])[0]).abs().max() < 0.05 * exact.abs().max()
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).normal(0, 0.1, 9_000), 16_000)
    assert run(capsys, "--predict", tmp_path / "run" / "model.pt", tmp_path / "x.wav", "--dtype", "bfloat16")[0] == 0
    assert run(capsys, "--evaluate", tmp_path / "run" / "model.pt", "--dtype", "bfloat16")[0] == 0


def test_the_target_warms_up_linearly_from_nothing(small, capsys, monkeypatch, tmp_path):
    seen, forward = [], sslprune.Lagrangian.forward
    monkeypatch.setattr(
        sslprune.Lagrangian, "forward", lambda self, gates, warmup: seen.append(warmup) or forward(self, gates, warmup)
    )
    updates = ["--dense-updates", "0", "--prune-updates", "8", "--finetune-updates", "0", "--warmup-share", "0.5"]
    run(capsys, "--task", "slu", "--budget", "0.8", "--out", tmp_path / "run", *updates)
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert sslprune.warmup(0.0, 0.0) == 1  # all of it at once


@pytest.mark.parametrize(
    "changed",
    [
        {"labels": 5},
        {"labels": ["\x1b[2J", "no"]},
        {"labels": []},
        {"labels": [1, 2]},
        {"task": []},
        {"task": "asr"},
        {"task": None},
        {"format": "x"},
    ],
)
def test_a_model_whose_task_or_labels_are_wrong_is_refused(capsys, tmp_path, changed):
    model = sslprune.SpeechModel(tiny(), "slu", ["yes", "no"])
    sslprune.save_model(model, tmp_path / "model.pt")
    assert sslprune.load(tmp_path / "model.pt").labels == ["yes", "no"]
    torch.save(torch.load(tmp_path / "model.pt", weights_only=True) | changed, tmp_path / "model.pt")
    refused(run(capsys, "--predict", tmp_path / "model.pt", "x.wav"), "model.pt")


def test_an_update_has_the_recipes_rates_clipped_gradients_masks_and_layer_drop(small, capsys, monkeypatch, tmp_path):
    seen, step, forward = [], torch.optim.Adam.step, Wav2Vec2.forward

    def spy_step(self, *arguments):
        norm = torch.linalg.vector_norm(
            torch.stack([p.grad.norm() for p in self.param_groups[0]["params"] if p.grad is not None])
        ).item()
        groups = self.param_groups
        seen.append(
            (
                [group["lr"] for group in groups],
                [bool(group.get("maximize")) for group in groups],
                norm,
                [group["betas"] for group in groups],
            )
        )
        return step(self, *arguments)

    def spy_forward(self, *arguments):
        if self.training:
            assert (self.layer_drop, self.projection.time_mask, self.projection.channel_mask) == (0.25, 0.125, 0.5)
        return forward(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    monkeypatch.setattr(Wav2Vec2, "forward", spy_forward)
    monkeypatch.setattr(sslprune, "CLIP", 0.01)  # so that it is met
    recipe = (
        "--dense-lr 1e-3 --prune-lr 2e-3 --finetune-lr 3e-3 --gate-lr 0.1"
        " --layer-drop 0.25 --time-mask 0.125 --channel-mask 0.5"
    ).split()
    updates = ["--dense-updates", "2", "--prune-updates", "4", "--finetune-updates", "2"]
    assert run(capsys, "--task", "asr", "--budget", "0.8", "--out", tmp_path / "run", *recipe, *updates)[0] == 0
    rates, ascends, norms, betas = zip(*seen)
    stages = [sslprune.tri_stage(i / 2) for i in range(2)], [sslprune.tri_stage(i / 4) for i in range(4)]
    peaks = (
        [[1e-3 * s] for s in stages[0]] + [[2e-3 * s, 0.1, 0.1] for s in stages[1]] + [[3e-3 * s] for s in stages[0]]
    )
    assert list(rates) == [pytest.approx(peak) for peak in peaks]
    assert list(ascends) == [[False]] * 2 + [[False, False, True]] * 4 + [[False]] * 2
    assert max(norms) <= 0.0101
    weights, others = (0.9, 0.98), (0.0, 0.9)
    assert list(betas) == [[weights]] * 2 + [[weights, others, others]] * 4 + [[weights]] * 2


@pytest.mark.parametrize(
    ("task", "recipe"), [("asr", sslprune.RECIPES["small"]), ("slu", sslprune.RECIPES["small"] | sslprune.SMALL_SLU)]
)
def test_the_recipe_is_the_tasks_but_for_the_flags_that_are_given(small, tmp_path, task, recipe):
    options = sslprune.parse(
        ["--task", task, "--budget", "0.8", "--out", str(tmp_path / "run"), "--prune-lr", "0.5", "--prune-updates", "0"]
    )
    sslprune.prepare(options, torch.device("cpu"))
    assert {name: getattr(options, name) for name in recipe} == recipe | {"prune_lr": 0.5, "prune_updates": 0}
    assert recipe["dense_lr"] == {"asr": 1e-3, "slu": 5e-4}[task]


@pytest.mark.parametrize(("width", "recipe"), [(768, "base"), (752, "small")])
def test_the_recipe_of_base_is_that_of_models_of_its_width_and_of_no_narrower_ones(small, tmp_path, width, recipe):
    shape = replace(TINY, width=width, position_groups=16)
    sslprune.save_model(sslprune.SpeechModel(Wav2Vec2(shape), "asr", LETTERS), tmp_path / "model.pt")
    flags = ["--task", "asr", "--budget", "0.9", "--checkpoint", tmp_path / "model.pt", "--out", tmp_path / "run"]
    options = sslprune.parse([str(flag) for flag in flags])
    sslprune.prepare(options, torch.device("cpu"))
    trained = {name: value for name, value in sslprune.RECIPES[recipe].items() if name != "dense_updates"}
    assert {name: getattr(options, name) for name in trained} == trained
    assert all(trained[name] != sslprune.RECIPES["base"][name] for name in ("prune_lr", "gate_lr")) == (width < 768)


def test_speeds_are_drawn_afresh_in_every_epoch_and_only_for_training(small, capsys, monkeypatch, tmp_path):
    epochs, others, training_batches, load_batch = [], set(), data.training_batches, data.load_batch

    def batches_of_an_epoch(*arguments):
        batches = training_batches(*arguments)
        epochs.append({u.name: u.speed for batch in batches for u in batch})
        return batches

    monkeypatch.setattr(data, "training_batches", batches_of_an_epoch)
    monkeypatch.setattr(
        data, "load_batch", lambda b: others.update(u.speed for u in b if "train" not in u.name) or load_batch(b)
    )
    monkeypatch.setattr(sslprune.SpeechModel, "loss", lambda self, *batch: self.head.weight.sum())  # which is quick
    updates = ["--dense-updates", "9", "--prune-updates", "9", "--finetune-updates", "9", "--batch-seconds", "30"]
    arguments = ["--task", "slu", "--budget", "0.8", "--out", tmp_path / "run", "--speed-perturbation", "0.2", *updates]
    assert run(capsys, *arguments)[0] == 0
    assert len(epochs) >= 6
    assert len({tuple(sorted(speeds.items())) for speeds in epochs}) == len(epochs)
    assert {speed for speeds in epochs for speed in speeds.values()} == {0.8, 1.0, 1.2}
    assert others == {1.0}


def test_each_phase_trains(small, capsys, tmp_path):
    run(capsys, "--task", "slu", "--budget", "0.9", "--out", tmp_path / "first", *FAST)
    heads = []
    for prune, finetune in ((0, 0), (2, 0), (0, 2), (2, 2)):
        out, updates = tmp_path / f"{prune}-{finetune}", ["--prune-updates", prune, "--finetune-updates", finetune]
        assert (
            run(
                capsys,
                *"--task slu --budget 0.9 --checkpoint".split(),
                tmp_path / "first" / "dense.pt",
                "--out",
                out,
                *updates,
            )[0]
            == 0
        )
        heads.append(sslprune.load(out / "model.pt").head.weight)
    assert torch.equal(heads[0], sslprune.load(tmp_path / "first" / "dense.pt").head.weight)
    assert not any(torch.equal(a, b) for i, a in enumerate(heads) for b in heads[:i])


@pytest.mark.parametrize("budget", ["0.9", "1.0"])
def test_every_phase_trains_in_training_mode_for_its_updates(small, capsys, monkeypatch, tmp_path, budget):
    seen, loss = [], sslprune.SpeechModel.loss
    monkeypatch.setattr(
        sslprune.SpeechModel,
        "loss",
        lambda self, *a: seen.append({m.training for m in self.modules()}) or loss(self, *a),
    )
    updates = ["--dense-updates", "2", "--prune-updates", "3", "--finetune-updates", "4"]
    assert run(capsys, "--task", "asr", "--budget", budget, "--out", tmp_path / "run", *updates)[0] == 0
    assert seen == [{True}] * 9


def test_ctc_from_scratch_begins_with_the_shortest_utterances(small, capsys, monkeypatch, tmp_path):
    seen, training_batches = [], data.training_batches

    def batches_of_an_epoch(*arguments):
        batches = training_batches(*arguments)
        seen.append([batch[0].seconds for batch in batches])
        return batches

    monkeypatch.setattr(data, "training_batches", batches_of_an_epoch)
    run(capsys, "--task", "asr", "--budget", "1", "--out", tmp_path / "run", "--batch-seconds", "5", *FAST)
    first, *_, later = seen
    assert len(first) > 4
    assert first == sorted(first)
    assert later != sorted(later)


@pytest.mark.parametrize("flags", [[], ["--ragged"]])
def test_a_layer_keeps_a_multiple_of_units_that_runs_fast_unless_any_number_may_stay(
    small, capsys, monkeypatch, tmp_path, flags
):
    monkeypatch.setattr(sslprune, "SMALL", replace(TINY, channels=(64,) * 7, units=(1600,) * 3))
    updates = "--dense-updates 0 --prune-updates 1 --finetune-updates 0 --evaluate-updates 0 --batch-seconds 2".split()
    assert run(capsys, *"--task slu --budget 0.6 --out".split(), tmp_path / "run", *updates, *flags)[0] == 0
    kept = report_of(tmp_path / "run")["pruned"]["shape"]
    odd = [n for kind in ("channels", "units") for n in kept[kind] if n % ALIGN[kind] and n != 1]  # the fewest channels
    assert sum(kept["channels"]) < 64 * 7 and sum(kept["units"]) < 1600 * 3
    assert bool(odd) == (flags == ["--ragged"]), kept


def test_budget_one_prunes_nothing_and_trains_as_long(small, capsys, tmp_path):
    status, printed, _ = run(capsys, "--task", "slu", "--budget", "1.0", "--out", tmp_path / "run", *FAST)
    report = report_of(tmp_path / "run")
    assert status == 0
    assert report["achieved"] == 1
    assert report["pruned"]["shape"] == report["dense"]["shape"]
    assert "phase 3 of 3" in printed
    assert not torch.equal(
        sslprune.load(tmp_path / "run" / "model.pt").head.weight,
        sslprune.load(tmp_path / "run" / "dense.pt").head.weight,
    )


def test_training_learns_and_the_constraint_binds(small, capsys, monkeypatch, tmp_path):
    """Not how well: that it gets better by training, and that training brings the expected cost to the budget."""
    monkeypatch.setattr(data, "SENTENCES", {"say_six": ("six",), "say_alarm": ("alarm",)})
    updates = [*"--dense-updates 40 --prune-updates 100 --finetune-updates 20 --ragged --evaluate-updates 60".split()]
    status, _, _ = run(
        capsys,
        *"--task slu --budget 0.7 --out".split(),
        tmp_path / "run",
        *"--dense-lr 3e-3 --batch-seconds 3".split(),
        *updates,
    )
    assert status == 0
    report = report_of(tmp_path / "run")
    assert report["metrics"]["dense"]["test"]["intent_accuracy"] == 1
    assert report["metric"]["test"] == 1
    assert report["expected"] == pytest.approx([0.7], abs=0.1)


def test_a_dense_checkpoint_of_ours_is_pruned_without_a_dense_phase_and_keeps_its_head(small, capsys, tmp_path):
    run(capsys, "--task", "slu", "--budget", "1", "--out", tmp_path / "dense", *FAST)
    checkpoint = tmp_path / "dense" / "dense.pt"
    status, printed, _ = run(
        capsys, "--task", "slu", "--budget", "0.7", "--out", tmp_path / "b", "--checkpoint", checkpoint, *FAST[2:]
    )
    assert status == 0
    assert "phase 1 of 2, prune" in printed
    first, second = report_of(tmp_path / "dense"), report_of(tmp_path / "b")
    assert second["metrics"]["dense"] == first["metrics"]["dense"]
    assert second["checkpoint"] == str(checkpoint)
    status, printed, _ = run(
        capsys, "--task", "asr", "--budget", "0.7", "--out", tmp_path / "c", "--checkpoint", checkpoint, *FAST
    )
    assert status == 0  # another task: the encoder only, whose new head is trained first
    assert "phase 1 of 3, dense" in printed
    assert report_of(tmp_path / "c")["metrics"]["dense"] is not None


def test_a_new_head_of_base_is_trained_in_a_dense_phase_first_and_that_of_a_small_model_where_asked(small, tmp_path):
    model = sslprune.SpeechModel(sslprune.Wav2Vec2(sslprune.SMALL), "slu", ["alarm_set", "weather_query"])
    sslprune.save_model(model, tmp_path / "model.pt")
    updates = {}
    for task, more in (("slu", []), ("asr", []), ("asr", ["--dense-updates", "0"]), ("slu", ["--dense-updates", "7"])):
        arguments = ["--task", task, "--budget", "0.8", "--checkpoint", str(tmp_path / "model.pt"), *more]
        options = sslprune.parse([*arguments, "--out", str(tmp_path / "run")])
        sslprune.prepare(options, torch.device("cpu"))
        updates[task, *more] = options.dense_updates
    assert list(updates.values()) == [0, 0, 0, 7]
    for trained, expected in ((True, 0), (None, 20_000)):
        options = sslprune.parse(["--task", "asr", "--budget", "0.8", "--checkpoint", "base.pt"])
        sslprune.fill_recipe(options, BASE, trained)
        assert options.dense_updates == expected


@pytest.mark.parametrize("method", ["mac", "sepsize"])
def test_a_pruned_model_is_pruned_again_by_a_budget_of_what_it_costs_now(small, capsys, tmp_path, method):
    before = replace(TINY, channels=(32,) * 7, units=(160,) * 3)
    model = tiny(KINDS[method], shape=before)
    harden(model.gates, before, method, 0.6)
    encoder = model.slice()
    sslprune.save_model(sslprune.SpeechModel(encoder, "slu", sorted(data.SENTENCES)), tmp_path / "model.pt")
    flags = ["--task", "slu", "--budget", "0.8", "--method", method, "--checkpoint", tmp_path / "model.pt"]
    updates = ["--prune-updates", "1", "--finetune-updates", "0"]
    status, printed, _ = run(capsys, *flags, *updates, "--out", tmp_path / "run")
    report, start = report_of(tmp_path / "run"), cost(encoder.shape, SAMPLES)
    dense, pruned = (Shape.from_dict(report[which]["shape"]) for which in ("dense", "pruned"))
    assert status == 0 and dense == encoder.shape != before
    assert (report["dense"]["macs"], report["dense"]["params"]) == (start.macs, start.params)
    check_budget_is_kept(pruned, encoder.shape, method, 0.8)
    kept = [measure(cost(pruned, SAMPLES)) / measure(start) for measure in CONSTRAINED[method]]
    assert report["kept"] == pytest.approx(kept)
    measured = {"mac": "macs", "sepsize": "params"}[method]
    assert report["achieved"] == report["pruned"][measured] / getattr(start, measured)
    assert min(report["expected"]) > 0.95  # after an update gates are still open, as at the start
    for constraint, measure in zip(METHODS[method], CONSTRAINED[method]):
        assert f"0.8 of the already pruned checkpoint's {measure(start):,} {constraint.name}" in printed
    assert sslprune.load(tmp_path / "run" / "model.pt").encoder.dense == before  # of what each layer kept


@pytest.mark.parametrize("layout", ["hf_pretraining", "torchaudio", "fairseq"])
def test_public_checkpoints_are_pruned(golden, capsys, tmp_path, layout):
    (tmp_path / "from").mkdir()
    path = write_layout(tmp_path / "from", golden, layout)
    corpus = make_librispeech(tmp_path / "LibriSpeech")
    arguments = [
        *"--task asr --budget 0.8 --method size --checkpoint".split(),
        path,
        "--data",
        corpus,
        "--out",
        tmp_path / "out",
        *FAST,
    ]
    status, printed, errors = run(capsys, *arguments)
    assert (status, errors) == (0, "")
    assert 0.75 < report_of(tmp_path / "out")["achieved"] <= 0.8
    assert "phase 2 of 3, prune" in printed


@pytest.mark.parametrize(("make", "task"), [(make_slurp, "slu"), (make_slurp, "asr"), (make_librispeech, "asr")])
def test_each_corpus_runs_end_to_end(small, capsys, tmp_path, make, task):
    status, _, errors = run(
        capsys, "--task", task, "--budget", "0.8", "--data", make(tmp_path / "corpus"), "--out", tmp_path / "out", *FAST
    )
    assert (status, errors) == (0, "")
    metrics = report_of(tmp_path / "out")["metrics"]["pruned"]["test"]
    if (make, task) == (make_slurp, "slu"):
        assert list(metrics) == ["intent_accuracy", "scenario_accuracy", "action_accuracy"]


def test_scenario_and_action_are_counted_by_themselves(monkeypatch):
    model = sslprune.SpeechModel(tiny(), "slu", ["iot_hue_lighton", "iot_hue_lightoff", "audio_volume_up"])
    noise = np.random.default_rng(0).normal(size=(4, 800)).astype(np.float32)
    intents = [
        "iot_hue_lighton",
        "iot_hue_lightoff",
        "audio_volume_up",
        "play_music",
    ]  # the model does not know the last
    corpus = data.Corpus(
        "x", test=[data.Utterance(str(i), noise[i], 0.05, "", intent) for i, intent in enumerate(intents)]
    )
    said = iter([["iot_hue_lighton"], ["iot_hue_lighton"], ["audio_volume_up"], ["audio_volume_up"]])
    monkeypatch.setattr(model, "transcribe", lambda waveforms, lengths: next(said))
    metrics, rows = sslprune.evaluate(model, corpus, "test", 0.05)
    assert metrics == {"intent_accuracy": 0.5, "scenario_accuracy": 0.75, "action_accuracy": 0.5}


def test_audio_that_turns_out_bad_while_training_is_skipped_counted_and_limited(small, capsys, tmp_path):
    corpus = make_librispeech(tmp_path / "corpus", 3)
    make_bad(corpus / "train-clean-100" / "84" / "121123" / "84-121123-0001.flac", "none")
    path = corpus / "train-clean-100" / "84" / "121123" / "84-121123-0001.flac"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # its header still promises all of it
    arguments = ["--task", "asr", "--budget", "0.9", "--data", corpus, "--out"]
    status, printed, errors = run(capsys, *arguments, tmp_path / "a", *FAST)
    assert status == 2
    assert "--skip-bad" in errors
    status, printed, _ = run(capsys, *arguments, tmp_path / "b", "--skip-bad", *FAST)
    assert status == 0
    assert printed.count("84-121123-0001.flac") == 1
    assert report_of(tmp_path / "b")["skipped"] == 1


def test_a_corpus_of_which_a_twentieth_is_broken_in_every_way(small, capsys, tmp_path):
    corpus = make_librispeech(tmp_path / "corpus", 66)
    folder = corpus / "train-clean-100" / "84" / "121123"
    transcripts = folder / "84-121123.trans.txt"
    lines = transcripts.read_text().splitlines()
    for i, how in enumerate(("missing", "empty", "no bytes", "not audio", "truncated", "NaN")):
        (folder / f"84-121123-{i:04}.flac").unlink()
        make_bad(folder / "bad.wav", how)
        if how != "missing":
            (folder / "bad.wav").rename(folder / f"84-121123-{i:04}.flac")
    lines[6] = "84-121123-0006 \x1b[;..."
    lines[7] = "84-121123-0007 " + "NO TIME FOR SO MUCH " * 20
    lines[8] = "../../../etc/passwd GO ON"
    (folder / "84-121123-0009.flac").unlink()
    (folder / "84-121123-0009.flac").mkdir()
    transcripts.write_text("\n".join(lines))
    arguments = [
        *"--task asr --budget 0.9 --data".split(),
        corpus,
        *"--batch-seconds 300 --evaluate-updates 0 --out".split(),
    ]
    updates = ["--dense-updates", "0", "--prune-updates", "1", "--finetune-updates", "1"]  # an epoch each
    refused(run(capsys, *arguments, tmp_path / "a", *updates), "of 198 utterances are unusable", "--skip-bad")
    status, printed, errors = run(capsys, *arguments, tmp_path / "b", "--skip-bad", *updates)
    assert (status, errors) == (0, "")
    assert "\x1b" not in printed
    report = report_of(tmp_path / "b")
    assert report["skipped"] == len(report["skipped_reasons"]) == 10
    for i in (0, 1, 2, 3, 4, 5, 6, 7, 9):
        assert sum(f"84-121123-{i:04}" in reason for reason in report["skipped_reasons"]) == 1
    assert any("84-121123.trans.txt: line 9" in reason for reason in report["skipped_reasons"])


def test_a_transcript_too_long_for_its_audio_is_scored_and_not_trained_on(small, capsys, monkeypatch, tmp_path):
    corpus, trained, loss = make_librispeech(tmp_path / "corpus", 4), [], sslprune.SpeechModel.loss
    monkeypatch.setattr(
        sslprune.SpeechModel,
        "loss",
        lambda self, *batch: trained.extend(u.name for u in batch[2]) or loss(self, *batch),
    )
    for transcripts in corpus.glob("*/*/*/*.trans.txt"):
        transcripts.write_text(transcripts.read_text().replace("NUMBER C", "NUMBER C" * 30))
    flags = ["--task", "asr", "--budget", "1", "--data", corpus, "--skip-bad", "--out", tmp_path / "run"]
    updates = ["--dense-updates", "1", "--prune-updates", "0", "--finetune-updates", "0"]
    assert run(capsys, *flags, *updates)[0] == 0
    assert sorted(trained) == [f"84-121123-000{i}" for i in (0, 1, 3)]
    (reason,) = report_of(tmp_path / "run")["skipped_reasons"]
    assert "84-121123-0002" in reason
    for split in ("dev", "test"):
        rows = [row.split("\t")[:2] for row in (tmp_path / "run" / f"{split}.tsv").read_text().splitlines()[1:]]
        assert len(rows) == 4 and ["84-121123-0002", "GO ON " + "NUMBER C" * 30] in rows


def test_the_learning_rate_has_three_stages():
    rates = [sslprune.tri_stage(i / 1000) for i in range(1000)]
    assert rates[0] < 0.02
    assert max(rates) == 1 == rates[300]
    assert rates[100:500] == [1.0] * 400
    assert rates[750] == pytest.approx(math.sqrt(0.05))
    assert rates[-1] == pytest.approx(0.05, rel=0.01)


def test_the_pages_have_no_gaps_and_name_what_exists(capsys):
    pages = [HERE.parent / "README.md", HERE / "experiment" / "README.md", HERE / "checks" / "README.md"]
    readme = "".join(page.read_text() for page in pages)
    assert "@" not in readme
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            assert (page.parent / link).exists(), link
    for script in re.findall(r"tests/\w[\w/]*\.\w+", readme):
        assert (HERE.parent / script).exists(), script
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)", readme):
        assert f"def {name}(" in tests, name
    for module, name in re.findall(r"`(\w+)\.(\w+)(?:\.\w+)?`", readme):
        if (HERE.parent / f"{module}.py").exists() and name != "py":
            assert re.search(rf"^(?:def |class )?{name}\b", (HERE.parent / f"{module}.py").read_text(), re.MULTILINE), (
                name
            )
    flags = r"(?<![\w-])--[a-z]+(?:-[a-z]+)*"
    known = set(re.findall(flags, run(capsys, "--help")[1])) | {
        *"--seconds --nproc-per-node --quick --engines --strings".split(),
        *"--results --only --jobs --remedies --draw-seeds --shm-size --update".split(),
    }  # of flops.py, torchrun, the scripts in tests, and Docker
    assert set(re.findall(flags, readme)) <= known


def test_a_name_that_is_no_text_is_printed(capsys, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/\xfcber.wav")
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).normal(0, 0.1, 9_000), 16_000)
    (tmp_path / "x.wav").rename(name)
    sslprune.save_model(sslprune.SpeechModel(tiny(), "slu", ["a"]), tmp_path / "model.pt")
    status, printed, _ = run(capsys, "--predict", tmp_path / "model.pt", name, name)
    assert (status, printed) == (0, f"{tmp_path}/\\udcfcber.wav\ta\n" * 2)


def test_describe_prints_the_costs_of_a_checkpoint_and_what_its_layers_kept(capsys, tmp_path):
    model = sslprune.SpeechModel(tiny(KINDS["mac"]).slice(), "slu", ["yes", "no"])
    sslprune.save_model(model, tmp_path / "model.pt")
    status, printed, errors = run(capsys, "--describe", tmp_path / "model.pt")
    assert (status, errors) == (0, "")
    c, shape = cost(model.encoder.shape, 160_000), model.encoder.shape
    for number in (
        f"{c.macs:,}",
        f"{c.params:,}",
        f"{shape.channels[3]}/{TINY.channels[3]}\n",
        f"{shape.units[1]}/{TINY.units[1]}\n",
    ):
        assert number in printed
    refused(run(capsys, "--describe", tmp_path / "nowhere.pt"), "nowhere.pt")


# --- Wrong use: one line that says what to do, exit status 2, nothing lost ---


def command(*arguments, **options):
    result = subprocess.run(
        [sys.executable, MAIN, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )
    return result.returncode, result.stdout, result.stderr


def refused(result, *words):
    status, _, errors = result
    assert status == 2, result
    assert errors.startswith("sslprune: "), errors
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    for word in words:
        assert word in errors, errors


WRONG = {
    "no GPU": (["--task", "asr", "--budget", "0.5", "--device", "cuda:99"], ["--device cuda:99"]),
    "no arguments": ([], ["--task"]),
    "no budget": (["--task", "asr"], ["--budget"]),
    "unknown task": (["--task", "translate", "--budget", "0.5"], ["asr", "slu"]),
    "unknown method": (["--task", "asr", "--budget", "0.5", "--method", "magic"], ["sepsize"]),
    "unknown flag": (["--task", "asr", "--budget", "0.5", "--bugdet"], ["--bugdet"]),
    "abbreviated flag": (["--task", "asr", "--budg", "0.5"], []),
    **{
        f"budget {b}": (["--task", "asr", "--budget", b], ["--budget", b])
        for b in ("0", "1.5", "-0.5", "half", "nan", "inf", "")
    },
    "unreachable budget": (["--task", "asr", "--budget", "0.1", "--method", "transformer"], ["0.35", "--budget"]),
    "missing folder": (["--task", "asr", "--budget", "0.5", "--data", "nowhere"], ["nowhere"]),
    "no known layout": (
        ["--task", "asr", "--budget", "0.5", "--data", str(HERE / "experiment" / "pretrained")],
        ["LibriSpeech", "SLURP"],
    ),
    "missing checkpoint": (["--task", "asr", "--budget", "0.5", "--checkpoint", "nowhere.pt"], ["nowhere.pt"]),
    "text as checkpoint": (["--task", "asr", "--budget", "0.5", "--checkpoint", MAIN], [MAIN]),
    "foreign model to predict": (["--predict", MAIN, "x.wav"], [MAIN]),
    "nothing to predict": (["--predict", "model.pt"], ["recording"]),
    "missing model to evaluate": (["--evaluate", "nowhere.pt"], ["nowhere.pt"]),
    "unknown device": (["--task", "asr", "--budget", "0.5", "--device", "abacus"], ["abacus"]),
    "device without data": (["--task", "asr", "--budget", "0.5", "--device", "meta"], ["meta"]),
    "device of a missing module": (
        ["--task", "asr", "--budget", "0.5", "--device", "privateuseone"],
        ["privateuseone"],
    ),
    "empty checkpoint": (["--task", "asr", "--budget", "0.5", "--checkpoint", ""], ["empty"]),
    "budget when predicting": (["--predict", "model.pt", "x.wav", "--budget", "0.5"], ["--budget", "--predict"]),
    "training split when predicting": (["--predict", "model.pt", "x", "--train", "train"], ["--train", "--predict"]),
    "negative seed": (["--task", "asr", "--budget", "0.5", "--seed", "-1"], ["--seed"]),
    "fractional updates": (["--task", "asr", "--budget", "0.5", "--prune-updates", "1.5"], ["--prune-updates"]),
    "zero batch": (["--task", "asr", "--budget", "0.5", "--batch-seconds", "0"], ["--batch-seconds"]),
    "subsets of the demo": (["--task", "asr", "--budget", "0.5", "--train", "train-clean-100"], ["demo"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_ends_in_one_line(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, words = WRONG[name]
    refused(run(capsys, *arguments), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_NTASKS": "2"}, ["SLURM_NTASKS is 2", "torchrun", "RANK"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE is 4"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK is to be below WORLD_SIZE"]),
    ],
)
def test_tasks_of_a_launcher_that_do_not_know_of_each_other_are_refused(
    small, capsys, monkeypatch, tmp_path, environment, words
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(run(capsys, "--task", "slu", "--budget", "0.5", "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_is_not_there_is_named_before_an_out_that_is(capsys, tmp_path):
    (tmp_path / "report.json").write_text("precious")
    arguments = ["--task", "asr", "--budget", "0.5", "--data", tmp_path / "nowhere", "--out", tmp_path]
    refused(run(capsys, *arguments), "nowhere", "no such folder")


def test_a_run_without_out_goes_to_a_folder_that_names_all_that_tells_it_from_others(small, monkeypatch, tmp_path):
    monkeypatch.chdir(make_slurp(tmp_path / "corpus"))
    for data_, name in (("demo", "demo"), (".", "corpus")):
        options = sslprune.parse(["--task", "slu", "--budget", "0.8", "--data", data_, "--seed", "3", *FAST])
        assert str(sslprune.prepare(options, torch.device("cpu")).out) == f"runs/slu-{name}-mac-0.8-3"


def test_a_path_may_begin_with_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    flags = "--task=asr --budget=1 --out=~/run --data=~/corpus --checkpoint=~/model.pt".split()
    options = sslprune.parse(flags)
    paths = [options.out, options.data, options.checkpoint]
    assert paths == ["/home/of/mine/run", "/home/of/mine/corpus", "/home/of/mine/model.pt"]
    assert sslprune.parse(["--export", "~/a.pt", "~/a.pt2"]).export == ["/home/of/mine/a.pt", "/home/of/mine/a.pt2"]


def test_a_program_is_exported_to_no_other_ending_and_the_way_to_onnx_is_said(capsys, tmp_path):
    sslprune.save_model(sslprune.SpeechModel(tiny(), "slu", ["a"]), tmp_path / "m.pt")
    refused(run(capsys, "--export", tmp_path / "m.pt", tmp_path / "m.onnx"), "m.onnx", ".pt2", "torch.onnx.export")
    assert not (tmp_path / "m.onnx").exists()


def test_help_has_the_defaults_of_each_recipe(capsys):
    printed = " ".join(run(capsys, "--help")[1].split())
    text = "--dense-updates N default 0 with a checkpoint that is small or trained for the task, else: default 20000"
    assert text in printed
    assert "--prune-lr N default 0.0001, of a small model 0.001 (slu 0.0005)" in printed


def test_a_model_that_is_wrong_in_bfloat16_is_neither_trained_nor_used(small, capsys, monkeypatch, tmp_path):
    sslprune.save_model(sslprune.SpeechModel(tiny(), "slu", ["alarm_set"]), tmp_path / "m.pt")
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).normal(0, 0.1, 9_000), 16_000)
    linear = torch.nn.Linear.forward
    wrong = lambda self, x: linear(self, x) * (-1 if torch.is_autocast_enabled("cpu") else 1)  # noqa: E731
    monkeypatch.setattr(torch.nn.Linear, "forward", wrong)
    commands = [["--predict", tmp_path / "m.pt", tmp_path / "x.wav"], ["--evaluate", tmp_path / "m.pt"]]
    commands += [["--task", "slu", "--budget", "0.8", "--out", tmp_path / "run", *FAST]]
    for arguments in commands:
        refused(run(capsys, *arguments, "--dtype", "bfloat16"), "--dtype float32", "bfloat16")
    assert not (tmp_path / "run").exists()


def test_text_that_a_terminal_cannot_show_is_escaped(monkeypatch, tmp_path):
    sslprune.save_model(sslprune.SpeechModel(tiny(), "slu", ["привет"]), tmp_path / "m.pt")
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).normal(0, 0.1, 9_000), 16_000)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert sslprune.main(["--predict", str(tmp_path / "m.pt"), str(tmp_path / "x.wav")]) == 0
    printed = terminal.buffer.getvalue().decode().strip()
    assert printed == f"{tmp_path}/x.wav\t" + "привет".encode("ascii", "backslashreplace").decode()


def test_a_run_whose_output_nobody_reads_goes_on(tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
        "import data, sslprune; from conftest import TINY\n"
        "data.DEMO_SIZES, sslprune.SMALL = {'train': 40, 'dev': 5, 'test': 6}, TINY\n"
        "sys.exit(sslprune.main(sys.argv[1:]))\n"
    )
    arguments = ["--task", "slu", "--budget", "0.8", *FAST, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    assert "finetune 2/2" in (tmp_path / "run" / "log.txt").read_text()


def test_wrong_use_in_a_process_of_its_own(tmp_path):
    refused(command("--task", "asr", "--budget", "half", cwd=tmp_path), "half")


def test_an_out_that_holds_something_is_refused_and_left_alone(capsys, tmp_path):
    (tmp_path / "report.json").write_text("precious")
    refused(run(capsys, "--task", "asr", "--budget", "0.5", "--out", tmp_path), "--out")
    assert (tmp_path / "report.json").read_text() == "precious"
    refused(run(capsys, "--task", "asr", "--budget", "0.5", "--out", tmp_path / "report.json"), "--out")


def test_an_out_that_cannot_be_made_is_refused(small, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(capsys, "--task", "asr", "--budget", "0.5", "--out", tmp_path / "file" / "run", *FAST), "file")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    sslprune.write(path, b"old")

    def fail(*paths):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="model.pt"):
        sslprune.write(path, b"n", b"ew")
    monkeypatch.undo()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.pt", b"old")]
    sslprune.write(path, b"n", b"ew")
    assert path.read_bytes() == b"new"


def test_predict_goes_on_after_a_file_that_cannot_be_read(small, capsys, tmp_path):
    run(capsys, "--task", "slu", "--budget", "0.9", "--out", tmp_path / "run", *FAST)
    make_bad(tmp_path / "bad.wav", "not audio")
    soundfile.write(tmp_path / "short.wav", np.zeros(300), 16_000)
    soundfile.write(tmp_path / "good.wav", np.random.default_rng(0).normal(0, 0.1, (9_000, 2)), 44_100)
    files = [tmp_path / name for name in ("bad.wav", "missing.wav", "short.wav", "good.wav")]
    status, printed, errors = run(capsys, "--predict", tmp_path / "run" / "model.pt", *files)
    assert status == 2
    assert re.fullmatch(r".*good\.wav\t\w+\n", printed)
    assert [line.split(":")[0] for line in errors.splitlines()] == ["sslprune"] * 3
    assert all(name in errors for name in ("bad.wav", "missing.wav", "short.wav"))


def test_evaluate_refuses_another_task_and_needs_no_training_split(small, capsys, tmp_path):
    corpus = make_slurp(tmp_path / "slurp")
    assert run(capsys, "--task", "slu", "--budget", "0.9", "--data", corpus, "--out", tmp_path / "run", *FAST)[0] == 0
    model = tmp_path / "run" / "model.pt"
    refused(run(capsys, "--evaluate", model, "--task", "asr"), "slu")
    os.remove(corpus / "dataset" / "slurp" / "train.jsonl")
    status, printed, _ = run(capsys, "--evaluate", model, "--data", corpus)
    assert status == 0
    assert "scenario accuracy" in printed
