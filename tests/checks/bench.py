"""How fast: wav2vec2-base, dense and pruned, here, in transformers, and in the tools that models are deployed with.

    python tests/checks/bench.py              # all, some twenty minutes on two cores
    python tests/checks/bench.py --quick      # 10 s of audio only, fewer repeats
    python tests/checks/bench.py --engines    # only the tools to deploy with

Weights and audio are random, which changes no time. What is compared runs in turn, A B A B, and medians are given: the
ratios are to be trusted more than the seconds. What is not installed (transformers; onnx, onnxscript and onnxruntime;
openvino) is left out and named. torch.compile and AOTInductor need a C++ compiler. Memory is what a forward pass adds
to the loaded model, in a process of its own (Linux).
"""

import argparse
import copy
import functools
import importlib.util
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.ao.quantization import quantize_dynamic
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.mkldnn import to_mkldnn

sys.path.insert(0, str(Path(__file__).parents[2]))

from flops import BASE, SAMPLE_RATE, SAMPLES, cost
from gates import KINDS, Lagrangian, harden
from transformer import Wav2Vec2, load_pretrained, precision

CPU = torch.device("cpu")
ANY = torch.export.Dim.DYNAMIC


def models():
    """wav2vec2-base as transformers has it (None where it is not installed) and as we have it, with equal weights."""
    torch.manual_seed(0)
    if not installed("transformers"):
        return None, Wav2Vec2(BASE).eval()
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    theirs = Wav2Vec2Model(Wav2Vec2Config(apply_spec_augment=False, layerdrop=0.0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_pretrained(folder)


def installed(*packages):
    return all(importlib.util.find_spec(package) for package in packages)


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
    """A function that runs a model, and returns its features."""

    @torch.no_grad()
    def run():
        with precision(dtype, CPU):
            return model(waveforms)[0]

    return run


def training_step(model, waveforms, lagrangian=None):
    """A function that runs forward and backward, without the optimizer's step, which is the same for all."""

    def run():
        model.zero_grad(set_to_none=True)
        loss = model(waveforms)[0].square().mean()
        if lagrangian:
            loss = loss + lagrangian(model.gates, 1.0)
        loss.backward()

    return run


def show(title, found, notes=None):
    """Print a table of {name: seconds}; what is first is the reference of the ratios."""
    reference = next(iter(found))
    print(f"\n| {title:<44} |        time | {reference} / this |\n| --- | ---: | ---: |")
    for name, seconds in found.items():
        note = (notes or {}).get(name, "")
        print(f"| {name:<44} | {seconds * 1e3:>8.1f} ms | {found[reference] / seconds:>6.2f} | {note}", flush=True)


# --- What this program and transformers do -------------------------------------------------------------------------


def lengths(theirs, ours, repeats, all_seconds):
    """The forward pass of the dense model by length, and how its time grows."""
    taken = {}
    for seconds in all_seconds:
        waveform = torch.randn(1, seconds * SAMPLE_RATE)
        functions = {"transformers, float32": forward(theirs, waveform)} if theirs else {}
        functions["dense, float32"] = forward(ours, waveform)
        functions["dense, bfloat16"] = forward(ours, waveform, torch.bfloat16)
        found = in_turn(functions, repeats if seconds <= 10 else 5)
        show(f"forward, {seconds} s of audio", found)
        taken[seconds] = found["dense, float32"] / cost(BASE, seconds * SAMPLE_RATE).macs
    for seconds in [seconds for seconds in taken if seconds > 10]:
        print(f"growth of the time from 10 to {seconds} s over that of the MACs: {taken[seconds] / taken[10]:.2f}")


def budgets(ours, repeats):
    """The forward pass of pruned models."""
    waveform = torch.randn(1, SAMPLES)
    sliced = {f"pruned to {budget}": pruned(budget) for budget in (0.75, 0.5, 0.25)}
    sliced["pruned to 0.5, --ragged"] = pruned(0.5, ragged=True)
    shares = {name: cost(model.shape, SAMPLES).macs / cost(BASE, SAMPLES).macs for name, model in sliced.items()}
    notes = {name: f"{share:.4f} of the MACs |" for name, share in shares.items()}
    for dtype in (torch.float32, torch.bfloat16):
        functions = {name: forward(model, waveform, dtype) for name, model in ({"dense": ours} | sliced).items()}
        show(f"forward, 10 s, {str(dtype).removeprefix('torch.')}", in_turn(functions, repeats), notes)


def training(theirs, ours, repeats):
    """A training step, without and with gates."""
    waveforms, gated = torch.randn(4, 5 * SAMPLE_RATE), Wav2Vec2(BASE)
    gated.add_gates(KINDS["mac"])
    functions = {"transformers": training_step(theirs.train(), waveforms)} if theirs else {}
    functions["dense"] = training_step(copy.deepcopy(ours).train(), waveforms)
    functions["with gates"] = training_step(gated, waveforms, Lagrangian(BASE, "mac", 0.5))
    found = in_turn(functions, repeats)
    show("training step, 4 utterances of 5 s, float32", found)
    print(f"\nwith gates / dense: {found['with gates'] / found['dense']:.3f}")


def counting(ours, repeats):
    """Counting MACs by torch's counter, and by flops.cost."""

    @torch.no_grad()
    def count():
        with FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH):
            ours(torch.randn(1, SAMPLES))

    found = in_turn({"FlopCounterMode": count, "flops.cost": lambda: cost(BASE, SAMPLES)}, repeats)
    print(f"\nFlopCounterMode / flops.cost: {found['FlopCounterMode'] / found['flops.cost']:,.0f}")


def memory(whose, seconds):
    """Bytes that a forward pass adds to the process in which the model is loaded."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench, torch
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
model = bench.models()[{0 if whose == "transformers" else 1}]
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew at what is in use now
before, x = peak(), torch.randn(1, {seconds * SAMPLE_RATE})
bench.forward(model, x)()
print("kB", peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(re.search(r"kB (\d+)", result.stdout)[1]) * 1024


# --- What others make of our models --------------------------------------------------------------------------------


def prepacked(model, folder):
    """Linear layers and convolutions with their weights in oneDNN's own layout: a line of torch's."""
    return features_of(to_mkldnn(copy.deepcopy(model)))


def compiled(model, folder):
    return features_of(torch.compile(model, dynamic=True))


@torch.no_grad()  # or the weights are not packed
def ahead_of_time(model, folder):
    """AOTInductor: a compiled package, which C++ programs load too."""
    program = torch.export.export(model, (torch.randn(2, SAMPLES),), dynamic_shapes=({0: ANY, 1: ANY},))
    path = f"{folder}/model.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs={"freezing": True})
    return features_of(torch._inductor.aoti_load_package(path))


def onnx_file(model, folder):
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            model, (torch.randn(2, SAMPLES),), dynamo=True, dynamic_shapes=({0: ANY, 1: ANY},), verbose=False
        )
    program.save(f"{folder}/model.onnx")
    return f"{folder}/model.onnx"


def onnx_runtime(model, folder):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_file(model, folder), options)
    name = session.get_inputs()[0].name
    return lambda waveforms: torch.from_numpy(session.run(None, {name: waveforms.numpy()})[0])


def open_vino(model, folder):
    """In float32; by itself it computes in bfloat16 where the CPU can."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    core = openvino.Core()
    program = core.compile_model(core.read_model(onnx_file(model, folder)), "CPU", settings)
    return lambda waveforms: torch.from_numpy(program(waveforms.numpy())[0].copy())


def eight_bits(model, folder):
    with warnings.catch_warnings(action="ignore"):
        return features_of(quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, torch.qint8))


def features_of(model, folder=None):
    """A function from waveforms to the features that a model, or what a tool made of it, makes of them."""
    return torch.no_grad()(lambda waveforms: model(waveforms)[0])


ENGINES = {  # name: (what it needs, a function from a model and a folder to one from waveforms to features)
    "this": ((), features_of),
    "this, to_mkldnn": ((), prepacked),
    "torch.compile": ((), compiled),
    "AOTInductor": ((), ahead_of_time),
    "ONNX Runtime": (("onnx", "onnxscript", "onnxruntime"), onnx_runtime),
    "OpenVINO": (("onnx", "onnxscript", "openvino"), open_vino),
    "this, quantize_dynamic (int8)": ((), eight_bits),
}


def engines(theirs, ours, repeats):
    """Each tool's time for the dense model and for one pruned to half, and how far its features are from ours."""
    waveform, others = torch.randn(1, SAMPLES), torch.randn(3, 3 * SAMPLE_RATE)
    made, differences = {("transformers", "dense"): features_of(theirs)} if theirs else {}, {}
    for name, (needs, make) in ENGINES.items():
        if not installed(*needs):
            print(f"{name} is left out: {', '.join(needs)} are not all installed")
            continue
        for which, model in (("dense", ours), ("half", pruned(0.5))):
            with tempfile.TemporaryDirectory() as folder:
                made[name, which] = make(model, folder)
    for (name, which), function in made.items():
        for waveforms in (others, waveform):  # any number of utterances and samples must do
            expected = made["this", which](waveforms)
            difference = ((function(waveforms) - expected).abs().max() / expected.abs().max()).item()
            differences[name] = max(difference, differences.get(name, 0))
    taken = in_turn({key: functools.partial(function, waveform) for key, function in made.items()}, repeats)
    print("\n| 10 s, float32 | dense | pruned to half | dense / pruned | this dense / its dense | difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in differences:
        dense, half = (taken.get((name, which), math.nan) for which in ("dense", "half"))
        ratios = f"{dense / half:.2f} | {taken['this', 'dense'] / dense:.2f}"
        print(
            f"| {name} | {dense * 1e3:.0f} ms | {half * 1e3:.0f} ms | {ratios} | {differences[name]:.0e} |", flush=True
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 s of audio only, fewer repeats")
    parser.add_argument("--engines", action="store_true", help="only the tools to deploy with")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    repeats = 5 if options.quick else 11
    theirs, ours = models()
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, transformers: {bool(theirs)}")
    if not options.engines:
        lengths(theirs, ours, repeats, (10,) if options.quick else (5, 10, 30, 60))
        budgets(ours, repeats)
        training(theirs, ours, 3 if options.quick else 7)
        counting(ours, repeats)
        if os.path.exists("/proc/self/clear_refs"):
            for whose in (["transformers"] if theirs else []) + ["ours"]:
                print(f"memory that a forward of 60 s adds, {whose}: {memory(whose, 60) / 1e9:.2f} GB")
        if theirs:
            theirs.eval()
    engines(theirs, ours, repeats)


if __name__ == "__main__":
    main()
