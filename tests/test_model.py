"""The forward pass: padding, gates as the paper puts them, exact slicing."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny
from torch import nn

import frontend
from flops import SMALL
from frontend import FirstConvolution, Projection
from gates import KINDS, HardConcrete
from transformer import Wav2Vec2

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
        layer.weight[0] = torch.tensor([1.0, -1] * 5)  # a high-pass kernel: what is left of this input is a millionth of its power
    slow = torch.sin(torch.arange(16_000) / 400)
    waveforms = torch.stack([torch.randn(16_000), slow + 1e-3 * torch.randn(16_000), slow * 3 + 5])
    for name, weight in layer.named_parameters():
        expected = F.group_norm(
            F.conv1d(waveforms[:, None].double(), layer.weight.double(), stride=5), 6, layer.norm_weight.double(), layer.norm_bias.double()
        )
        patches, kernel, shift = layer(waveforms)
        found = kernel @ patches + shift
        assert (found - expected).abs().max() < 2e-3  # float32 convolution of the third, whose outputs nearly cancel
        assert (found - expected)[:2].abs().max() < 1e-4
        direction = torch.randn(found.shape)
        gradients = [torch.autograd.grad((y * direction)[:2].sum(), weight)[0] for y in (found, expected)]
        assert torch.allclose(gradients[0], gradients[1].float(), rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item()), name


def test_the_frontend_computes_the_same_in_pieces_as_in_one():
    model = tiny(("channels",), spread=2.0)
    for samples in (33_000, 40_001, 77_777):
        waveforms, lengths = torch.randn(2, samples), torch.tensor([samples, samples // 3])
        patches = model.frontend.convolutions[0](waveforms)[0]
        assert model.frontend.pieces(patches) == 1
        whole = model(waveforms, lengths)[0]
        with torch.no_grad():
            assert model.frontend.pieces(patches) > 1
            assert (model(waveforms, lengths)[0] - whole).abs().max() < 1e-5


def reference_forward(model, waveforms):
    """The gated model as the paper puts it, written apart from the code: every unit's output is multiplied by its gate."""
    in_turn = sorted(model.gates, key=lambda place: (place[0] != "channels", place[1], place[0]))  # as the model comes to them
    gates = {place: model.gates[place]() for place in in_turn}

    def gate(kind, layer, size):
        return gates.get((kind, layer), torch.ones(size))

    x = waveforms[:, None]
    for i, layer in enumerate(model.frontend.convolutions):
        x = F.conv1d(x, layer.weight, stride=TINY.strides[i])
        if i == 0:
            x = F.group_norm(x, x.shape[1], layer.norm_weight, layer.norm_bias)
        x = F.gelu(x) * gate("channels", i, x.shape[1])[:, None]
    is_open = gate("channels", 6, x.shape[1]) > 0
    norm = model.projection.norm
    x = F.layer_norm(x.transpose(1, 2)[..., is_open], (int(is_open.sum()),), norm.weight[is_open], norm.bias[is_open])
    x = x @ model.projection.linear.weight[:, is_open].T + model.projection.linear.bias
    p = model.position
    weight = p.weight_v / p.weight_v.square().sum((0, 1), keepdim=True).sqrt() * p.weight_g
    x = model.norm(x + F.gelu(F.conv1d(x.transpose(1, 2), weight, p.bias, padding=8, groups=4)[..., :-1]).transpose(1, 2))
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


@pytest.mark.parametrize("place", [*(("channels", i) for i in range(7)), *((kind, i) for kind in ("heads", "units") for i in range(3))])
def test_slicing_is_exact_at_every_place_alone_down_to_the_last_unit(place):
    model = tiny(KINDS["mac"], spread=0)
    with torch.no_grad():
        gate = model.gates[place].log_alpha
        gate.fill_(-9)
        if place[0] == "channels":
            gate[2] = -1.0  # one half-open channel is left; layers of the Transformer lose all they have
    sliced = check_slice(model)
    assert getattr(sliced.shape, place[0])[place[1]] == (1 if place[0] == "channels" else 0)


def test_padding_and_slicing_change_nothing_in_bfloat16_beyond_its_precision():
    model = tiny(KINDS["mac"], spread=2.0)
    sliced, waveforms, lengths = model.slice(), torch.randn(2, 8_000), torch.tensor([8_000, 5_000])
    with torch.no_grad():
        exact = model(waveforms, lengths)[0][1, :15]
        with torch.autocast("cpu", torch.bfloat16):
            gated, cut, alone = model(waveforms, lengths)[0], sliced(waveforms, lengths)[0], model(waveforms[1:, :5_000])[0]
    for features in (gated[1, :15], cut[1, :15], alone[0]):
        assert 0 < (features - exact).norm() / exact.norm() < 0.03


def test_attention_drops_out_in_training_only():
    model, waveforms = tiny(), torch.randn(1, 4_000)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(waveforms)[0], model(waveforms)[0])
    model.train()
    assert not torch.equal(model(waveforms)[0], model(waveforms)[0])


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
    for waveforms, lengths in ((torch.randn(3_000), None), (torch.randn(0, 3_000), None), (torch.randn(2, 3_000), torch.tensor([3_000])),
                               (torch.randn(1, 3_000), torch.tensor([3_000.0])), (torch.randn(1, 3_000), torch.tensor([3_001])), (torch.randn(1, 399), None)):  # fmt: skip
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


def test_shut_channels_before_layer_norm_have_no_part_in_its_statistics():
    torch.manual_seed(0)
    projection, x = Projection(8, 4).eval(), torch.randn(2, 5, 8)
    gate = torch.tensor([1.0, 0, 0.5, 0, 1, 1, 0, 0.25])
    expected = projection(x, gate)
    x[..., gate == 0] = 100.0
    with torch.no_grad():
        projection.norm.bias.masked_fill_(gate == 0, 7.0)
    assert torch.equal(projection(x, gate), expected)


def test_all_gates_shut_gives_finite_features_and_gradients():
    model = tiny(KINDS["mac"])
    for gate in model.gates.values():
        nn.init.constant_(gate.log_alpha, -30)
    model.train()
    features, _ = model(torch.randn(2, 5_000))
    features.sum().backward()
    assert features.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_time_masks_cover_about_what_was_asked_in_spans_of_ten():
    torch.manual_seed(0)
    projection = Projection(4, 3, mask_probability=0.3)
    mask = projection.time_mask(torch.zeros(50, 400, 3))
    assert 0.7 * 0.3 < mask.float().mean() < 0.3  # overlaps make it less: 1 - (1 - 0.03) ** 10 = 0.26
    runs = "".join("01"[m] for m in mask[0].tolist()).strip("1").split("0")  # those at the borders can be cut
    assert all(len(run) >= 10 for run in runs if run)
    x = projection.train()(torch.randn(50, 400, 4))
    assert (x == projection.mask_embedding).all(-1).float().mean() > 0.2
    projection.eval()
    assert not (projection(torch.randn(5, 400, 4)) == projection.mask_embedding).all(-1).any()


def test_layer_drop_leaves_out_layers_in_training_only():
    model, x = tiny().train(), torch.randn(1, 2_000)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.layers:
        layer.attention.dropout = 0.0
    whole = model(x)[0]
    model.layer_drop = 1.0
    assert not torch.allclose(model(x)[0], whole)
    assert torch.allclose(model.eval()(x)[0], whole, atol=1e-6)


@pytest.mark.parametrize(("samples", "lengths"), [(399, None), (1_000, [1_000, 399]), (1_000, [1_001, 800]), (1_000, [1_000])])
def test_impossible_lengths_are_refused(samples, lengths):
    with pytest.raises(ValueError, match="samples"):
        tiny()(torch.randn(2, samples), None if lengths is None else torch.tensor(lengths))


def test_a_gate_is_of_the_mode_of_its_model():
    model = tiny()
    model.add_gates(("heads",))
    assert not any(gate.training for gate in model.gates.values())
    assert all(isinstance(gate, HardConcrete) for gate in model.gates.values())


def test_linear_is_the_same_on_one_thread_and_on_two():
    """They compute it in different ways."""
    x, weight, bias = torch.randn(3, 17, 40), torch.randn(24, 40, requires_grad=True), torch.randn(24)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = frontend.linear(x, weight, bias)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), weight)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0][0], (x @ weight.T + bias).detach(), rtol=1e-4, atol=1e-4)
