"""Loading a backbone by name: timm, torchvision, the classics, a hub, a local folder, the bundled one.

The evaluation transform of a timm backbone is its plain one (`input_size`, `crop_pct`), not the larger test
size some configurations also name: it is the size the network was trained for, and timm's own default.
Weights found on this machine are used without asking a hub, so a run does not change under a user; see
`tlcli.backbones.hub`.
"""

import dataclasses
import hashlib
import importlib
import inspect
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import timm
import torch
from torch import nn

from tlcli.backbones import weights
from tlcli.backbones.model_arguments import OWN_OPTIONS, SETTLED, parse_arguments, unknown_argument
from tlcli.backbones.specs import LIST_HINT, Source, TimmSpec, timm_spec
from tlcli.errors import BackboneError, UsageError
from tlcli.memory import is_out_of_memory
from tlcli.option_groups import BackboneOptions, Interpolation, Preprocess

logger = logging.getLogger(__name__)

INIT_SEED = 0
"""Seed of --random-init, so that the baseline is the same each time."""

CALL_ARGUMENTS = (frozenset(inspect.signature(timm.create_model).parameters) - {"kwargs"}) | {
    "name",
    "architecture",
    "features_only",
    "pretrained_model_args",
    "pretrained_strict",
    "pretrained_filter_fn",
    "kwargs_filter",
    "feature_cfg",
}
"""What a configuration's model_args must not set: how a network is built and where its weights are."""

SIZES = (1, 4096)  # sides of an image in pixels, and shares of a crop, that a configuration may ask for
CROPS = (0.1, 2.0)  # above 1 the image is padded
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)


@dataclass(kw_only=True)
class Backbone:
    """A loaded backbone and how images are prepared for it.

    Attributes:
        name: As the user wrote it.
        architecture: timm's name without a tag, "torchvision/NAME" or "classic/NAME".
        model: Headless, in eval mode, float32: maps [B, 3, H, W] to pooled features [B, D].
        preprocess: The evaluation transform, with the user's overrides.
        num_features: D.
        arguments: What `timm.create_model` (or `load_stored`) needs besides `num_classes` to build the same
            network. Drop-path is not among them: it changes training alone.
        license: Licence of the weights where known, such as "apache-2.0".
        source: Where the weights came from.
        pretrained: False with --random-init.
        pretrained_cfg: timm's configuration of the weights without their location; {} for other networks.
    """

    name: str
    architecture: str
    model: nn.Module
    preprocess: Preprocess
    num_features: int
    arguments: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    source: Source = "timm"
    pretrained: bool = True
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)

    @property
    def is_timm(self) -> bool:
        """Return whether timm can build the network, so that its format can describe it."""
        return self.source not in ("torchvision", "classic")


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
    name = options.backbone
    if not name:
        raise UsageError("No backbone is named.", hint="Add --backbone, for example --backbone bundled.")
    if options.random_init and options.weights:
        raise UsageError("--random-init and --weights contradict each other.", hint="Leave one of them out.")
    given = parse_arguments(options.model_kwargs)
    if name.startswith(("torchvision/", "classic/")):
        if name.startswith("torchvision/") and given:
            raise UsageError(
                f"{name} takes no --model-kwargs.", hint="Leave it out, or use a network of timm's."
            )
        backbone = _build_other(name, given, options.weights, options.random_init, options.image_size)
    else:
        spec = timm_spec(name, offline=options.random_init)
        try:
            backbone = _build_timm(name, spec, options, given, drop_path)
        except BackboneError as error:
            raise _blame(name, spec.architecture, error, given) from error
    _set_drop_path(backbone, drop_path)
    backbone.pretrained = not options.random_init
    backbone.preprocess = _override(backbone.preprocess, options)
    backbone.model.eval()
    backbone.num_features = _check_forward(backbone)
    return backbone


def load_stored(architecture: str, arguments: Mapping[str, Any], weights_file: str) -> Backbone:
    """Load a torchvision or classic network that a run stored, headless, in eval mode.

    Args:
        architecture: As `Backbone.architecture`, with the prefix.
        arguments: As `Backbone.arguments`.
        weights_file: The run's tensors.

    Raises:
        UsageError: There is no such architecture or argument.
        BackboneError: The weights cannot be loaded or do not fit.
    """
    given = {key: value for key, value in arguments.items() if key != "image_size"}
    side = arguments.get("image_size")
    backbone = _build_other(architecture, given, weights_file, False, side)
    if side:
        backbone.preprocess = dataclasses.replace(backbone.preprocess, image_size=(side, side))
    _set_drop_path(backbone, 0.0)
    backbone.model.eval()
    backbone.num_features = _check_forward(backbone)
    return backbone


def build_classifier(architecture: str, arguments: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Return the untrained timm network with a classifier of `num_classes`, in eval mode.

    Raises:
        BackboneError: timm has no such architecture, or does not take the arguments.
    """
    return _create(architecture, architecture, num_classes=num_classes, **arguments).eval()


def classifier_name(model: nn.Module) -> str | None:
    """Return the name of a timm network's classifier where it is one linear layer on the pooled vector.

    "Is" means measured: `model(x)` equals `classifier(headless(x))` on a random image, where `headless` is
    the model after `reset_classifier(0)`. Only then can a linear head be stored in it exactly.
    """
    import copy

    getter: Any = getattr(model, "get_classifier", None)
    classifier = getter() if getter else None
    if not isinstance(classifier, nn.Linear):
        return None
    name = next((key for key, module in model.named_modules() if module is classifier), None)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    headless: Any = copy.deepcopy(model).eval()
    headless.reset_classifier(0)
    mode = model.training
    model.eval()
    image = torch.rand((1, *size), generator=torch.Generator().manual_seed(INIT_SEED))
    traits = getattr(model, "_traits", {})
    if traits.get("img_size"):
        image = image[:, :, :1, :1].expand(1, size[0], *traits["img_size"]).contiguous()
    with torch.inference_mode():
        try:
            same = torch.allclose(model(image), classifier(headless(image)), rtol=1e-4, atol=1e-5)
        except RuntimeError:  # the pooled features are not what this layer takes
            same = False
    model.train(mode)
    return name if same else None


def timm_config(
    backbone: Backbone, num_classes: int, class_names: list[str] | tuple[str, ...]
) -> dict[str, Any]:
    """Return `config.json` for a network tuned from `backbone`, in timm's format.

    With `model.safetensors` beside it, `timm.create_model("local-dir:DIR", pretrained=True)` builds the
    network with its arguments, and `timm.data.resolve_model_data_config` gives the same preprocessing.

    Args:
        backbone: Of timm; it cannot build torchvision's and the classic ones.
        num_classes: Size of the classifier; 0 for a headless network.
        class_names: In order of the classifier's outputs; empty for none.

    Raises:
        BackboneError: The backbone is not timm's.
    """
    if not backbone.is_timm:
        raise BackboneError(f"{backbone.name} is not timm's; timm's format cannot describe it.")
    gone = {
        "architecture",
        "label_names",
        "label_descriptions",
        "label_offset",
        "test_input_size",
        "test_crop_pct",
    }
    gone |= {"test_pool_size", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}
    cfg = {key: value for key, value in backbone.pretrained_cfg.items() if key not in gone}
    chosen = backbone.preprocess
    if tuple(cfg.get("input_size", ())[1:]) != chosen.image_size:
        cfg["pool_size"] = None
    cfg |= {
        "input_size": [3, *chosen.image_size],
        "interpolation": chosen.interpolation,
        "crop_pct": chosen.crop_pct,
        "crop_mode": chosen.crop_mode,
        "mean": list(chosen.mean),
        "std": list(chosen.std),
        "num_classes": num_classes,
        "custom_load": False,
    }
    config: dict[str, Any] = {
        "architecture": backbone.architecture,
        "num_classes": num_classes,
        "num_features": backbone.num_features,
    }
    if class_names:
        config["label_names"] = list(class_names)
    config["pretrained_cfg"] = cfg
    if backbone.arguments:
        config["model_args"] = dict(backbone.arguments)
    return dict(json.loads(json.dumps(config)))


def state_sha256(module: nn.Module) -> str:
    """Return SHA-256 (hex) over name|dtype|shape|bytes of every parameter and buffer, sorted by name."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{shape}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- building --------------------------------------------------------------------------------------------


def _build_other(
    name: str, given: dict[str, Any], weights_file: str | None, random_init: bool, image_size: int | None
) -> Backbone:
    """Build a classic network, or one of torchvision, which takes no arguments."""
    if name.startswith("classic/"):
        from tlcli.backbones import classic

        parts = classic.build(
            name, given, weights_file=weights_file, random_init=random_init, image_size=image_size
        )
        return Backbone(name=name, architecture=name, num_features=0, source="classic", **parts)
    from tlcli.backbones import torchvision_zoo

    parts = torchvision_zoo.build(
        name, weights_file=weights_file, random_init=random_init, image_size=image_size
    )
    return Backbone(name=name, architecture=name, num_features=0, source="torchvision", **parts)


def _build_timm(
    name: str, spec: TimmSpec, options: BackboneOptions, given: dict[str, Any], drop_path: float
) -> Backbone:
    cfg = dict(spec.cfg)
    if odd := sorted(CALL_ARGUMENTS & spec.arguments.keys()):
        raise BackboneError(
            f"{name}: the model_args of its config.json set {odd[0]!r}, which is no argument of the network.",
            hint="Remove it from config.json where you trust the folder.",
        )
    preprocess = preprocess_of(cfg, name)
    spec = dataclasses.replace(spec, arguments=spec.arguments | given)
    arguments = dict(spec.arguments)
    if cfg.get("fixed_input_size") and not arguments.get("img_size"):
        arguments["img_size"] = list(cfg["input_size"][1:])
    source_arguments = dict(arguments)
    if options.image_size and (cfg.get("fixed_input_size") or arguments.get("img_size")):
        arguments["img_size"] = [options.image_size, options.image_size]
    rates = {"drop_path_rate": drop_path} if drop_path else {}
    if options.random_init or options.weights:
        model = _create(name, spec.architecture, num_classes=0, pretrained_cfg=cfg, **(arguments | rates))
        if options.weights:
            weights.load_weights(model, options.weights, name, _converter(model))
    else:
        model = _pretrained(name, spec, cfg, arguments | rates, source_arguments | rates)
    gone = ("state_dict", "file", "url", "source", "hf_hub_id", "hf_hub_filename")
    kept = {key: value for key, value in spec.cfg.items() if key not in gone}
    return Backbone(
        name=name,
        architecture=spec.architecture,
        model=model,
        preprocess=preprocess,
        num_features=0,
        arguments=arguments,
        license=cfg.get("license"),
        source=spec.source,
        pretrained_cfg=kept,
    )


def _pretrained(
    name: str, spec: TimmSpec, cfg: dict[str, Any], arguments: dict[str, Any], source: dict[str, Any]
) -> nn.Module:
    """Build a network and load its own weights through timm, strictly, then drop the classifier.

    timm loads leniently into a headless network, so that a file without one matching name would leave it
    random without a word. With the classifier of the weights in place it loads strictly.
    """
    if spec.find is None:
        known = ", ".join(timm.list_models(spec.architecture + "*", pretrained=True)[:5])
        raise BackboneError(
            f"timm has no pretrained weights for {name}.",
            hint=f"Known: {known or 'none'}; or give --weights FILE, or --random-init for a baseline.",
        )
    path = spec.find()
    located = {"url": None, "hf_hub_id": None, "hf_hub_filename": None, "source": None}
    builder = sys.modules["timm.models._builder"].build_model_with_cfg
    if source and arguments != source and "pretrained_model_args" in inspect.signature(builder).parameters:
        arguments = arguments | {"pretrained_model_args": source}
    if path.suffix == ".npz":  # original JAX weights, which only the architecture itself can read
        overlay = located | {"file": str(path), "custom_load": True}
    else:
        state = weights.read_state_dict(path)
        weights.check_plain(state, path)
        overlay = located | {"state_dict": state, "custom_load": False}
    try:
        model = _create(
            name,
            spec.architecture,
            pretrained=True,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay=overlay,
            **arguments,
        )
    except _LoadFailed as error:
        if path.suffix != ".npz":
            headless = _create(name, spec.architecture, num_classes=0, pretrained_cfg=cfg, **spec.arguments)
            weights.check_match(weights.match(state, headless), path, name)
        raise BackboneError(
            f"Weights {str(path)!r} do not fit {name}: {error}",
            hint="They want the arguments they were trained with; is one of --model-kwargs another?",
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    if path.suffix != ".npz":
        weights.check_kinds(state, model, path)
    if getattr(model, "num_classes", 0):
        model.reset_classifier(0)  # type: ignore[operator]
    weights.check_finite(model.state_dict(), path)
    return model


class _LoadFailed(Exception):
    """timm could not fit weights to a network."""


def _create(name: str, architecture: str, **arguments: Any) -> nn.Module:
    """Call `timm.create_model` under a fixed seed, with its failures as BackboneError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(INIT_SEED)
        try:
            model: nn.Module = timm.create_model(architecture, **arguments)
        except (RuntimeError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            if arguments.get("pretrained"):
                raise _LoadFailed(_first_line(error)) from error
            raise _refused(name, error, arguments) from error
        except (TypeError, ValueError, AssertionError, AttributeError) as error:
            raise _refused(name, error, arguments) from error
    return model.float()


def _refused(name: str, error: Exception, arguments: Mapping[str, Any]) -> BackboneError:
    size = arguments.get("img_size")
    hint = (
        "Leave --image-size out to use its own size." if size else "Check the arguments in its config.json."
    )
    at = f" for images of {size[0]} pixels" if size else ""
    return BackboneError(f"{name} cannot be built{at}: {_first_line(error)}", hint=hint)


def _blame(name: str, architecture: str, error: BackboneError, given: Mapping[str, Any]) -> Exception:
    """Return what to raise where a timm network was not built: a UsageError where an option is to blame."""
    cause = error.__cause__
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(cause))
    if found and found[2] == "drop_path_rate":
        return _no_drop_path(name)
    if found and found[2] in given:
        module = sys.modules[timm.model_entrypoint(architecture).__module__]
        kind = getattr(module, found[1], None)
        known = set(inspect.signature(kind).parameters) if kind else set()
        return unknown_argument(name, found[2], known - {"kwargs", "args"} - SETTLED - OWN_OPTIONS.keys())
    if given and isinstance(cause, RuntimeError | KeyError | TypeError | ValueError | AttributeError):
        return UsageError(
            f"{name} cannot be built with --model-kwargs "
            f"{','.join(f'{key}={value}' for key, value in given.items())}: {_first_line(cause)}",
            hint="The arguments are those of the network's class in timm; leave out what it does not take.",
        )
    return error


def _no_drop_path(name: str) -> UsageError:
    return UsageError(f"{name} has no drop-path.", hint="Leave --drop-path out; --dropout always works.")


def _set_drop_path(backbone: Backbone, rate: float) -> None:
    """Set the rates that no argument sets, so that 0 is none and torchvision's networks follow `rate`."""
    layers: list[Any] = [
        module
        for module in backbone.model.modules()
        if type(module).__name__ in {"DropPath", "StochasticDepth"}
    ]
    if rate and not layers:
        raise _no_drop_path(backbone.name)
    for place, layer in enumerate(layers):
        if type(layer).__name__ == "StochasticDepth":
            layer.p = rate * place / max(1, len(layers) - 1)
        elif not rate:
            layer.drop_prob = 0.0


def _converter(model: nn.Module) -> Callable[[weights.StateDict], weights.StateDict] | None:
    """Return timm's converter of foreign checkpoints for this architecture, where it has one."""
    module = importlib.import_module(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    return None if convert is None else lambda state: dict(convert(state, model))


def preprocess_of(cfg: Mapping[str, Any], name: str) -> Preprocess:
    """Return the evaluation transform that timm's configuration describes.

    Raises:
        BackboneError: The network takes no RGB images.
    """
    try:
        data = timm.data.resolve_data_config(pretrained_cfg=dict(cfg), use_test_size=False)
        channels, height, width = data["input_size"]
        values = {key: data[key] for key in ("crop_pct", "crop_mode", "mean", "std")}
    except (TypeError, ValueError, KeyError, AssertionError, AttributeError) as error:
        raise _no_transform(name, str(error)) from error
    if channels != 3:
        raise BackboneError(
            f"{name} takes images of {channels} channels; only RGB backbones can be used.", hint=LIST_HINT
        )
    known = data["interpolation"] if data["interpolation"] in INTERPOLATIONS else "bicubic"
    return stored_preprocess({"image_size": (height, width), "interpolation": known, **values}, name)


def stored_preprocess(values: Mapping[str, Any], name: str) -> Preprocess:
    """Return the evaluation transform that a file of any origin describes.

    Args:
        values: The fields of Preprocess.
        name: What the user called the backbone, for messages.

    Raises:
        BackboneError: A value is missing or unknown, or asks for what no transform can give, such as a crop
            so small that each image would be enlarged to gigabytes.
    """
    try:
        height, width = (int(value) for value in values["image_size"])
        (red, green, blue), (r, g, b) = (map(float, values[key]) for key in ("mean", "std"))
        found = Preprocess(**{
            **values, "image_size": (height, width), "crop_pct": float(values["crop_pct"]),
            "mean": (red, green, blue), "std": (r, g, b),
        })  # fmt: skip
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise _no_transform(name, str(error)) from error
    wrong = {
        f"images of {height}x{width} pixels": not all(
            SIZES[0] <= side <= SIZES[1] for side in (height, width)
        ),
        f"a crop of {found.crop_pct:g}": not CROPS[0] <= found.crop_pct <= CROPS[1],
        f"the crop mode {found.crop_mode!r}": found.crop_mode not in CROP_MODES,
        f"the interpolation {found.interpolation!r}": found.interpolation not in INTERPOLATIONS,
        f"the mean {list(found.mean)}": not all(map(math.isfinite, found.mean)),
        f"the deviation {list(found.std)}": not all(0 < value < math.inf for value in found.std),
    }
    if odd := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise _no_transform(name, f"it asks for {odd[0]}")
    return found


def _no_transform(name: str, why: str) -> BackboneError:
    return BackboneError(
        f"The configuration of {name} describes no transform of images: {why}.",
        hint="Its config.json is damaged or not timm's; get it again.",
    )


def _override(preprocess: Preprocess, options: BackboneOptions) -> Preprocess:
    changes: dict[str, Any] = {}
    if options.image_size:
        changes["image_size"] = (options.image_size, options.image_size)
    if options.crop_pct:
        changes["crop_pct"] = options.crop_pct
    if options.interpolation:
        changes["interpolation"] = options.interpolation
    return dataclasses.replace(preprocess, **changes)


def _check_forward(backbone: Backbone) -> int:
    """Run the network once and return D.

    Raises:
        BackboneError: It does not take images of this size, or gives no finite vector per image.
    """
    height, width = backbone.preprocess.image_size
    try:
        with torch.inference_mode():
            output = backbone.model(torch.zeros(1, 3, height, width))
    except Exception as error:  # architectures fail on odd sizes in many ways
        if is_out_of_memory(error):
            raise
        own = backbone.pretrained_cfg.get("input_size", (3, 0, 0))[1]
        raise BackboneError(
            f"{backbone.name} does not take images of {height}x{width} pixels: {_first_line(error)}",
            hint=f"Its own size is {own}; leave --image-size out, or use a multiple of 32." if own else None,
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or output.shape[0] != 1:
        shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise BackboneError(
            f"{backbone.name} gives {shape} for one image; a pooled vector [1, D] is expected.",
            hint=LIST_HINT,
        )
    return int(output.shape[1])


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
