"""A loaded model is a plain nn.Module: the tools that people deploy with take it, dense and pruned, at any size."""

import copy
import io
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import LETTERS, TINY, tiny
from test_script import run
from torch.utils.mkldnn import to_mkldnn

import data
import sslprune
from gates import KINDS
from transformer import SpeechModel

SHAPE = replace(TINY, heads=(3, 2), units=(20, 12))  # of two layers, since compilers take their time for each
MODELS = {
    "dense": lambda: tiny(shape=SHAPE),
    "pruned": lambda: tiny(KINDS["mac"], spread=2.0, shape=SHAPE).slice(),
    "without heads here and units there": lambda: tiny(shape=replace(SHAPE, heads=(3, 0), units=(0, 12))),
}
SIZES = [(1, 400), (2, 719), (1, 16_000), (3, 5_000), (5, 12_345)]


@pytest.fixture(params=MODELS)
def encoder(request):
    return MODELS[request.param]()


@pytest.fixture(params=["asr", "slu"])
def model(encoder, request):
    return SpeechModel(encoder, request.param, LETTERS).eval()


def batch(utterances, samples):
    torch.manual_seed(samples)
    lengths = torch.randint(400, samples + 1, (utterances,))
    lengths[0] = samples
    return torch.randn(utterances, samples), lengths


@torch.no_grad()
def check(tool, model, sizes=SIZES, atol=1e-5):
    for size in sizes:
        waveforms, lengths = batch(*size)
        (scores, frames), (expected, expected_frames) = tool(waveforms, lengths), model(waveforms, lengths)
        assert torch.equal(frames, expected_frames)
        assert (scores[:, : expected.shape[1]] - expected).abs().max() < atol


@pytest.mark.filterwarnings("ignore")
def test_a_trace_gives_the_eager_output_at_any_size(model):
    check(torch.jit.trace(model, batch(2, 9_000), check_trace=False), model)
    traced = torch.jit.trace(model, torch.randn(1, 9_000), check_trace=False)  # without lengths: nothing is padded
    with torch.no_grad():
        for size in SIZES:
            waveforms = torch.randn(*size)
            for found, expected in zip(traced(waveforms), model(waveforms)):
                assert (found - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_is_traced_by_itself(encoder):
    check(torch.jit.trace(encoder, batch(2, 9_000), check_trace=False), encoder)


@pytest.mark.filterwarnings("ignore")
def test_exported_programs_load_with_torch_alone_and_transcribe_a_recording(capsys, tmp_path):
    recording = data.synthesise(["seven"], np.random.default_rng(0))
    soundfile.write(tmp_path / "x.wav", recording, 16_000, subtype="FLOAT")
    waveform = torch.from_numpy(data.waveform(data.Utterance("", recording, 1.0)))
    inputs = [(waveform[None], torch.tensor([len(waveform)])), *(batch(*size) for size in SIZES)]
    torch.save(inputs, tmp_path / "inputs.pt")
    models = []
    for number, (encoder, task) in enumerate([("dense", "asr"), ("pruned", "slu")]):
        models.append(SpeechModel(MODELS[encoder](), task, LETTERS).eval())
        path = tmp_path / f"{number}.pt"
        sslprune.save_model(models[-1], path)
        assert run(capsys, "--export", path, f"{path}2") == (0, "", "")
        for there in (path, f"{path}2", tmp_path):  # nothing is replaced
            status, _, errors = run(capsys, "--export", path, there)
            assert (status, len(errors.splitlines())) == (2, 1) and "is there already" in errors
    code = (
        "import json, torch\n"
        "for number in range(2):\n"
        "    labels = {'labels.json': ''}\n"
        "    model = torch.export.load(f'{number}.pt2', extra_files=labels).module()\n"
        "    outputs = [model(*arguments) for arguments in torch.load('inputs.pt')]\n"
        "    torch.save([json.loads(labels['labels.json']), outputs], f'{number}.out')\n"
        "import sys\n"
        "assert not {'transformer', 'sslprune', 'flops', 'data'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=tmp_path)
    for number, model in enumerate(models):
        labels, outputs = torch.load(tmp_path / f"{number}.out")
        assert labels == LETTERS
        found = iter(outputs)
        scores, frames = next(found)
        check(lambda *_, found=found: next(found), model)  # at any size
        best = scores[0].argmax(-1)
        said = LETTERS[best] if model.task == "slu" else data.decode(best[: int(frames)], LETTERS)
        assert model.predict(tmp_path / "x.wav") == [said]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("encoder", "lengths"),
    [("pruned", False), ("without heads here and units there", True)],  # dense: by --export, above
    indirect=["encoder"],
)
def test_torch_exports_a_model_for_any_size_of_two_frames_and_more(encoder, lengths):
    """torch.export takes a size of 1 for a constant, so that one frame is left to --export."""
    model = SpeechModel(encoder, "asr", LETTERS).eval()
    utterances, samples = torch.export.Dim("utterances"), torch.export.Dim("samples", min=720)
    sizes = ({0: utterances, 1: samples}, {0: utterances})[: 1 + lengths]
    program = torch.export.export(model, batch(2, 9_000)[: 1 + lengths], dynamic_shapes=sizes).module()
    if lengths:
        check(program, model, SIZES[2:])
    with torch.no_grad():
        for size in [] if lengths else SIZES[2:]:
            waveforms = torch.randn(*size)
            assert (program(waveforms)[0] - model(waveforms)[0]).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_weights_packed_for_onednn_give_the_eager_output(model):
    check(to_mkldnn(copy.deepcopy(model)), model)


def test_a_compiled_model_gives_the_eager_output():
    """Up to the graph that a compiler gets: inductor takes its minutes for that; tests/checks/bench.py tries it."""
    torch._dynamo.reset()
    model = SpeechModel(MODELS["pruned"](), "slu", LETTERS).eval()
    check(torch.compile(model, backend="eager", dynamic=True), model, SIZES[2:])


@pytest.mark.filterwarnings("ignore")
def test_a_dynamically_quantized_model_is_close_and_made_of_quantized_layers(model):
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert [name for name, module in quantized.named_modules() if isinstance(module, kind)] == linear
    with torch.no_grad():
        for size in SIZES:
            (found, _), (expected, _) = quantized(*batch(*size)), model(*batch(*size))
            assert (found - expected).norm() < 0.1 * expected.norm()


def test_hooks_fire_once_for_every_layer(model):
    calls = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(*batch(2, 5_000))
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    unused = {f"encoder.layers.{i}.ffn.dropout" for i, units in enumerate(model.encoder.shape.units) if not units}
    assert set(calls) == leaves - unused
    assert {count for name, count in calls.items() if "dropout" not in name} == {1}


def test_every_linear_layer_says_its_sizes(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if isinstance(module, torch.nn.Conv1d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)


def test_a_model_survives_pickling_by_torch(model):
    with warnings.catch_warnings(action="ignore"):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        check(torch.load(buffer, weights_only=False), model, SIZES[:2])
