"""A prefix made fast gives the same rows, or stays as it was."""

import pytest
import timm
import torch
from torch import nn

from tlcli.backbones import inference
from tlcli.backbones.backbone import state_sha256
from tlcli.backbones.memory_format import to_channels_last

CPU = torch.device("cpu")


def network(name, image_size=64, **arguments):
    """Return a small network with batch statistics that are not the initial ones."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0, **arguments)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, image_size, image_size))
    return model.eval().requires_grad_(False)


def images(size=64):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
def test_folding_does_not_change_the_rows(name):
    model = network(name)
    before = state_sha256(model)
    expected = model(images())
    fast = inference.prepare(model, (64, 64), torch.float32, CPU)
    assert fast.facts["dtype"] == "fp32"
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    left = sum(isinstance(module, nn.BatchNorm2d) for module in fast.module.modules())
    assert fast.facts["folded_batch_norms"] == norms - left
    assert left <= 1  # a stem may end in a Sequential, with its norm outside
    torch.testing.assert_close(fast.module(images()), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert state_sha256(model) == before  # the module given is left as it was


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("mobilenetv3_small_050", {}), ("test_resnet", {}), ("test_vit", {"img_size": 64})],
)
def test_bf16_stays_close_to_fp32(name, arguments):
    model = network(name, **arguments)
    fast = inference.prepare(model, (64, 64), torch.bfloat16, CPU)
    assert fast.facts["dtype"] == "bf16", fast.reason
    order = inference.layers_in_order(model, images())
    layers = dict(fast.module.named_modules())
    dtypes = [layers[key].weight.dtype for key in order]
    assert dtypes[:2] == [torch.float32] * 2  # where errors travel furthest
    assert torch.bfloat16 in dtypes
    rows = fast.module(images()).float()
    assert inference.median_cosine(rows, model(images())) > 0.998


def test_a_backbone_that_bf16_ruins_stays_in_fp32():
    class Difference(nn.Module):
        """Subtracts two nearly equal layers: what remains is all rounding error."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.left = nn.Conv2d(8, 8, 3)
            self.right = nn.Conv2d(8, 8, 3)
            self.right.load_state_dict(self.left.state_dict())
            self.right.weight.data *= 1 + 1e-4 * torch.rand_like(self.right.weight)

        def forward(self, x):
            x = self.second(self.first(x))
            return (self.left(x) - self.right(x)).flatten(1)

    torch.manual_seed(0)
    fast = inference.prepare(Difference().eval(), (32, 32), torch.bfloat16, CPU)
    assert fast.facts["dtype"] == "fp32"
    assert "strays" in fast.reason
    assert {p.dtype for p in fast.module.parameters()} == {torch.float32}


class Pair(nn.Module):
    """A convolution and a batch norm, declared side by side; `order` says how they run."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.norm.running_mean += torch.tensor([0.5, -1.0, 2.0])
        self.norm.running_var *= 3

    def forward(self, x):
        if self.order == "conv, norm":
            return self.norm(self.conv(x)).flatten(1)
        if self.order == "norm, conv":
            return self.conv(self.norm(x)).flatten(1)
        middle = self.conv(x)  # used twice
        return (self.norm(middle) + middle).flatten(1)


@pytest.mark.parametrize(
    ("order", "folded"), [("conv, norm", 1), ("norm, conv", 0), ("conv twice", 0)], ids=lambda v: str(v)
)
def test_declared_side_by_side_is_not_enough_to_fold(order, folded):
    torch.manual_seed(0)
    model = Pair(order).eval()
    expected = model(images(16))
    fast = inference.prepare(model, (16, 16), torch.float32, CPU)
    assert fast.facts["folded_batch_norms"] == folded
    torch.testing.assert_close(fast.module(images(16)), expected, rtol=1e-3, atol=1e-3)


def test_a_norm_without_statistics_or_of_another_width_is_left_alone():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 8, 1)
    )
    folded, count = inference.fold_batch_norms(module.eval())
    assert count == 0
    assert isinstance(folded[1], nn.BatchNorm2d)


def test_a_norm_with_an_activation_keeps_it():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)).eval()
    folded, count = inference.fold_batch_norms(module)
    assert count == 1
    torch.testing.assert_close(folded(images(16)), module(images(16)), rtol=1e-4, atol=1e-5)
    assert float(folded(images(16)).detach().min()) >= 0


def test_long_filters_are_rounded_to_nearest():
    weight = torch.randn(4, inference.SHORT_FILTER + 1, generator=torch.Generator().manual_seed(2))
    assert torch.equal(inference.diffuse_to_bf16(weight), weight.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(8, 7, 3, 3), (8, 1, 3, 3), (5, 64)])
def test_rounding_keeps_the_sum_of_each_short_filter(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.3
    rounded = inference.diffuse_to_bf16(weight)
    assert rounded.dtype == torch.bfloat16
    assert rounded.shape == weight.shape
    plain = weight.to(torch.bfloat16)
    drift = (rounded.float().flatten(1).sum(1) - weight.flatten(1).sum(1)).abs()
    smallest = weight.flatten(1).abs().amin(1)
    assert (drift <= smallest * 2**-8 + 1e-5).all()
    assert drift.sum() < 0.2 * (plain.float().flatten(1).sum(1) - weight.flatten(1).sum(1)).abs().sum()
    # ... and no value moves by more than two units in the last place.
    assert ((rounded.float() - weight).abs() <= weight.abs() * 2**-7 + 2**-8 * weight.abs().amax()).all()


def test_the_probe_images_are_always_the_same_and_normalised():
    first, second = inference.synthetic_images((32, 48)), inference.synthetic_images((32, 48))
    assert first.shape == (inference.PROBE_IMAGES, 3, 32, 48)
    assert torch.equal(first, second)
    assert float(first.abs().max()) <= 2
    assert 0.5 < float(first.std()) < 1.5


def test_a_prefix_of_few_layers_stays_in_fp32_and_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    fast = inference.prepare(model, (16, 16), torch.bfloat16, CPU)
    assert fast.facts["dtype"] == "fp32"
    assert "only 2 layers" in fast.reason


def test_nan_rows_count_as_far_apart():
    rows = torch.full((4, 8), float("nan"))
    assert inference.median_cosine(rows, torch.ones(4, 8)) == 0.0


def test_layers_are_listed_in_the_order_they_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.last(self.first(x).mean((2, 3)))

    assert inference.layers_in_order(Backwards().eval(), images(8)) == ["first", "last"]


# ---- networks that mix number types themselves -----------------------------------------------------------


class Masked(nn.Module):
    """Attention with a mask in fp32: a product of two number types where its layers alone are in bf16."""

    def __init__(self, *, autocast=True):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if index == 0 else 8, 8, 3, padding=1) for index in range(5))
        self.autocast = autocast
        self.register_buffer("mask", torch.randn(2, 2, 8, 8, 1))  # rank 5, as masks of shifted windows
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        if not self.autocast and (x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")):
            raise TypeError("no kernel for this number type")
        return x.mean((2, 3)) @ self.weight


@pytest.mark.parametrize(("autocast", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_what_bf16_layers_cannot_do_runs_under_autocast_or_in_fp32(autocast, dtype):
    torch.manual_seed(0)
    model = Masked(autocast=autocast).eval().requires_grad_(False)
    before = state_sha256(model)
    fast = inference.prepare(model, (32, 32), torch.bfloat16, CPU)
    assert fast.facts["dtype"] == dtype
    assert fast.facts.get("autocast", False) == autocast
    assert ("autocast" if autocast else "does not run") in fast.reason
    assert inference.median_cosine(inference.run(fast.module, images(32)), model(images(32))) > 0.99
    assert state_sha256(model) == before


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "window_size": 2, "depths": (1, 1, 2, 1)}),
        ("levit_128s", 224, {}),
        ("cait_xxs24_224", 32, {"img_size": 32, "depth": 2}),
        ("sequencer2d_s", 224, {"layers": (1, 1, 1, 1)}),
    ],
)
def test_families_of_timm_that_mix_number_types(name, size, arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **arguments).eval().requires_grad_(False)
    fast = inference.prepare(model, (size, size), torch.bfloat16, CPU)
    assert fast.facts["autocast"], fast.reason
    rows = inference.run(fast.module, images(size)[:1])
    with torch.no_grad():
        assert inference.median_cosine(rows, model(images(size)[:1])) > 0.99


class ViewsMaps(nn.Module):
    """Views its maps as tokens, which channels-last memory does not allow."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.layers = nn.Sequential(*(nn.Linear(120, 120) for _ in range(3)))

    def forward(self, x):
        return self.layers(self.first(x).view(len(x), 60, 120)).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_that_views_its_maps_runs_in_contiguous_memory(dtype):
    torch.manual_seed(0)
    model = ViewsMaps().eval().requires_grad_(False)
    fast = inference.prepare(model, (32, 32), dtype, CPU)
    assert not fast.channels_last
    assert fast.facts["memory_format"] == "contiguous"
    assert fast.reason.endswith("in contiguous memory")
    rows = inference.run(fast.module, images(32))
    assert inference.median_cosine(rows, model(images(32))) > 0.99


def test_what_a_network_keeps_of_a_forward_pass_can_be_trained_with():
    """ConViT keeps a table that its first pass makes."""
    model = timm.create_model("convit_tiny", num_classes=0, img_size=32, depth=2).eval()
    inference.run(model, images(32))
    model.train()(images(32)).sum().backward()


def test_memory_format_is_set_tensor_by_tensor():
    module = to_channels_last(Masked())
    assert module.layers[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert module.mask.is_contiguous()
