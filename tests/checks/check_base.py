"""wav2vec2-base at its real size against transformers: features, padding, FLOPs, slicing. Takes about a minute.

Needs transformers in a virtual environment apart from the project's own (python -m venv reference;
reference/bin/pip install -r requirements.txt transformers), and no network: the weights are random.
Run: reference/bin/python tests/checks/check_base.py
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2Config, Wav2Vec2Model

sys.path.insert(0, str(Path(__file__).parents[2]))

from flops import BASE, SAMPLES, cost
from gates import KINDS, METHODS, harden
from transformer import load_pretrained

checks = []


def check(name, value, good):
    print(f"{'ok    ' if good else 'FAILED'} {name}: {value}", flush=True)
    checks.append(good)


@torch.no_grad()
def flops(model, samples):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, samples))
    return counter.get_total_flops()


@torch.no_grad()
def main():
    torch.manual_seed(0)
    theirs = Wav2Vec2Model(Wav2Vec2Config()).eval()
    for parameter in theirs.parameters():  # norms and biases away from 1 and 0
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = load_pretrained(folder)
    check("shape is wav2vec2-base's", model.shape == BASE, model.shape == BASE)

    waveforms, lengths = torch.randn(2, 48_000), torch.tensor([48_000, 29_876])
    alone = [model(waveform[None, :n])[0][0] for waveform, n in zip(waveforms, lengths)]
    for features, waveform, n in zip(alone, waveforms, lengths):
        difference = (features - theirs(waveform[None, :n]).last_hidden_state[0]).abs().max().item()
        check(f"features of {n} samples differ from transformers' by", f"{difference:.1e}", difference < 1e-4)
    padded, frames = model(waveforms, lengths)
    difference = max((a - p[:n]).abs().max().item() for a, p, n in zip(alone, padded, frames))
    check("features alone and padded differ by", f"{difference:.1e}", difference < 1e-5)

    for name, encoder in (("transformers'", theirs), ("our", model)):
        counted = flops(encoder, SAMPLES)
        check(f"FLOPs of {name} model on 10 s", f"{counted:,}", counted == 2 * cost(BASE, SAMPLES).macs)

    for method in METHODS:
        model.add_gates(KINDS[method])
        for gate in model.gates.values():
            torch.nn.init.normal_(gate.log_alpha, std=2)
        harden(model.gates, BASE, method, 0.5)
        sliced = model.slice()
        gated = model(waveforms, lengths)[0]
        difference = ((sliced(waveforms, lengths)[0] - gated).abs().max() / gated.abs().max()).item()
        check(
            f"{method}: sliced and gated differ, over the largest feature, by", f"{difference:.1e}", difference < 1e-5
        )
        model.double()
        difference = (
            (model.slice()(waveforms.double(), lengths)[0] - model(waveforms.double(), lengths)[0]).abs().max().item()
        )
        check(f"{method}: the same in float64, absolutely", f"{difference:.1e}", difference < 1e-10)
        model.float()
        counted, kept = flops(sliced, SAMPLES), cost(sliced.shape, SAMPLES)
        check(
            f"{method}: FLOPs of the sliced model over the dense",
            f"{counted / 2 / cost(BASE, SAMPLES).macs:.4f}",
            counted == 2 * kept.macs,
        )
        params = sum(p.numel() for p in sliced.parameters())
        check(
            f"{method}: parameters of the sliced model over the dense",
            f"{params / cost(BASE, SAMPLES).params:.4f}",
            params == kept.params,
        )
        model.frontend.gates = None
        for layer in model.layers:
            layer.attention.gate = layer.ffn.gate = None
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
