"""The forward pass: padding, gates as the paper puts them, exact slicing."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LETTERS, TINY, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import sslprune
from flops import BASE, SMALL, UserError
from frontend import FirstConvolution, Projection
from gates import KINDS, HardConcrete
from transformer import Position, SpeechModel, Wav2Vec2, check_precision

KIND_SETS = [("channels",), ("heads",), ("units",), KINDS["mac"]]


@torch.no_grad()
def features_alone_and_padded(model, garbage, samples=9_000):
    torch.manual_seed(3)
    lengths = torch.tensor([samples, samples * 2 // 3 + 7, 400, samples // 2])
    waveforms = torch.randn(4, samples) + 0.3
    alone = [model(waveform[None, :n])[0][0] for waveform, n in zip(waveforms, lengths)]
    for waveform, n in zip(waveforms, lengths):
        waveform[n:] = garbage
    return alone, *model(waveforms, lengths)


@pytest.mark.parametrize("garbage", [0.0, 1e3, math.nan])
@pytest.mark.parametrize("gated", [False, True])
def test_an_utterance_has_the_same_features_alone_and_padded(garbage, gated):
    model = tiny(KINDS["mac"] if gated else ())
    alone, padded, frames = features_alone_and_padded(model, garbage)
    assert frames.tolist() == [len(a) for a in alone]
    for a, p in zip(alone, padded):
        assert (a - p[: len(a)]).abs().max() < 1e-5
        assert (p[len(a) :] == 0).all()


def test_padding_changes_nothing_at_the_size_of_the_small_model():
    torch.manual_seed(0)
    alone, padded, _ = features_alone_and_padded(Wav2Vec2(SMALL).eval(), 0.0, 30_000)
    assert max((a - p[: len(a)]).abs().max() for a, p in zip(alone, padded)) < 1e-5


def test_the_first_convolution_is_convolution_and_group_norm():
    torch.manual_seed(0)
    layer = FirstConvolution(6, 10, 5)
    with torch.no_grad():
        layer.norm_weight.normal_()
        layer.norm_bias.normal_()
        layer.weight[0] = torch.tensor(
            [1.0, -1] * 5
        )  # a high-pass kernel: what is left of this input is a millionth of its power
    slow = torch.sin(torch.arange(16_000) / 400)
    waveforms = torch.stack([torch.randn(16_000), slow + 1e-3 * torch.randn(16_000), slow * 3 + 5])
    for name, weight in layer.named_parameters():
        expected = F.group_norm(
            F.conv1d(waveforms[:, None].double(), layer.weight.double(), stride=5),
            6,
            layer.norm_weight.double(),
            layer.norm_bias.double(),
        )
        found = layer(waveforms)
        assert (found - expected).abs().max() < 2e-3  # float32 convolution of the third, whose outputs nearly cancel
        assert (found - expected)[:2].abs().max() < 1e-4
        direction = torch.randn(found.shape)
        gradients = [torch.autograd.grad((y * direction)[:2].sum(), weight)[0] for y in (found, expected)]
        assert torch.allclose(
            gradients[0], gradients[1].float(), rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item()
        ), name


def reference_forward(model, waveforms):
    """The gated model as the paper puts it, written anew: every unit's output is multiplied by its gate."""
    in_turn = sorted(
        model.gates, key=lambda place: (place[0] != "channels", place[1], place[0])
    )  # as the model comes to them
    gates = {place: model.gates[place]() for place in in_turn}

    def gate(kind, layer, size):
        return gates.get((kind, layer), torch.ones(size))

    x = waveforms[:, None]
    for i, layer in enumerate(model.frontend.convolutions):
        x = F.conv1d(x, layer.weight, stride=TINY.strides[i])
        if i == 0:
            x = F.group_norm(x, x.shape[1], layer.norm_weight, layer.norm_bias)
        x = F.gelu(x) * gate("channels", i, x.shape[1])[:, None]
    norm = model.projection.norm
    x = model.projection.linear(F.layer_norm(x.transpose(1, 2), (x.shape[1],), norm.weight, norm.bias))
    p = model.position
    weight = p.weight_v / p.weight_v.square().sum((0, 1), keepdim=True).sqrt() * p.weight_g
    x = model.norm(
        x + F.gelu(F.conv1d(x.transpose(1, 2), weight, p.bias, padding=8, groups=4)[..., :-1]).transpose(1, 2)
    )
    for i, layer in enumerate(model.layers):
        a, heads = layer.attention, []
        for h in range(TINY.heads[i]):
            rows = slice(4 * h, 4 * h + 4)
            q, k, v = (F.linear(x, m.weight[rows], m.bias[rows]) for m in (a.query, a.key, a.value))
            heads.append(torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v * gate("heads", i, TINY.heads[i])[h])
        x = layer.attention_norm(x + a.output(torch.cat(heads, -1)))
        units = F.gelu(layer.ffn.input(x)) * gate("units", i, TINY.units[i])
        x = layer.ffn_norm(x + layer.ffn.output(units))
    return x


@pytest.mark.parametrize("kinds", KIND_SETS)
def test_a_gate_multiplies_the_output_of_its_unit(kinds):
    torch.manual_seed(5)
    waveforms = torch.randn(2, 6_000)
    for seed in range(3):
        model = tiny(kinds, seed, spread=2.0)
        assert any(((gate() > 0) & (gate() < 1)).any() for gate in model.gates.values())  # some are half open
        with torch.no_grad():
            assert (model(waveforms)[0] - reference_forward(model, waveforms)).abs().max() < 1e-5


def test_sampled_gates_get_the_gradient_of_the_paper():
    model = tiny(KINDS["mac"], spread=1.0)
    for gate in model.gates.values():
        gate.train()
    log_alphas, waveforms = [gate.log_alpha for gate in model.gates.values()], torch.randn(2, 4_000)
    gradients = []
    for forward in (lambda x: model(x)[0], lambda x: reference_forward(model, x)):
        torch.manual_seed(9)  # the same sample of gates, drawn in the same order
        gradients.append(torch.autograd.grad(forward(waveforms).square().sum(), log_alphas))
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])
    for ours, expected in zip(*gradients):
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-4)


def check_slice(model):
    sliced = model.slice()
    assert sliced.shape == model.shape
    assert not sliced.gates
    assert sum(tensor.numel() for tensor in sliced.parameters()) < sum(tensor.numel() for tensor in model.parameters())
    assert [len(convolution.weight) for convolution in sliced.frontend.convolutions] == list(model.shape.channels)
    waveforms, lengths = torch.randn(3, 8_000), torch.tensor([8_000, 5_000, 1_234])
    with torch.no_grad():
        assert (model(waveforms)[0] - sliced(waveforms)[0]).abs().max() < 1e-5
        assert (model(waveforms, lengths)[0] - sliced(waveforms, lengths)[0]).abs().max() < 1e-5
    return sliced


@pytest.mark.parametrize("kinds", KIND_SETS)
def test_the_sliced_model_is_the_gated_one(kinds):
    for seed in range(3):
        check_slice(tiny(kinds, seed, spread=2.0))


@pytest.mark.parametrize(
    "place", [*(("channels", i) for i in range(7)), *((kind, i) for kind in ("heads", "units") for i in range(3))]
)
def test_slicing_is_exact_at_every_place_alone_down_to_the_last_unit(place):
    model = tiny(KINDS["mac"], spread=0)
    with torch.no_grad():
        gate = model.gates[place].log_alpha
        gate.fill_(-9)
        if place[0] == "channels":
            gate[2] = -1.0  # one half-open channel is left; layers of the Transformer lose all they have
    sliced = check_slice(model)
    assert getattr(sliced.shape, place[0])[place[1]] == (1 if place[0] == "channels" else 0)


def test_slicing_a_model_in_training_takes_the_gates_of_evaluation():
    torch.manual_seed(0)
    model, waveforms = tiny(KINDS["mac"], spread=2.0).train(), torch.randn(2, 6_000)
    sliced = model.slice()
    with torch.no_grad():
        assert (sliced(waveforms)[0] - model.eval()(waveforms)[0]).abs().max() < 1e-5


def wrong_in_bfloat16(monkeypatch, wrong):
    """Let convolutions for which wrong(channels per group, groups) holds compute something else in bfloat16."""
    conv1d = F.conv1d

    def convolution(x, weight, *arguments, **more):
        y = conv1d(x, weight, *arguments, **more)
        return y.flip(1) if y.dtype == torch.bfloat16 and wrong(weight.shape[1], more.get("groups", 1)) else y

    monkeypatch.setattr(F, "conv1d", convolution)


def test_bfloat16_avoids_the_kernel_that_is_wrong_on_cpus_with_amx(monkeypatch):
    """oneDNN's for grouped convolutions with few channels a group, which a patched one stands in for elsewhere."""
    torch.manual_seed(0)
    model, waveform = Wav2Vec2(SMALL).eval(), torch.randn(1, 8_000)
    wrong_in_bfloat16(monkeypatch, lambda channels, groups: groups > 1 and channels < 16)
    with torch.no_grad():
        exact, _ = model(waveform)
        with torch.autocast("cpu", torch.bfloat16):
            features, _ = model(waveform)
        rounded, _ = copy.deepcopy(model).bfloat16()(waveform.bfloat16())
    assert 0 < (features - exact).norm() < 0.03 * exact.norm()
    assert 0 < (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_base_computes_its_positional_convolution_in_bfloat16():
    torch.manual_seed(0)
    position, x = Position(BASE.width, BASE.position_kernel, BASE.position_groups), torch.randn(1, 20, BASE.width)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert position(x).dtype == torch.bfloat16
        assert Position(SMALL.width, SMALL.position_kernel, SMALL.position_groups)(x[..., :192]).dtype == torch.float32


def test_a_backend_that_is_wrong_in_bfloat16_ends_a_run_before_it_begins(monkeypatch):
    torch.manual_seed(0)
    model = SpeechModel(Wav2Vec2(SMALL), "asr", LETTERS)
    model.dtype = torch.bfloat16
    check_precision(model)
    for wrong in (lambda channels, groups: channels == 80, lambda channels, groups: groups == 1):
        with monkeypatch.context() as patch:
            wrong_in_bfloat16(patch, wrong)
            with pytest.raises(UserError, match="--dtype float32"):
                check_precision(model)
            model.dtype = torch.float32
            check_precision(model)
            model.dtype = torch.bfloat16


def test_weights_are_cast_once_for_all_batches_that_are_recognised():
    model, copies = SpeechModel(tiny(), "slu", ["a", "b"]).eval(), []
    model.dtype = torch.bfloat16

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), more=None):
            if function is torch.ops.aten._to_copy.default and any(arguments[0] is p for p in model.parameters()):
                copies.append(1)
            return function(*arguments, **(more or {}))

    counts, speech = [], np.random.default_rng(0).standard_normal(4_000).astype(np.float32)
    for count in (1, 3):
        utterances = [data.Utterance(str(i), speech, 0.25, "", "a") for i in range(count)]
        corpus = data.Corpus("x", test=utterances, size=count)
        with Copies():
            sslprune.evaluate(model, corpus, "test", 0.3)
        counts.append(len(copies))
        copies.clear()
    assert counts[0] == counts[1] > 10


def test_padding_and_slicing_change_nothing_in_bfloat16_beyond_its_precision():
    model = tiny(KINDS["mac"], spread=2.0)
    sliced, waveforms, lengths = model.slice(), torch.randn(2, 8_000), torch.tensor([8_000, 5_000])
    with torch.no_grad():
        exact = model(waveforms, lengths)[0][1, :15]
        with torch.autocast("cpu", torch.bfloat16):
            gated, cut, alone = (
                model(waveforms, lengths)[0],
                sliced(waveforms, lengths)[0],
                model(waveforms[1:, :5_000])[0],
            )
    for features in (gated[1, :15], cut[1, :15], alone[0]):
        assert 0 < (features - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("lengths", [torch.tensor([3_000, 2_000], dtype=torch.int32), torch.tensor([3_000, 2_000])])
def test_what_lies_beyond_an_utterance_has_no_part_in_the_gradients(lengths):
    model, waveforms = tiny(), torch.randn(2, 3_000)
    waveforms[1, 2_000:] = math.nan
    features, frames = model(waveforms, lengths)
    assert frames.dtype == torch.int64
    features.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_arguments_of_other_shapes_are_refused():
    model = tiny()
    cases = [
        (torch.randn(3_000), None),
        (torch.randn(0, 3_000), None),
        (torch.randn(2, 3_000), torch.tensor([3_000])),
        (torch.randn(1, 3_000), torch.tensor([3_000.0])),
        (torch.randn(1, 3_000), torch.tensor([3_001])),
        (torch.randn(1, 399), None),
    ]
    for waveforms, lengths in cases:
        with pytest.raises(ValueError, match="waveforms|lengths|utterance"):
            model(waveforms, lengths)


def test_a_model_without_any_heads_and_units_still_runs_and_slices():
    model = tiny(("heads", "units"))
    for gate in model.gates.values():
        nn.init.constant_(gate.log_alpha, -9)
    assert check_slice(model).shape.heads == (0, 0, 0)


def test_a_sliced_model_can_be_gated_and_sliced_again():
    once = tiny(KINDS["mac"], 0, spread=1.0).slice()
    once.add_gates(KINDS["mac"])
    for gate in once.gates.values():
        nn.init.normal_(gate.log_alpha, std=2)
    check_slice(once)


def test_a_sliced_projection_is_layer_norm_over_all_channels_of_the_dense_model():
    torch.manual_seed(0)
    projection, x = Projection(8, 4, 8).double().eval(), torch.randn(2, 5, 8).double()
    norm, gate = projection.norm, torch.tensor([1.0, 0, 0.5, 0, 1, 1, 0, 0.25]).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        for shut_next in (2, 5):  # sliced, and sliced again
            expected = projection.linear(F.layer_norm(x * gate, (8,), norm.weight, norm.bias))
            sliced = copy.deepcopy(projection)
            kept = gate.nonzero().flatten()
            sliced.slice(gate)
            found = sliced(x[..., kept], frames=None)
            assert (found - expected).abs().max() < 1e-14
            second = torch.ones(len(kept)).double()
            second[kept.tolist().index(shut_next)] = 0
            gate[shut_next] = 0
            sliced.slice(second)
            found = sliced(x[..., gate.nonzero().flatten()], frames=None)
            expected = projection.linear(F.layer_norm(x * gate, (8,), norm.weight, norm.bias))
            assert (found - expected).abs().max() < 1e-14


def test_the_gradient_of_the_last_convolutions_gates_is_that_of_the_expected_loss():
    """Against finite differences with the same noise; statistics over the open channels only jump as a gate shuts."""
    torch.manual_seed(0)
    draws, step = 40_000, 0.05
    projection, gate = Projection(6, 5, 6).double().eval(), HardConcrete(6).double()
    x, target = (
        torch.randn(1, 3, 6).double() + torch.tensor([3.0, -2, 1, 0, 0, 0]).double(),
        torch.randn(1, 3, 5).double(),
    )
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-1.0, 0.5, 0.0, 1.0, -0.5, 2.0]))
    noise = torch.logit(torch.rand(draws, 6).double())

    def expected_loss(log_alpha):
        z = gate._stretched((noise + log_alpha) / gate.beta)
        return (projection(x.expand(draws, 3, 6) * z[:, None], None) - target).square().mean()

    (gradient,) = torch.autograd.grad(expected_loss(gate.log_alpha), gate.log_alpha)
    for i in range(6):
        change = torch.zeros(6).double()
        change[i] = step
        with torch.no_grad():
            difference = (expected_loss(gate.log_alpha + change) - expected_loss(gate.log_alpha - change)) / (2 * step)
        assert gradient[i].item() == pytest.approx(difference.item(), abs=0.03 * gradient.norm().item()), i


def test_all_gates_shut_gives_finite_features_and_gradients():
    model = tiny(KINDS["mac"])
    for gate in model.gates.values():
        nn.init.constant_(gate.log_alpha, -30)
    model.train()
    features, _ = model(torch.randn(2, 5_000))
    features.sum().backward()
    assert features.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def projected(x, frames=None, **masks):
    """The projection of x in training with these masks, and where it is the mask embedding, and where 0."""
    projection = Projection(x.shape[2], 24, x.shape[2], dropout=0.0).train()
    for name, probability in masks.items():
        setattr(projection, name, probability)
    y = projection(x, torch.full((len(x),), x.shape[1]) if frames is None else frames)
    return y, (y == projection.mask_embedding).all(-1), y == 0


def test_time_masks_cover_about_what_was_asked_in_spans_of_ten():
    torch.manual_seed(0)
    _, mask, _ = projected(torch.randn(50, 400, 4), time_mask=0.3)
    assert 0.7 * 0.3 < mask.float().mean() < 0.3  # overlaps make it less: 1 - (1 - 0.03) ** 10 = 0.26
    runs = "".join("01"[m] for m in mask[0].tolist()).strip("1").split("0")  # those at the borders can be cut
    assert all(len(run) >= 10 for run in runs if run)


def test_every_utterance_has_a_time_mask_in_its_own_frames_however_short():
    torch.manual_seed(0)
    frames = torch.arange(1, 61)
    for _ in range(20):
        _, mask, _ = projected(torch.randn(60, 60, 4), frames, time_mask=1e-9)
        assert all(row[:n].any() for row, n in zip(mask, frames))
        assert (mask.sum(1) <= 10).all()


def test_channel_masks_are_of_a_whole_utterance_and_cover_about_what_was_asked():
    torch.manual_seed(0)
    _, _, zero = projected(torch.randn(2_000, 7, 4), channel_mask=0.5)
    assert torch.equal(zero.all(1), zero.any(1))
    assert 0.3 < zero.float().mean() < 0.5  # in spans of 24 / 12 features: 1 - 0.75 ** 2 = 0.44
    assert not torch.equal(zero[0], zero[1])


def test_masks_act_in_training_only():
    projection = Projection(4, 24, 4).eval()
    projection.time_mask = projection.channel_mask = 1.0
    x = torch.randn(3, 50, 4)
    masked = projection(x, torch.full((3,), 50))
    projection.time_mask = projection.channel_mask = 0.0
    assert torch.equal(masked, projection(x, torch.full((3,), 50)))


@pytest.mark.parametrize("layer_drop", [0.0, 0.4, 1.0])
def test_layer_drop_leaves_out_layers_as_often_as_it_says_and_in_training_only(layer_drop):
    torch.manual_seed(0)
    model, x, calls = tiny().train(), torch.randn(1, 2_000), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model.layer_drop = layer_drop
    for _ in range(200):
        model(x)
    assert len(calls) / (200 * len(model.layers)) == pytest.approx(1 - layer_drop, abs=0.06)  # three standard errors
    calls.clear()
    model.eval()(x)
    assert len(calls) == len(model.layers)


@pytest.mark.parametrize(
    "place", ["projection", "positional convolution", "attention weights", "attention", "units", "feed-forward"]
)
def test_dropout_acts_by_default_at_each_of_its_places_in_training_only(place):
    """The others are set to 0. A layer has one for the outputs of both its parts: the other part's output is made 0."""
    model, waveforms = tiny(), torch.randn(1, 4_000)
    one = model.layers[1]
    kept = {
        "projection": model.projection.dropout,
        "positional convolution": model.dropout,
        "units": one.ffn.dropout,
        "attention": one.dropout,
        "feed-forward": one.dropout,
    }
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module is not kept.get(place):
            module.p = 0.0
    for layer in model.layers:
        if (place, layer) != ("attention weights", one):
            layer.attention.dropout = 0.0
    silent = {"attention": one.ffn.output, "feed-forward": one.attention.output}.get(place)
    if silent:
        nn.init.zeros_(silent.weight)
        nn.init.zeros_(silent.bias)
    assert torch.equal(model(waveforms)[0], model(waveforms)[0])
    model.train()
    assert not torch.equal(model(waveforms)[0], model(waveforms)[0])
    if place == "attention weights":
        one.attention.dropout = 0.0
    else:
        kept[place].p = 0.0
    assert torch.equal(model(waveforms)[0], model.eval()(waveforms)[0])  # that place was all that was random


@pytest.mark.parametrize(
    ("samples", "lengths"), [(399, None), (1_000, [1_000, 399]), (1_000, [1_001, 800]), (1_000, [1_000])]
)
def test_impossible_lengths_are_refused(samples, lengths):
    with pytest.raises(ValueError, match="samples"):
        tiny()(torch.randn(2, samples), None if lengths is None else torch.tensor(lengths))


def test_a_gate_is_of_the_mode_of_its_model():
    model = tiny()
    model.add_gates(("heads",))
    assert not any(gate.training for gate in model.gates.values())
    assert all(isinstance(gate, HardConcrete) for gate in model.gates.values())


# --- The head and its losses ---


def utterances(*labels):
    return [data.Utterance(label, None, 1.0, label.upper(), label) for label in labels]


def test_intents_of_a_padded_batch_are_those_of_each_utterance_alone():
    model, waveforms, lengths = (
        SpeechModel(tiny(), "slu", ["a", "b", "c"]).eval(),
        torch.randn(3, 8_000),
        torch.tensor([8_000, 5_000, 900]),
    )
    with torch.no_grad():
        padded, _ = model(waveforms, lengths)
        for scores, waveform, n in zip(padded, waveforms, lengths):
            assert (model(waveform[None, :n])[0][0] - scores).abs().max() < 1e-5


def test_the_loss_of_ctc_is_the_mean_over_utterances_of_the_loss_per_character():
    model, waveforms, lengths = (
        SpeechModel(tiny(), "asr", LETTERS).eval(),
        torch.randn(2, 9_000),
        torch.tensor([9_000, 6_000]),
    )
    batch, by_hand = utterances("no", "so long"), []
    with torch.no_grad():
        for utterance, waveform, n in zip(batch, waveforms, lengths):
            scores, frames = model(waveform[None, :n])
            target = torch.tensor([LETTERS.index("|" if c == " " else c) for c in utterance.text])
            loss = F.ctc_loss(scores[0].log_softmax(1), target, frames[0], torch.tensor(len(target)), reduction="sum")
            by_hand.append(loss.item() / len(target))
        assert model.loss(waveforms, lengths, batch).item() == pytest.approx(sum(by_hand) / 2, rel=1e-4)


def test_the_loss_of_intents_is_their_mean_cross_entropy():
    model, waveforms = SpeechModel(tiny(), "slu", ["a", "b", "c"]).eval(), torch.randn(2, 4_000)
    with torch.no_grad():
        probabilities = model(waveforms)[0].softmax(1)
        by_hand = -(probabilities[0, 2].log() + probabilities[1, 1].log()) / 2
        assert model.loss(waveforms, None, utterances("c", "b")).item() == pytest.approx(by_hand.item(), rel=1e-5)
