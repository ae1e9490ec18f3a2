"""Loading a backbone by name: timm, torchvision, the classics, a hub, a local folder, the bundled one.

Weights found on this machine are used without asking a hub, so a run does not change under a user; see
`tlcli.backbones.hub`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tlcli.backbones.backbone import Backbone, no_drop_path
from tlcli.backbones.image_sizes import ImageSizeError, size_advice, uncovered
from tlcli.backbones.preprocessing import with_options
from tlcli.backbones.specs import LIST_HINT, timm_spec
from tlcli.backbones.timm_zoo import build, build_error
from tlcli.config.backbone import BackboneOptions
from tlcli.errors import BackboneError, UsageError
from tlcli.machine.memory import is_out_of_memory
from tlcli.warned import warn
from tlcli.wording import first_line


def load_backbone(options: BackboneOptions, drop_path: float = 0.0) -> Backbone:
    """Load the backbone that `options` names, headless, in eval mode, with its evaluation transform.

    Args:
        options: Which one.
        drop_path: Drop-path rate (stochastic depth, Huang et al. 2016) in [0, 1), rising linearly with depth
            as the architecture lays it out. It acts in train mode alone. 0 turns off what an architecture
            has by default.

    Raises:
        UsageError: The name or an argument of the network is unknown, options contradict each other, or the
            network has no drop-path.
        BackboneError: The weights cannot be found, loaded or trusted, or the image size does not suit.
    """
    if not options.backbone:
        raise UsageError("No backbone is named.", hint="Add --backbone, for example --backbone bundled.")
    if options.random_init and options.weights:
        raise UsageError("--random-init and --weights contradict each other.", hint="Leave one of them out.")
    try:
        backbone = _load(options, options.backbone, drop_path)
    except ImageSizeError as error:
        error.hint = size_advice(options.height_width, lambda size: _takes(options, size))
        raise
    if options.height_width and (note := uncovered(backbone, lambda size: _takes(options, size))):
        warn("unseen_pixels", note)
    return backbone


def _takes(options: BackboneOptions, size: tuple[int, int] | None) -> bool:
    """Return whether the backbone takes images of a size, None its own; weights do not matter for that."""
    changed = dataclasses.replace(
        options, image_size=None if size is None else f"{size[0]}x{size[1]}", random_init=True, weights=None
    )
    try:
        _load(changed, str(options.backbone), 0.0)
    except (BackboneError, UsageError):
        return False
    return True


def _load(options: BackboneOptions, name: str, drop_path: float) -> Backbone:
    given = options.model_arguments
    if name.startswith(("torchvision/", "classic/")):
        if name.startswith("torchvision/") and given:
            raise UsageError(
                f"{name} takes no --model-kwargs.", hint="Leave it out, or use a network of timm's."
            )
        backbone = _build_other(name, given, options)
    else:
        spec = timm_spec(name, offline=options.random_init)
        try:
            backbone = build(name, spec, options, given, drop_path)
        except BackboneError as error:
            raise build_error(name, spec.architecture, error, given) from error
    _set_drop_path(backbone, drop_path)
    backbone.pretrained = not options.random_init
    if options.weights:
        backbone.license = None  # what is known is the licence of the architecture's own weights
        backbone.pretrained_cfg.pop("license", None)
    backbone.preprocess = with_options(backbone.preprocess, options)
    backbone.model.eval()
    backbone.num_features = _check_forward(backbone)
    return backbone


def load_stored(architecture: str, arguments: Mapping[str, Any], weights_file: str | None) -> Backbone:
    """Load a torchvision or classic network that a run stored, headless, in eval mode.

    Args:
        architecture: As `Backbone.architecture`, with the prefix.
        arguments: As `Backbone.arguments`.
        weights_file: The run's tensors; None leaves the network untrained.

    Raises:
        UsageError: There is no such architecture or argument.
        BackboneError: The weights cannot be loaded or do not fit.
    """
    given = {key: value for key, value in arguments.items() if key != "image_size"}
    side = arguments.get("image_size")
    stored = BackboneOptions(weights=weights_file, random_init=weights_file is None, image_size=side)
    backbone = _build_other(architecture, given, stored)
    if side:
        backbone.preprocess = dataclasses.replace(backbone.preprocess, image_size=(side, side))
    _set_drop_path(backbone, 0.0)
    backbone.model.eval()
    backbone.num_features = _check_forward(backbone)
    return backbone


# ---- building --------------------------------------------------------------------------------------------


def _build_other(name: str, given: dict[str, Any], options: BackboneOptions) -> Backbone:
    """Build a classic network, or one of torchvision, which takes no arguments."""
    chosen: dict[str, Any] = {
        "weights_file": options.weights,
        "weights_key": options.weights_key,
        "random_init": options.random_init,
        "image_size": options.height_width,
    }
    if name.startswith("classic/"):
        from tlcli.backbones import classic

        parts = classic.build(name, given, **chosen)
        return Backbone(name=name, architecture=name, num_features=0, origin="classic", **parts)
    from tlcli.backbones import torchvision_zoo

    parts = torchvision_zoo.build(name, **chosen)
    architecture = name.partition(".")[0]
    return Backbone(name=name, architecture=architecture, num_features=0, origin="torchvision", **parts)


def _set_drop_path(backbone: Backbone, rate: float) -> None:
    """Set the rates that no argument sets, so that 0 is none and torchvision's networks follow `rate`."""
    layers: list[Any] = [
        module
        for module in backbone.model.modules()
        if type(module).__name__ in {"DropPath", "StochasticDepth"}
    ]
    if rate and not layers:
        raise no_drop_path(backbone.name)
    for place, layer in enumerate(layers):
        if type(layer).__name__ == "StochasticDepth":
            layer.p = rate * place / max(1, len(layers) - 1)
        elif not rate:
            layer.drop_prob = 0.0


def _check_forward(backbone: Backbone) -> int:
    """Run the network once and return D.

    Raises:
        BackboneError: It does not take images of this size, or gives no finite vector per image.
    """
    height, width = backbone.preprocess.image_size
    try:
        with torch.no_grad():
            output = backbone.model(torch.zeros(1, 3, height, width))
    except Exception as error:  # architectures fail on odd sizes in many ways
        if is_out_of_memory(error):
            raise
        raise ImageSizeError(
            f"{backbone.name} does not take images of {height}x{width} pixels: {first_line(error)}"
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or output.shape[0] != 1:
        shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise BackboneError(
            f"{backbone.name} gives {shape} for one image; a pooled vector [1, D] is expected.",
            hint=LIST_HINT,
        )
    return int(output.shape[1])
