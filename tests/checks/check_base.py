"""Models at their real size against transformers: features, padding, FLOPs, slicing to half, forward times.

    reference/bin/python tests/checks/check_base.py                    # wav2vec2-base, in about a minute
    reference/bin/python tests/checks/check_base.py wavlm-large xls-r  # other families, some ten minutes each
    reference/bin/python tests/checks/check_base.py --update xls-r     # and a training update of each phase

Needs transformers in a virtual environment apart from the project's own (python -m venv reference;
reference/bin/pip install -r requirements.txt transformers), and no network: the weights are random.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

import data
from flops import SAMPLES, cost
from gates import KINDS, METHODS, Lagrangian, harden
from sslprune import forward_seconds, make_optimizer
from transformer import SpeechModel, load_pretrained

LARGE = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, feat_extract_norm="layer",
    do_stable_layer_norm=True,
)  # fmt: skip
FAMILIES = {  # transformers' model and configuration, and the MACs and parameters of its features on 10 s
    "base": (transformers.Wav2Vec2Model, transformers.Wav2Vec2Config(), 74_066_523_136, 94_371_712),
    "hubert-base": (transformers.HubertModel, transformers.HubertConfig(), 74_066_523_136, 94_371_712),
    "xls-r": (
        transformers.Wav2Vec2Model, transformers.Wav2Vec2Config(conv_bias=True, **LARGE), 191_926_807_552, 315_438_720,
    ),
    "hubert-large": (
        transformers.HubertModel, transformers.HubertConfig(conv_bias=True, **LARGE), 191_926_807_552, 315_438_720,
    ),
    "wavlm-base": (transformers.WavLMModel, transformers.WavLMConfig(), 74_103_313_408, 94_381_936),
    "wavlm-large": (transformers.WavLMModel, transformers.WavLMConfig(**LARGE), 192_024_914_944, 315_453_120),
}  # fmt: skip

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
def check_family(name):
    """Returns the model, gated and hardened to half its MACs, and the sliced one."""
    torch.manual_seed(0)
    kind, config, macs, params = FAMILIES[name]
    theirs = kind(config).eval()
    for parameter in theirs.parameters():  # norms and biases away from 1 and 0
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = load_pretrained(folder)
    whole = cost(model.shape, SAMPLES)
    check(f"{name}: MACs and parameters", f"{whole.macs:,} {whole.params:,}", whole.total == (macs, params))

    waveforms, lengths = torch.randn(2, 48_000), torch.tensor([48_000, 29_876])
    alone = [model(waveform[None, :n])[0][0] for waveform, n in zip(waveforms, lengths)]
    largest = max(features.abs().max().item() for features in alone)
    for features, waveform, n in zip(alone, waveforms, lengths):
        difference = (features - theirs(waveform[None, :n]).last_hidden_state[0]).abs().max().item() / largest
        check(f"{name}: features of {n} samples differ from transformers', over the largest, by", f"{difference:.1e}",
              difference < 1e-4)  # fmt: skip
    padded, frames = model(waveforms, lengths)
    difference = max((a - p[:n]).abs().max().item() for a, p, n in zip(alone, padded, frames)) / largest
    check(f"{name}: features alone and padded differ by", f"{difference:.1e}", difference < 1e-5)
    for whose, encoder in (("transformers'", theirs), ("our", model)):
        counted = flops(encoder, SAMPLES)
        check(f"{name}: FLOPs of {whose} model on 10 s", f"{counted:,}", counted == 2 * macs)
    del theirs

    for method in ("transformer", "sepsize", "size", "mac"):
        model.frontend.gates = None
        for layer in model.layers:
            layer.attention.gate = layer.ffn.gate = None
        model.add_gates(KINDS[method])
        for gate in model.gates.values():
            torch.nn.init.normal_(gate.log_alpha, std=2)
        harden(model.gates, model.tensor_shape, method, 0.5)
        sliced = model.slice()
        gated = model(waveforms, lengths)[0]
        difference = ((sliced(waveforms, lengths)[0] - gated).abs().max() / gated.abs().max()).item()
        check(f"{name}, {method}: sliced and gated differ by", f"{difference:.1e}", difference < 1e-5)
        kept, shares = cost(sliced.shape, SAMPLES), []
        for constraint in METHODS[method]:
            shares.append(constraint.measure(kept) / constraint.measure(whole))
        check(f"{name}, {method}: kept", ", ".join(f"{s:.4f}" for s in shares), all(0.498 < s <= 0.5 for s in shares))
        found = flops(sliced, SAMPLES) // 2, sum(p.numel() for p in sliced.parameters())
        check(f"{name}, {method}: the counts are exact", f"{found[0]:,} {found[1]:,}", found == kept.total)
    model.double()
    exact = model(waveforms.double(), lengths)[0]
    difference = (model.slice()(waveforms.double(), lengths)[0] - exact).abs().max().item()
    check(f"{name}, mac: sliced and gated differ in float64 by", f"{difference:.1e}", difference < 1e-11)
    model.float()
    dense = load_dense(model)
    for dtype in (torch.float32, torch.bfloat16):
        before, after = forward_seconds([dense, sliced], torch.device("cpu"), dtype, repeats=3)
        seconds = f"dense {before:.2f} s, sliced {after:.2f} s, {before / after:.2f}"
        print(f"       {name}: forward of 10 s in {dtype}: {seconds}", flush=True)
    return dense, sliced


def load_dense(model):
    """The model without its gates."""
    model.frontend.gates = None
    for layer in model.layers:
        layer.attention.gate = layer.ffn.gate = None
    return model


def update_seconds(name, dense, sliced):
    """Print what a training update of 10 s takes in each phase, and the memory of the process after it."""
    samples = torch.randn(1, SAMPLES)
    utterance = [data.Utterance("x", None, 10.0, "SOME WORDS")]
    for phase, encoder in (("dense", dense), ("prune", dense), ("finetune", sliced)):
        encoder.add_gates(KINDS["mac"] if phase == "prune" else ())
        model = SpeechModel(encoder, "asr", data.vocabulary(["SOME WORDS"])).train()
        lagrangian = Lagrangian(encoder.tensor_shape, "mac", 0.5) if phase == "prune" else None
        optimizer = make_optimizer(model, lagrangian, 0.02)
        start = time.monotonic()
        loss = model.loss(samples, None, utterance)
        loss.backward()
        if lagrangian:
            lagrangian(encoder.gates, 0.1).backward()
        optimizer.step()
        taken, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found = f"{taken:.1f} s, peak {peak:.1f} GiB"
        check(f"{name}: an update of {phase} with 10 s of audio", found, loss.isfinite().item())
        load_dense(encoder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--update", action="store_true", help="also make a training update of each phase")
    options = parser.parse_args()
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"{', '.join(sorted(unknown))}: no such family; there are {', '.join(FAMILIES)}")
    for name in options.families or ["base"]:
        models = check_family(name)
        if options.update:
            update_seconds(name, *models)
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
