"""The networks of the text books that neither timm nor torchvision has.

    classic/lenet5-1998      LeNet-5 as published: 60,000 parameters, scaled tanh, trained subsampling
    classic/lenet5           LeNet-5 as built today: ReLU, max pooling, colour, batch norm on request
    classic/small-cnn        `depth` times 3x3 convolution and pooling, doubling the channels
    classic/mlp              fully connected layers on the pixels
    classic/xception-small   separable convolutions with residual connections (Chollet 2017), made small

None has pretrained weights: they are for `--scenario scratch`, or for baselines with --random-init. The
others of the text books have their own names: torchvision/alexnet, vgg16, resnet50, torchvision/googlenet,
inception_v3, legacy_xception, xception41, mobilenetv2_100, mobilenetv3_small_100.

Each network is a row of named steps, its units, and ends in the pooled or last hidden features [B, D]; the
classifier is tlcli's head, also in place of LeNet-5's radial basis functions. Images of other sizes than the
network's own are taken: what depends on the size is laid out for `image_size`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlcli.backbones import weights
from tlcli.backbones.image_sizes import ImageSizeError
from tlcli.backbones.initialise import reinitialise
from tlcli.config.backbone import Preprocess
from tlcli.config.model_kwargs import unknown_argument
from tlcli.errors import BackboneError, UsageError
from tlcli.wording import did_you_mean, near_misses

PREFIX = "classic/"
INIT_SEED = 0
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class Classic(nn.Sequential):
    """A row of named steps: images [B, 3, H, W] to features [B, D].

    Args:
        steps: Name -> module, in forward order; those with parameters are the units.
        chosen_init: What `init` of --model-kwargs says; "auto" leaves it to --init.
    """

    def __init__(self, steps: Mapping[str, nn.Module], chosen_init: str) -> None:
        super().__init__(OrderedDict(steps))
        self.chosen_init = chosen_init

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return step name -> pattern of its parameters, as timm's networks do."""
        del coarse
        holders = [name for name, step in self.named_children() if any(True for _ in step.parameters())]
        return {name: rf"^{name}\." for name in holders}


# ---- LeNet-5 as published ---------------------------------------------------------------------------------

C3_INPUTS = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 0), (5, 0, 1),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 0), (4, 5, 0, 1), (5, 0, 1, 2),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)  # fmt: skip
"""Which maps of S2 each map of C3 sees (LeCun et al. 1998, table I)."""


class Grey(nn.Module):
    """RGB [B, 3, H, W] to luminance [B, 1, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shares", torch.tensor(GREY).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the weighted sum of the channels."""
        return (images * self.shares).sum(1, keepdim=True)  # type: ignore[operator]


class ScaledTanh(nn.Module):
    """1.7159 tanh(2x/3), which is about x at -1, 0 and 1, and curves most there."""

    def forward(self, values: Tensor) -> Tensor:
        """Return values of the same shape, within 1.7159."""
        return 1.7159 * torch.tanh(values * (2 / 3))


class Subsampling(nn.Module):
    """Sums 2x2 neighbours, times a trained coefficient, plus a trained bias; one of each a map."""

    def __init__(self, num_maps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_maps,), 0.25))
        self.bias = nn.Parameter(torch.zeros(num_maps))

    def fans(self) -> tuple[float, float]:
        """Return fan_in and fan_out."""
        return 4, 1

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of half the height and width."""
        total = functional.avg_pool2d(maps, 2) * 4
        return total * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class PartialConvolution(nn.Module):
    """A convolution whose output maps see some input maps only; there are no weights for the others."""

    def __init__(self, inputs: tuple[tuple[int, ...], ...], num_maps: int, kernel_size: int) -> None:
        super().__init__()
        self.num_maps, self.num_outputs = num_maps, len(inputs)
        places = [row * num_maps + column for row, columns in enumerate(inputs) for column in columns]
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.weight = nn.Parameter(torch.ones(len(places), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(len(inputs)))

    def fans(self) -> tuple[float, float]:
        """Return fan_in and fan_out, means over the maps."""
        return self.weight.numel() / self.num_outputs, self.weight.numel() / self.num_maps

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps [B, len(inputs), H - kernel_size + 1, W - kernel_size + 1]."""
        kernel = self.weight.shape[1:]
        dense = self.weight.new_zeros(self.num_outputs * self.num_maps, *kernel)
        dense = dense.index_copy(0, self.places, self.weight)  # type: ignore[arg-type]
        return functional.conv2d(maps, dense.view(self.num_outputs, self.num_maps, *kernel), self.bias)


def _lenet5_1998(image_size: int, init: str) -> Classic:
    """LeNet-5 (LeCun, Bottou, Bengio & Haffner 1998, section II.B), up to F6."""
    squash = ScaledTanh
    final = ((image_size - 4) // 2 - 4) // 2  # side of S4's maps: 5 for images of 32
    steps = {
        "grey": Grey(),
        "c1": nn.Sequential(nn.Conv2d(1, 6, 5), squash()),
        "s2": nn.Sequential(Subsampling(6), squash()),
        "c3": nn.Sequential(PartialConvolution(C3_INPUTS, 6, 5), squash()),
        "s4": nn.Sequential(Subsampling(16), squash()),
        "c5": nn.Sequential(nn.Conv2d(16, 120, final), squash(), nn.Flatten()),
        "f6": nn.Sequential(nn.Linear(120, 84), squash()),
    }
    return Classic(steps, init)


# ---- networks with options --------------------------------------------------------------------------------


def _step(layers: Mapping[str, nn.Module], size: int, number: int, options: Mapping[str, Any]) -> nn.Module:
    """Return linear layers or convolutions with their activation, and with batch norm where asked for.

    Args:
        layers: What is computed first.
        size: Channels, or units of a linear layer.
        number: Of the step in the network, from 0.
        options: `activation`, `norm` and `norm_place`.
    """
    flat = any(isinstance(layer, nn.Linear) for layer in layers.values())
    norm: dict[str, nn.Module] = {}
    if options["norm"] == "every" or (options["norm"] == "first" and number == 0):
        norm["norm"] = nn.BatchNorm1d(size) if flat else nn.BatchNorm2d(size)
    activation = {"act": ACTIVATIONS[options["activation"]]()}
    after = norm | activation if options["norm_place"] == "before" else activation | norm
    return nn.Sequential(OrderedDict({**layers, **after}))


def _convolution(
    inputs: int, outputs: int, kernel_size: int, padding: int, separable: bool
) -> dict[str, Any]:
    if not separable:
        return {"conv": nn.Conv2d(inputs, outputs, kernel_size, padding=padding)}
    return {
        "depthwise": nn.Conv2d(inputs, inputs, kernel_size, padding=padding, groups=inputs, bias=False),
        "pointwise": nn.Conv2d(inputs, outputs, 1),
    }


def _lenet5(image_size: int, width: int, separable: bool, init: str, **options: Any) -> Classic:
    """LeNet-5 with colour, complete connections, max pooling and ReLU; F6 gives the features."""
    maps = 16 * width
    final = ((image_size - 4) // 2 - 4) // 2
    hidden = 120 * width
    steps = {
        "c1": _step(_convolution(3, 6 * width, 5, 0, False), 6 * width, 0, options),
        "s2": nn.MaxPool2d(2),
        "c3": _step(_convolution(6 * width, maps, 5, 0, separable), maps, 1, options),
        "s4": nn.Sequential(nn.MaxPool2d(2), nn.Flatten()),
        "c5": _step({"linear": nn.Linear(maps * final**2, hidden)}, hidden, 2, options),
        "f6": _step({"linear": nn.Linear(hidden, 84 * width)}, 84 * width, 3, options),
    }
    return Classic(steps, init)


def _small_cnn(
    image_size: int, width: int, depth: int, separable: bool, init: str, **options: Any
) -> Classic:
    """`depth` steps of a 3x3 convolution and 2x2 max pooling; channels double, then are averaged."""
    del image_size
    steps: dict[str, nn.Module] = {}
    inputs = 3
    for number in range(depth):
        outputs = width * 2**number
        layers = _convolution(inputs, outputs, 3, 1, separable and number > 0)
        steps[f"conv{number + 1}"] = _step(layers, outputs, number, options)
        steps[f"pool{number + 1}"] = nn.MaxPool2d(2)
        inputs = outputs
    steps["average"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classic(steps, init)


def _mlp(image_size: int, width: int, depth: int, hidden: list[int], init: str, **options: Any) -> Classic:
    """A multilayer perceptron on the pixels; its last hidden layer gives the features."""
    steps: dict[str, nn.Module] = {"pixels": nn.Flatten()}
    inputs = 3 * image_size**2
    for number, size in enumerate(hidden or [width] * depth):
        steps[f"hidden{number + 1}"] = _step({"linear": nn.Linear(inputs, size)}, size, number, options)
        inputs = size
    return Classic(steps, init)


class SeparableResidual(nn.Module):
    """Two separable convolutions and 3x3 max pooling beside a strided 1x1 convolution (Chollet 2017)."""

    def __init__(self, inputs: int, outputs: int, activation: Callable[[], nn.Module], first: bool) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for size, active in ((inputs, not first), (outputs, True)):
            parts += [activation()] if active else []
            parts += _convolution(size, outputs, 3, 1, True).values()
            parts += [nn.BatchNorm2d(outputs)]
        self.main = nn.Sequential(*parts, nn.MaxPool2d(3, stride=2, padding=1))
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2), nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of half the height and width, rounded up."""
        return self.main(maps) + self.shortcut(maps)  # type: ignore[no-any-return]


def _xception_small(image_size: int, width: int, depth: int, activation: str, init: str) -> Classic:
    """A strided convolution and `depth` separable residual blocks; channels double, then are averaged."""
    del image_size
    act = ACTIVATIONS[activation]
    stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), act())
    steps: dict[str, nn.Module] = {"stem": stem}
    for number in range(depth):
        inputs = width * 2**number
        steps[f"block{number + 1}"] = SeparableResidual(inputs, 2 * inputs, act, number == 0)
    steps["average"] = nn.Sequential(act(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classic(steps, init)


# ---- names and options ------------------------------------------------------------------------------------

INITS = ("auto", "he", "xavier", "normal", "default")
LAYERS: dict[str, tuple[Any, Any]] = {
    "norm": ("none", ("none", "first", "every")),
    "norm_place": ("before", ("before", "after")),
    "activation": ("relu", tuple(ACTIVATIONS)),
    "init": ("auto", INITS),
}


@dataclass(frozen=True)
class ClassicSpec:
    """One name of this module.

    Attributes:
        build: Takes `image_size` and the options.
        options: Name -> (default, what is allowed: a tuple of words or booleans, a range of whole numbers, or
            `list` for hidden sizes).
        image_size: Its own side of the images in pixels.
        smallest: Smallest side for a depth (0 where it has no depth).
    """

    build: Callable[..., Classic]
    options: Mapping[str, tuple[Any, Any]]
    image_size: int
    smallest: Callable[[int], int]


NETWORKS: dict[str, ClassicSpec] = {
    "lenet5-1998": ClassicSpec(_lenet5_1998, {"init": ("paper", ("paper", *INITS[1:]))}, 32, lambda _: 16),
    "lenet5": ClassicSpec(
        _lenet5, {**LAYERS, "separable": (False, (False, True)), "width": (1, range(1, 65))}, 32, lambda _: 16
    ),
    "small-cnn": ClassicSpec(
        _small_cnn,
        {
            **LAYERS,
            "separable": (False, (False, True)),
            "width": (32, range(1, 513)),
            "depth": (3, range(1, 8)),
        },
        64,
        lambda depth: 2**depth,
    ),
    "mlp": ClassicSpec(
        _mlp,
        {**LAYERS, "width": (512, range(1, 8193)), "depth": (2, range(1, 101)), "hidden": ([], list)},
        32,
        lambda _: 1,
    ),
    "xception-small": ClassicSpec(
        _xception_small,
        {
            "activation": LAYERS["activation"],
            "init": LAYERS["init"],
            "width": (32, range(1, 257)),
            "depth": (3, range(1, 7)),
        },
        64,
        lambda _: 8,
    ),
}


def names() -> list[str]:
    """Return the names of the networks, without the prefix."""
    return list(NETWORKS)


def build(
    name: str,
    given: Mapping[str, Any],
    *,
    weights_file: str | None = None,
    weights_key: str | None = None,
    random_init: bool = False,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return what a Backbone needs of a classic network: model, preprocess, arguments.

    Args:
        name: With the prefix, such as "classic/lenet5".
        given: Options of the network, from --model-kwargs.
        weights_file: Weights of a network built with the same options.
        weights_key: Which of several sets of tensors in that file is meant.
        random_init: Leave the weights random, always in the same way.
        image_size: Height and width of the images in pixels, which must be equal; its own by default.

    Raises:
        UsageError: The name or an option is unknown, or an option has no such value.
        BackboneError: No weights were given, they do not fit, or the images are too small.
    """
    short = name.removeprefix(PREFIX)
    if short not in NETWORKS:
        near = [PREFIX + other for other in near_misses(short, NETWORKS, most=1)]
        known = ", ".join(PREFIX + other for other in NETWORKS)
        hint = f"{did_you_mean(near)}Known: {known}."
        raise UsageError(f"There is no network {name!r}.", hint=hint)
    network = NETWORKS[short]
    side, width = image_size or (network.image_size, network.image_size)
    if side != width:
        raise ImageSizeError(f"{name} does not take images of {side}x{width} pixels: only square ones.")
    arguments = {"image_size": side, **resolve_options(short, given)}
    if not random_init and not weights_file:
        raise BackboneError(
            f"{name} has no pretrained weights.",
            hint="Train it from random ones with --scenario scratch; or give --weights FILE, or "
            "--random-init for a baseline.",
        )
    smallest = network.smallest(arguments.get("depth", 0))
    if side < smallest:
        less = ", or a smaller depth" if short == "small-cnn" else ""
        raise BackboneError(
            f"{name} does not take images of {side}x{side} pixels: they are too small.",
            hint=f"Use --image-size {smallest} or more{less}.",
        )
    model = headless(short, arguments)
    if weights_file:
        weights.load_weights(model, weights_file, name, key=weights_key)
    preprocess = Preprocess(
        image_size=(side, side),
        crop_pct=1.0,
        interpolation="bilinear",
        # Nearly the statistics of photographs, and alike for all colours, so that grey stays grey.
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return {"model": model, "preprocess": preprocess, "arguments": arguments}


def headless(name: str, arguments: Mapping[str, Any] | None = None) -> Classic:
    """Build a network without loading weights; always with the same ones.

    Args:
        name: Without the prefix.
        arguments: Every option, and `image_size`; None for the defaults.
    """
    network = NETWORKS[name]
    if arguments is None:
        arguments = {"image_size": network.image_size, **resolve_options(name, {})}
    with torch.random.fork_rng(devices=[]):  # the layers draw when made, whether or not they are drawn anew
        model = network.build(**arguments)
    reinitialise(model, "he", INIT_SEED)
    return model


def resolve_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option of a network, defaults filled in.

    Raises:
        UsageError: An option is unknown, has no such value, or contradicts another.
    """
    options = NETWORKS[name].options
    resolved = {key: default for key, (default, _) in options.items()}
    for key, value in given.items():
        if key not in options:
            raise unknown_argument(PREFIX + name, key, options)
        allowed = options[key][1]
        if allowed is list:
            value = value if isinstance(value, list) else [value]
            good = all(type(item) is int and 0 < item <= 65_536 for item in value)
            expected = "a list of hidden sizes, such as [512,256]"
        elif isinstance(allowed, range):
            good = type(value) is int and value in allowed
            expected = f"a whole number from {allowed[0]} to {allowed[-1]}"
        else:
            value = "none" if value is None and "none" in allowed else value  # `none` is also Python's None
            good = type(value) is type(allowed[0]) and value in allowed
            expected = ", ".join(str(item).lower() for item in allowed)
        if not good:
            shown = str(value).lower() if isinstance(value, bool) else value
            raise UsageError(
                f"--model-kwargs {key}={shown} is no value for {PREFIX}{name}.",
                hint=f"Allowed: {expected}.",
            )
        resolved[key] = value
    if given.get("hidden") and {"width", "depth"} & given.keys():
        raise UsageError(
            "--model-kwargs: hidden contradicts width and depth.", hint="Give the sizes one way only."
        )
    return resolved
