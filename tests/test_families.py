"""The larger families: XLS-R and its like, HuBERT-large, and WavLM, as the public libraries compute them."""

import argparse
import json
import zlib
from dataclasses import replace

import pytest
import torch
from conftest import HERE, LETTERS, tiny, write_safetensors
from test_checkpoints import refused
from test_script import FAST, report_of, run
from test_users import make_table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sslprune
from flops import BASE, cost
from frontend import LayerNormFrontend
from gates import KINDS, METHODS, HardConcrete, check_budget, harden
from transformer import SpeechModel, Wav2Vec2, exported, load, load_pretrained

GOLDEN = torch.load(HERE / "families.pt", weights_only=True)
LAYOUTS = json.loads(zlib.decompress(GOLDEN["layouts"]))
FAMILIES = sorted(GOLDEN["features"])

# At full size, with the counts that torch's FlopCounterMode gave over transformers' own classes, on 10 s.
XLS_R = replace(
    BASE, width=1024, heads=(16,) * 24, units=(4096,) * 24, layer_norms=True, conv_bias=True,
)  # fmt: skip
WAVLM = dict(buckets=320, max_distance=800)
FULL_SIZE = {
    "XLS-R 300M": (XLS_R, 191_926_807_552, 315_438_720),
    "XLS-R 1B": (
        replace(XLS_R, width=1280, head_width=80, heads=(16,) * 48, units=(5120,) * 48), 532_932_381_696, 962_497_408,
    ),
    "WavLM-base": (replace(BASE, **WAVLM), 74_103_313_408, 94_381_936),
    "WavLM-large": (replace(XLS_R, conv_bias=False, **WAVLM), 192_024_914_944, 315_453_120),
}  # fmt: skip


def tensors_of(layout):
    """The state dict of a layout, in the library's own names."""

    def tensor(index):
        if isinstance(index, list):
            return torch.cat([tensor(each) for each in index])
        return GOLDEN["tensors"][index].float().contiguous()

    return {key: tensor(index) for key, index in LAYOUTS[layout]["keys"].items()}


def written(folder, layout):
    """Write a layout as its library would, and return what a user would name."""
    tensors, config = tensors_of(layout), LAYOUTS[layout]["config"]
    if layout.startswith("hf"):
        (folder / "config.json").write_text(json.dumps(config))
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    holder = {"fairseq": {"args": argparse.Namespace(**config or {}), "model": tensors}}
    torch.save(holder.get(layout.partition("_")[0], {"state_dict": tensors, "config": said_by_torchaudio(layout)}),
               folder / "x.pt")  # fmt: skip
    return folder / "x.pt"


def said_by_torchaudio(layout):
    """What DPHuBERT writes beside torchaudio's tensors; torchaudio's own files say nothing."""
    is_large = "wavlm_large" in layout or "wavlm" not in layout
    mode = "layer_norm" if is_large else "group_norm"
    more = {"encoder_max_distance": 20} if "wavlm" in layout else {}
    heads = 16 if is_large else 4
    return {"extractor_mode": mode, "encoder_layer_norm_first": is_large, "encoder_num_heads": heads} | more


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_of_every_family_gives_the_features_of_transformers(tmp_path, layout):
    model, family = load_pretrained(written(tmp_path, layout)), LAYOUTS[layout]["family"]
    waveforms, lengths, expected = GOLDEN["waveforms"], GOLDEN["lengths"], GOLDEN["features"][family]
    with torch.no_grad():
        batch, frames = model(waveforms, lengths)
        for row, (waveform, n) in enumerate(zip(waveforms, lengths)):
            scale = expected[row].abs().max()
            assert (model(waveform[None, :n])[0][0] - expected[row]).abs().max() < 1e-5 * scale
            assert frames[row] == len(expected[row])
            assert (batch[row, : frames[row]] - expected[row]).abs().max() < 1e-5 * scale
    assert (batch[0, frames[0] :] == 0).all()
    assert sum(p.numel() for p in model.parameters()) == cost(model.shape, 16_000).params


def family_model(tmp_path, family, kinds=(), seed=0):
    """A model of the family in float64, some of its gates shut, half open and open, a layer without heads or units."""
    name = "torchaudio_hubert_plain" if family == "hubert_plain" else f"hf_ctc_{family}"
    model = load_pretrained(written(tmp_path, name)).double()
    gate_at_random(model, kinds, seed)
    return model


def gate_at_random(model, kinds, seed):
    torch.manual_seed(seed)
    model.add_gates(kinds)
    for (kind, layer), gate in model.gates.items():
        nn.init.normal_(gate.log_alpha, std=3.0)
        if (kind, layer) in (("heads", 0), ("units", 1)):
            nn.init.constant_(gate.log_alpha, -20)
    model.double().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sliced_model_is_the_gated_one_and_sliced_again(tmp_path, family):
    model = family_model(tmp_path, family, KINDS["mac"])
    waveforms, lengths = GOLDEN["waveforms"].double(), GOLDEN["lengths"]
    with torch.no_grad():
        for seed in (1, 2):
            sliced = model.slice()
            assert sliced.shape == model.shape and sliced.shape.heads[0] == 0 == sliced.shape.units[1]
            expected, found = (each(waveforms, lengths)[0] for each in (model, sliced))
            assert (found - expected).abs().max() < 1e-12
            single = (sliced.float()(waveforms.float(), lengths)[0] - expected).abs().max()
            assert single < 1e-5 * expected.abs().max()
            model = sliced.double()
            gate_at_random(model, KINDS["mac"], seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_equal_torchs_flop_counter_and_the_tensors(tmp_path, family):
    generator = torch.Generator().manual_seed(0)
    dense = family_model(tmp_path, family).shape
    for _ in range(30):
        counts = {
            (kind, layer): torch.randint(1 if kind == "channels" else 0, n + 1, (), generator=generator).item()
            for kind in ("channels", "heads", "units") for layer, n in enumerate(getattr(dense, kind))
        }  # fmt: skip
        shape = dense.with_counts(counts)
        model, samples = Wav2Vec2(shape, dense).eval(), torch.randint(400, 4000, (), generator=generator).item()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randn(1, samples))
        c = cost(shape, samples)
        assert 2 * c.macs == counter.get_total_flops()
        assert c.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_costs_are_those_of_transformers_and_of_the_tensors(name):
    shape, macs, params = FULL_SIZE[name]
    c = cost(shape, 160_000)
    assert (c.macs, c.params) == (macs, params)
    with torch.device("meta"):
        assert sum(p.numel() for p in Wav2Vec2(shape).parameters()) == params


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_hardening_meets_budgets_at_full_size(name, method):
    shape = FULL_SIZE[name][0]
    sizes = {(kind, layer): n for kind in KINDS[method] for layer, n in enumerate(getattr(shape, kind))}
    torch.manual_seed(0)
    gates, dense = {place: HardConcrete(n).eval() for place, n in sizes.items()}, cost(shape, 160_000)
    for gate in gates.values():
        nn.init.normal_(gate.log_alpha, mean=torch.randn(()).item(), std=2)
    check_budget(shape, method, 0.5)
    harden(gates, shape, method, 0.5)
    kept = cost(shape.with_counts({place: len(gate.kept()) for place, gate in gates.items()}), 160_000)
    for constraint in METHODS[method]:
        assert 0.498 < constraint.measure(kept) / constraint.measure(dense) <= 0.5


def test_the_gates_of_a_frontend_with_layer_norms_have_the_gradient_of_the_expected_loss():
    """Against finite differences with the same noise, for a channel's two places: before the norm, and behind GELU."""
    torch.manual_seed(0)
    shape = replace(BASE, channels=(4, 3), kernels=(4, 2), strides=(2, 2), layer_norms=True, conv_bias=True)
    frontend, x, target = LayerNormFrontend(shape, shape.channels).double(), torch.randn(1, 14).double(), None
    for parameter in frontend.parameters():
        nn.init.normal_(parameter)
    frontend.add_gates()
    gates, draws, step = [gate.double() for gate in frontend.gates], 4_000, 0.05
    starts = [torch.randn(len(gate.log_alpha)).double() for gate in gates]
    noise = [torch.logit(torch.rand(draws, 1, len(start)).double()) for start in starts]
    target = torch.randn(1, 3, 3).double()

    class Drawn(nn.Module):
        def __init__(self, z):
            super().__init__()
            self.z = z

        def forward(self):
            return self.z

    def expected_loss(log_alphas):
        frontend.gates = [
            Drawn(gate._stretched((n + log_alpha) / gate.beta)) for gate, n, log_alpha in zip(gates, noise, log_alphas)
        ]
        return (frontend(x.expand(draws, 14)) - target).square().mean()

    del frontend.gates
    log_alphas = [start.clone().requires_grad_() for start in starts]
    gradients = torch.autograd.grad(expected_loss(log_alphas), log_alphas)
    norm = torch.cat(gradients).norm().item()
    for layer, start in enumerate(starts):
        for i in range(len(start)):
            losses = []
            for sign in (1, -1):
                moved = [s.clone() for s in starts]
                moved[layer][i] += sign * step
                with torch.no_grad():
                    losses.append(expected_loss(moved).item())
            difference = (losses[0] - losses[1]) / (2 * step)
            assert gradients[layer][i].item() == pytest.approx(difference, abs=0.1 * norm), (layer, i)


# --- What a file says, or cannot mean ---


def test_places_of_heads_that_cannot_be_are_refused(tmp_path):
    model = family_model(tmp_path, "wavlm", KINDS["mac"]).slice().float()
    sslprune.save_model(SpeechModel(model, "slu", ["a"]), tmp_path / "model.pt")
    contents = torch.load(tmp_path / "model.pt", weights_only=True)
    key = "encoder.layers.1.attention.places"
    kept = contents["weights"][key]
    assert torch.equal(load_pretrained(tmp_path / "model.pt").layers[1].attention.places, kept) and len(kept) > 1
    for wrong in (kept.flip(0), kept + 4, kept - 4, kept * 0, kept[:-1], kept.float(), kept[None]):
        torch.save(contents | {"weights": contents["weights"] | {key: wrong}}, tmp_path / "model.pt")
        refused(tmp_path / "model.pt", "layers.1.attention.places")


@pytest.mark.parametrize(
    ("layout", "name", "value"),
    [
        ("hf_ctc_lv60", "feat_extract_norm", "group"),
        ("hf_ctc_lv60", "do_stable_layer_norm", False),
        ("hf_ctc_lv60", "conv_bias", False),
        ("hf_ctc_wavlm", "do_stable_layer_norm", True),
        ("hf_ctc_wavlm", "num_attention_heads", 2),
        ("hf_ctc_wavlm", "num_buckets", 32),
        ("hf_ctc_lv60", "conv_pos_batch_norm", True),
    ],
)
def test_a_config_that_its_tensors_contradict_is_refused(tmp_path, layout, name, value):
    path = written(tmp_path, layout) / "config.json"
    path.write_text(json.dumps(LAYOUTS[layout]["config"] | {name: value}))
    with pytest.raises(sslprune.UserError, match=name):
        load_pretrained(tmp_path)


def test_a_bare_file_of_a_large_model_has_sixteen_heads(tmp_path):
    torch.save(tensors_of("torchaudio_lv60"), tmp_path / "x.pt")
    assert load_pretrained(tmp_path / "x.pt").shape == load_pretrained(written(tmp_path, "torchaudio_lv60")).shape


def test_a_wavlm_model_of_dphubert_keeps_the_places_that_it_names(tmp_path):
    """Its heads 0 and 3 of layer 0 and all but 2 of layer 1, as slicing by our own gates leaves them."""
    model, places = load_pretrained(written(tmp_path, "torchaudio_wavlm")), [[0, 3], [0, 1, 3]]
    model.add_gates(("heads",))
    tensors = {}
    for key, tensor in tensors_of("torchaudio_wavlm").items():
        if "attention.attention.in_proj" in key:
            for name, part in zip("qkv", tensor.chunk(3)):
                tensors[key.replace("attention.in_proj_", f"{name}_proj.")] = part
        else:
            tensors[key.replace("attention.attention.out", "attention.out")] = tensor
    for layer, kept in enumerate(places):
        gate = model.layers[layer].attention.gate
        gate.log_alpha.data = torch.tensor([9.0 if head in kept else -9 for head in range(4)])
        rows = [16 * head + i for head in kept for i in range(16)]
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias"):
            key = f"encoder.transformer.layers.{layer}.attention.{name}"
            tensors[key] = tensors[key][rows]
        key = f"encoder.transformer.layers.{layer}.attention.out_proj.weight"
        tensors[key] = tensors[key][:, rows]
    said = {"encoder_remaining_heads": places, "encoder_head_dim": 16, "encoder_max_distance": 20}
    torch.save({"state_dict": tensors, "config": said | {"encoder_num_heads": [2, 3]}}, tmp_path / "x.pt")
    pruned = load_pretrained(tmp_path / "x.pt")
    assert pruned.shape == model.eval().shape
    with torch.no_grad():
        expected, found = (each(GOLDEN["waveforms"], GOLDEN["lengths"])[0] for each in (model, pruned))
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "places", [[[0, 1, 2, 3]], [[0, 1, 2, 99]] * 2, 5, ["abcd"] * 2, [[0.5, 1, 2, 3]] * 2, [[0]] * 2]
)
def test_places_that_a_file_of_dphubert_cannot_mean_are_refused(tmp_path, places):
    said = said_by_torchaudio("torchaudio_wavlm") | {"encoder_remaining_heads": places}
    torch.save({"state_dict": tensors_of("torchaudio_wavlm"), "config": said}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "encoder_remaining_heads")


def test_a_wavlm_model_that_lost_heads_and_does_not_say_which_is_refused(tmp_path):
    tensors = tensors_of("hf_ctc_wavlm")
    for key in [key for key in tensors if "layers.1.attention" in key and "proj" in key]:
        rows = tensors[key][:, :48] if key.endswith("out_proj.weight") else tensors[key][:48]
        tensors[key] = tensors[key] if key.endswith("out_proj.bias") else rows
    torch.save(tensors, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "encoder_remaining_heads", "3 heads of layer 1")


@pytest.mark.parametrize(
    ("layout", "part", "wrong", "word"),
    [
        ("hf_ctc_wavlm", "layers.1.attention.gru_rel_pos_const", torch.ones(1, 2, 1, 1), "position_scale (2,)"),
        ("hf_ctc_wavlm", "layers.1.attention.gru_rel_pos_const", torch.ones(9), "position_scale (9,)"),
        ("torchaudio_wavlm", "layers.1.attention.attention.in_proj_bias", torch.tensor(0.0), "attention.query.bias"),
        ("torchaudio_wavlm", "layers.1.attention.attention.in_proj_bias", torch.ones(4), "attention.query.bias"),
    ],
)
def test_a_tensor_of_wavlm_s_of_the_wrong_size_is_named(tmp_path, layout, part, wrong, word):
    tensors = tensors_of(layout)
    (key,) = [key for key in tensors if key.endswith(part)]
    torch.save(tensors | {key: wrong}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", word)


# --- What works for base works for them ---


@pytest.mark.parametrize("family", ["lv60", "wavlm_large"])
def test_a_long_recording_is_recognised_in_pieces_and_in_bfloat16(tmp_path, monkeypatch, family):
    monkeypatch.setattr("transformer.PIECE_SECONDS", 2)
    monkeypatch.setattr("transformer.OVERLAP_SECONDS", 1)
    path = written(tmp_path, f"hf_ctc_{family}")
    (path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "A": 2}))
    model = load(path)
    waveform = torch.randn(1, 80_000)
    assert len(model.transcribe(waveform)) == 1
    exact, _ = model(waveform)
    model.dtype = torch.bfloat16
    assert 0 < (model(waveform)[0] - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("family", ["lv60", "wavlm", "wavlm_large"])
def test_a_model_of_each_family_is_pruned_end_to_end_and_resumes(small, capsys, tmp_path, family):
    """Its head is kept, and a run that a signal stopped ends in the same bits."""
    (tmp_path / "from").mkdir()
    tokens = {"<pad>": 0, "|": 1} | {letter: 2 + i for i, letter in enumerate("EINOSTAR" + "H")}
    (written(tmp_path / "from", f"hf_ctc_{family}") / "vocab.json").write_text(json.dumps(tokens))
    corpus = make_table(tmp_path / "corpus", count=20)
    flags = ["--task", "asr", "--budget", "0.6", "--checkpoint", tmp_path / "from", "--data", corpus]
    flags += [*FAST, "--save-seconds", "0", "--layer-drop", "0.3", "--time-mask", "0.2"]
    status, printed, errors = run(capsys, *flags, "--out", tmp_path / "run")
    assert (status, errors) == (0, "")
    assert 0.55 < report_of(tmp_path / "run")["achieved"] <= 0.6
    step, calls = torch.optim.Adam.step, []

    def stopping(self):
        calls.append(sslprune.stopping.append(15) if len(calls) == 2 else None)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stopping)
        assert run(capsys, *flags, "--out", tmp_path / "again")[0] == 128 + 15
    assert run(capsys, *flags, "--out", tmp_path / "again", "--resume")[0] == 0
    assert (tmp_path / "again" / "model.pt").read_bytes() == (tmp_path / "run" / "model.pt").read_bytes()
    recording = next(path for path in corpus.rglob("*") if path.suffix == ".mp3")
    assert run(capsys, "--predict", tmp_path / "run" / "model.pt", recording)[0] == 0
    assert "what each layer kept" in run(capsys, "--describe", tmp_path / "run" / "model.pt")[1]


@pytest.mark.filterwarnings("ignore")
def test_the_usual_tools_take_a_sliced_model_with_all_that_is_new(tmp_path):
    """LayerNorms in the frontend, pre-norm layers and relative positions: traced, exported, quantized, hooked."""
    encoder = family_model(tmp_path, "wavlm_large", KINDS["mac"]).float().slice()
    model, seen = SpeechModel(encoder, "asr", LETTERS).eval(), []
    x, n, y, k = torch.randn(2, 4_000), torch.tensor([4_000, 2_500]), torch.randn(3, 5_000), torch.tensor([5_000] * 3)
    with torch.no_grad():
        expected, _ = model(y, k)
        assert (torch.jit.trace(model, (x, n))(y, k)[0] - expected).abs().max() < 1e-5
        assert (exported(model).module()(y, k)[0][:, : expected.shape[1]] - expected).abs().max() < 1e-5
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert (quantized(y, k)[0] - expected).norm() < 0.1 * expected.norm()
        kinds = nn.Linear, nn.Conv1d, nn.LayerNorm, nn.Embedding
        parts = [part for part in model.modules() if isinstance(part, kinds)]
        for part in parts:
            part.register_forward_hook(lambda part, *_: seen.append(part))
        model(y, k)
    assert {id(part) for part in seen} == {
        id(part) for part in parts if part is not model.encoder.layers[0].attention.position_linear
    }  # whose layer lost all its heads


def test_a_plain_model_says_nothing_of_positions():
    """The plain attention stays as it was: no table, no places."""
    assert not any("position_" in key or "places" in key or "relative" in key for key in tiny().state_dict())
