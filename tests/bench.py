"""How fast: the forward pass and the training step of wav2vec2-base, dense and pruned, in turn with transformers' where installed.

    python tests/bench.py            # about ten minutes on two cores
    python tests/bench.py --quick    # two minutes: 10 s of audio only, fewer repeats

Weights and audio are random, which changes no time. What is compared runs in turn, A B A B, and medians are given: the ratios
are to be trusted more than the seconds. Memory is what a forward pass adds to the loaded model, in a process of its own (Linux).
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from flops import BASE, SAMPLE_RATE, SAMPLES, cost
from gates import KINDS, Lagrangian, harden
from transformer import Wav2Vec2, load_pretrained, precision

CPU = torch.device("cpu")


def models():
    """wav2vec2-base as transformers has it (None where that is not installed) and as we have it, with the same weights."""
    torch.manual_seed(0)
    try:
        from transformers import Wav2Vec2Config, Wav2Vec2Model
    except ImportError:
        return None, Wav2Vec2(BASE).eval()
    theirs = Wav2Vec2Model(Wav2Vec2Config(apply_spec_augment=False, layerdrop=0.0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_pretrained(folder)


def pruned(budget, ragged=False):
    """A model pruned to a share of the MACs; the units are chosen at random over the whole model."""
    torch.manual_seed(1)
    model = Wav2Vec2(BASE).eval()
    model.add_gates(KINDS["mac"])
    for gate in model.gates.values():
        torch.nn.init.normal_(gate.log_alpha, std=2)
    harden(model.gates, BASE, "mac", budget, ragged)
    return model.slice()


def in_turn(functions, repeats):
    """{name: function} -> {name: median seconds}, run A B A B; the first round warms up."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward(model, waveforms, dtype=torch.float32):
    @torch.no_grad()
    def run():
        with precision(dtype, CPU):
            model(waveforms)

    return run


def training_step(model, waveforms, lagrangian=None):
    """Forward and backward, without the optimizer's step, which is the same for all."""

    def run():
        model.zero_grad(set_to_none=True)
        loss = model(waveforms)[0].square().mean()
        if lagrangian:
            loss = loss + lagrangian(model.gates, 1.0)
        loss.backward()

    return run


def row(name, seconds, reference, note=""):
    print(f"| {name:<44} | {seconds * 1e3:>8.1f} ms | {reference / seconds:>6.2f} | {note}", flush=True)


def heading(name, reference):
    print(f"\n| {name:<44} |        time | {reference} / this |", flush=True)
    print("| --- | ---: | ---: |", flush=True)


def memory(whose, seconds):
    """Bytes that a forward pass adds to the process in which the model is loaded."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench, torch\n"
        f"model = bench.models()[{0 if whose == 'transformers' else 1}]\n"
        "def peak(): return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts anew at what is in use now
        f"before, x = peak(), torch.randn(1, {seconds * SAMPLE_RATE})\n"
        "bench.forward(model, x)(); print('kB', peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(re.search(r"kB (\d+)", result.stdout)[1]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 s of audio only, fewer repeats")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = 5 if arguments.quick else 11
    theirs, ours = models()
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, transformers: {theirs is not None}"
    )

    taken, macs = {}, {}
    for seconds in (10,) if arguments.quick else (5, 10, 30, 60):
        waveform = torch.randn(1, seconds * SAMPLE_RATE)
        functions = {"transformers, float32": forward(theirs, waveform)} if theirs else {}
        functions |= {
            "dense, float32": forward(ours, waveform),
            "dense, bfloat16": forward(ours, waveform, torch.bfloat16),
        }
        found = in_turn(functions, repeats if seconds <= 10 else 5)
        reference = next(iter(found))
        heading(f"forward, {seconds} s of audio", reference)
        for name in functions:
            row(name, found[name], found[reference])
        taken[seconds], macs[seconds] = found["dense, float32"], cost(BASE, seconds * SAMPLE_RATE).macs
    for seconds in list(taken)[2:]:
        print(
            f"\ngrowth of the time from 10 s to {seconds} s over the growth of MACs: {taken[seconds] / taken[10] / (macs[seconds] / macs[10]):.2f}"
        )

    waveform = torch.randn(1, SAMPLES)
    for dtype in (torch.float32, torch.bfloat16):
        sliced = {f"pruned to {budget}": pruned(budget) for budget in (0.75, 0.5, 0.25)} | {
            "pruned to 0.5, --ragged": pruned(0.5, True)
        }
        functions = {name: forward(model, waveform, dtype) for name, model in ({"dense": ours} | sliced).items()}
        found = in_turn(functions, repeats)
        heading(f"forward, 10 s, {str(dtype).removeprefix('torch.')}", "dense")
        for name in functions:
            row(
                name,
                found[name],
                found["dense"],
                ""
                if name == "dense"
                else f"{cost(sliced[name].shape, SAMPLES).macs / cost(BASE, SAMPLES).macs:.4f} of the MACs |",
            )

    waveforms = torch.randn(4, 5 * SAMPLE_RATE)
    gated = Wav2Vec2(BASE)
    gated.add_gates(KINDS["mac"])
    functions = {"transformers": training_step(theirs.train(), waveforms)} if theirs else {}
    functions |= {
        "dense": training_step(ours.train(), waveforms),
        "with gates": training_step(gated, waveforms, Lagrangian(BASE, "mac", 0.5)),
    }
    found = in_turn(functions, 3 if arguments.quick else 7)
    reference = next(iter(found))
    heading("training step, 4 utterances of 5 s, float32", reference)
    for name in functions:
        row(name, found[name], found[reference])
    print(f"\nwith gates / dense: {found['with gates'] / found['dense']:.3f}")

    @torch.no_grad()
    def count():
        with FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH):
            ours.eval()(waveform)

    found = in_turn({"FlopCounterMode": count, "flops.cost": lambda: cost(BASE, SAMPLES)}, repeats)
    print(f"\nFlopCounterMode / flops.cost: {found['FlopCounterMode'] / found['flops.cost']:,.0f}")
    if os.path.exists("/proc/self/clear_refs"):
        for whose in (["transformers"] if theirs else []) + ["ours"]:
            print(f"memory that a forward of 60 s adds, {whose}: {memory(whose, 60) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
