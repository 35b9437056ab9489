"""What a GPU is to do, for whoever has one: the same as the CPU, and how long wav2vec2-base's recipe takes on it.

    .venv/bin/python tests/checks/check_cuda.py                # some minutes, all GPUs that are there
    .venv/bin/python tests/checks/check_cuda.py --device cpu   # a CPU, smaller updates: to try the script

1. The features of the small model and of wav2vec2-base, in float32 and in bfloat16, against the CPU's in float32.
2. A short run in each precision against the CPU's: the loss of the first updates, and the budget that is kept.
3. A run that SIGTERM stops, and --resume ends.
4. A run of a process on each GPU (NCCL), by torchrun.
5. An update of wav2vec2-base as its recipe has it, 4 batches of 100 s with gates: seconds, memory, hours of the recipe.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import sslprune  # noqa: E402
from flops import BASE, SMALL  # noqa: E402
from sslprune import save_model
from transformer import SpeechModel, Wav2Vec2, precision  # noqa: E402

SHORT = "--task slu --budget 0.7 --dense-updates 6 --prune-updates 8 --finetune-updates 2 --evaluate-updates 1".split()
NEAR = {"float32": 5e-3, "bfloat16": 5e-2}  # TF32 has 10 bits behind the point, bfloat16 has 7


def check(what, holds):
    print(f"{'ok ' if holds else 'NOT'} {what}", flush=True)
    check.failed |= not holds


check.failed = False


@torch.no_grad()
def features(device):
    torch.manual_seed(0)
    waveforms, lengths = torch.randn(2, 48_000), torch.tensor([48_000, 30_000])
    for name, shape in (("small", SMALL), ("wav2vec2-base", BASE)):
        model = Wav2Vec2(shape).eval()
        exact = model(waveforms, lengths)[0]
        model.to(device)
        for dtype, near in NEAR.items():
            with precision(sslprune.DTYPES[dtype], device):
                found = model(waveforms.to(device), lengths)[0].float().cpu()
            error = ((found - exact).norm() / exact.norm()).item()
            check(f"features of {name} in {dtype}: {error:.1e} of the CPU's norm", error < near)


def run(out, *arguments):
    """A run in this process; its report, and the lines of metrics.jsonl."""
    status = sslprune.main([*map(str, arguments), "--out", str(out)])
    check(f"exit status of {out.name}: {status}", status == 0)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return json.loads((out / "report.json").read_text()), list(map(json.loads, lines))


def short_runs(device, folder):
    _, on_cpu = run(folder / "cpu", *SHORT, "--device", "cpu")
    for dtype, near in NEAR.items():
        report, lines = run(folder / dtype, *SHORT, "--device", device, "--dtype", dtype)
        losses = [(a["loss"], b["loss"]) for a, b in zip(on_cpu, lines) if a["loss"] and a["phase"] == "dense"][:3]
        error = max(abs(a - b) / a for a, b in losses)
        check(f"losses of the first updates in {dtype}: {error:.1e} from the CPU's", error < 2 * near)
        check(f"budget in {dtype}: {report['achieved']:.4f} of 0.7", 0.69 < report["achieved"] <= 0.7)


def resumed(device, folder):
    command = [sys.executable, ROOT / "sslprune.py", *SHORT, "--device", device, "--out", folder / "resumed"]
    command += ["--dense-updates", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "dense 5/" not in (line := process.stdout.readline()) and line:
        pass
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    check(f"SIGTERM: {errors.strip()}", process.returncode == 128 + signal.SIGTERM and "--resume" in errors)
    process = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = [process.stdout.readline() for _ in range(12)]
    process.send_signal(signal.SIGTERM)
    process.communicate()
    check("--resume goes on", any("goes on at dense" in line for line in printed))


def many(device, folder):
    gpus = torch.cuda.device_count() if device.type == "cuda" else 2
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command = [*start, str(ROOT / "sslprune.py"), *SHORT, "--device", device.type, "--out", str(folder / "many")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check(f"torchrun with {gpus} processes: exit status {done.returncode} {done.stderr[-300:]}", done.returncode == 0)


def base(device, folder):
    rng, sampled = np.random.default_rng(0), 32
    (folder / "data").mkdir()
    for i in range(sampled):
        soundfile.write(folder / "data" / f"{i}.wav", rng.standard_normal(200_000) * 0.1, 16_000)  # 12.5 s
    rows = "path\ttext\n" + "".join(f"{i}.wav\t{'SOME WORDS OF A SENTENCE ' * 7}\n" for i in range(sampled))
    for split in ("train", "dev", "test"):
        (folder / "data" / f"{split}.tsv").write_text(rows if split == "train" else "\n".join(rows.split("\n")[:2]))
    model = SpeechModel(Wav2Vec2(BASE), "asr", ["<pad>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"])
    save_model(model, folder / "base.pt")
    recipe = sslprune.RECIPES["base"]
    for dtype in NEAR:
        seconds = []
        for updates in (2, 6):
            out = folder / f"base-{dtype}-{updates}"
            flags = f"--task asr --budget 0.5 --finetune-updates 0 --evaluate-updates 0 --dtype {dtype}".split()
            flags += ["--prune-updates", updates, "--data", folder / "data", "--checkpoint", folder / "base.pt"]
            flags += ["--batch-seconds", 13, "--accumulate", 1] if device.type == "cpu" else []
            report, _ = run(out, *flags, "--device", device)
            seconds.append(report["train_seconds"])
        each = (seconds[1] - seconds[0]) / 4
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
        updates = sum(recipe[f"{phase}_updates"] for phase in sslprune.PHASES)
        what = f"{each:.2f} s{memory}; {updates:,} updates take {each * updates / 3600:.0f} hours"
        check(f"an update of wav2vec2-base in {dtype}: {what}", each > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    name = parser.parse_args().device
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("check_cuda: torch sees no GPU here, so nothing was checked")
    device, begin = sslprune.find_device(name), time.monotonic()
    os.chdir(ROOT)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"torch {torch.__version__} on {what}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in (short_runs, resumed, many, base):
            part(device, Path(folder))
        features(device)
    print(f"{time.monotonic() - begin:.0f} s; {'something is NOT as it should be' if check.failed else 'all is well'}")
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
