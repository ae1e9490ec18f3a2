"""Building timm's networks, with weights or without, and describing them in timm's format."""

import copy
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from tlcli.backbones import foreign, weights
from tlcli.backbones.backbone import INIT_SEED, Backbone, no_drop_path
from tlcli.backbones.image_sizes import ImageSizeError
from tlcli.backbones.initialise import BATCH_NORMS, varied
from tlcli.backbones.misfit import check_match
from tlcli.backbones.preprocessing import preprocess_of
from tlcli.backbones.specs import TimmSpec
from tlcli.backbones.weights_file import StateDict, read_state_dict
from tlcli.config.backbone import BackboneOptions
from tlcli.config.model_kwargs import OWN_OPTIONS, SETTLED, unknown_argument
from tlcli.errors import BackboneError, UsageError
from tlcli.machine.memory import is_out_of_memory
from tlcli.wording import first_line

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


def build_classifier(architecture: str, arguments: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Return the untrained timm network with a classifier of `num_classes`, in eval mode.

    Raises:
        BackboneError: timm has no such architecture, or does not take the arguments.
    """
    return _create(architecture, architecture, num_classes=num_classes, **arguments).eval()


def classifier_name(model: nn.Module) -> str | None:
    """Return the name of the linear layer that is a timm network's classifier of the pooled vector.

    "Is" means measured: `model(x)` equals `classifier(headless(x))` on a random image, where `headless` is
    the model after `reset_classifier(0)`. Only then can a linear head be stored in it exactly. The model's
    values are varied first, since a fresh batch norm before the classifier would change nothing.
    """
    getter: Any = getattr(model, "get_classifier", None)
    classifier = getter() if getter else None
    if not isinstance(classifier, nn.Module):
        return None
    layers = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    name = next((key for key, module in model.named_modules() if [module] == layers), None)
    if name is None:
        return None
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    model = varied(model).eval()
    classifier = model.get_submodule(name)
    headless: Any = copy.deepcopy(model).eval()
    headless.reset_classifier(0)
    silence_norms(model, headless)
    image = torch.rand((1, *size), generator=torch.Generator().manual_seed(INIT_SEED))
    traits_of = getattr(timm.models, "get_model_traits", None)  # timm 1.0.20 has none
    traits = traits_of(model) if traits_of else {}
    if traits.get("img_size"):
        image = image[:, :, :1, :1].expand(1, size[0], *traits["img_size"]).contiguous()
    with torch.no_grad():
        try:
            same = torch.allclose(model(image), classifier(headless(image)), rtol=1e-4, atol=1e-5)
        except RuntimeError:  # the pooled features are not what this layer takes
            same = False
    return name if same else None


def silence_norms(model: nn.Module, headless: nn.Module) -> StateDict:
    """Let the batch norms that only `model` has, as before its classifier, change nothing.

    Returns:
        Their state, by the names of `model`.
    """
    kept = {name for name, _ in headless.named_modules()}
    state: StateDict = {}
    for name, module in model.named_modules():
        if name not in kept and isinstance(module, BATCH_NORMS):
            values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - module.eps}
            for key, tensor in module.state_dict().items():
                tensor.fill_(values.get(key, 0))
                state[f"{name}.{key}"] = tensor
    return state


def timm_config(
    backbone: Backbone, num_classes: int, class_names: list[str] | tuple[str, ...]
) -> dict[str, Any]:
    """Return `config.json` for a network trained from `backbone`, in timm's format.

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


def build(
    name: str, spec: TimmSpec, options: BackboneOptions, given: dict[str, Any], drop_path: float
) -> Backbone:
    """Return the backbone of a timm architecture, its transform not yet the user's.

    Args:
        name: As the user wrote it.
        spec: What the name stands for.
        options: Weights, image size.
        given: Arguments of --model-kwargs.
        drop_path: Drop-path rate.

    Raises:
        BackboneError: The weights cannot be found, loaded or trusted, or the network cannot be built.
    """
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
    if options.height_width and (cfg.get("fixed_input_size") or arguments.get("img_size")):
        arguments["img_size"] = list(options.height_width)
    rates = {"drop_path_rate": drop_path} if drop_path else {}
    if options.random_init or options.weights:
        model = _create(name, spec.architecture, num_classes=0, pretrained_cfg=cfg, **(arguments | rates))
        if options.weights:
            ways = foreign.conversions(model, spec.architecture, options.weights)
            weights.load_weights(model, options.weights, name, ways, options.weights_key)
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
        origin=spec.origin,
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
        state = read_state_dict(path)
        weights.check_plain(state, path)
        overlay = located | {"state_dict": state, "custom_load": False}

    def headless() -> nn.Module:
        return _create(name, spec.architecture, num_classes=0, pretrained_cfg=cfg, **spec.arguments)

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
            check_match(weights.match(state, headless()), path, name)
        raise BackboneError(
            f"Weights {str(path)!r} do not fit {name}: {error}",
            hint="They want the arguments they were trained with; is one of --model-kwargs another?",
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    if path.suffix != ".npz":
        weights.check_kinds(state, model, path)
    if getattr(model, "num_classes", 0):
        model.reset_classifier(0)  # type: ignore[operator]
    weights.check_finite(model.state_dict(), path, lambda: headless().state_dict())
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
                raise _LoadFailed(first_line(error)) from error
            raise _refused(name, error, arguments) from error
        except (TypeError, ValueError, AssertionError, AttributeError) as error:
            raise _refused(name, error, arguments) from error
    return model.float()


def _refused(name: str, error: Exception, arguments: Mapping[str, Any]) -> BackboneError:
    if size := arguments.get("img_size"):
        at = f"for images of {size[0]}x{size[1]} pixels"
        return ImageSizeError(f"{name} cannot be built {at}: {first_line(error)}")
    return BackboneError(
        f"{name} cannot be built: {first_line(error)}", hint="Check the arguments in its config.json."
    )


def build_error(name: str, architecture: str, error: BackboneError, given: Mapping[str, Any]) -> Exception:
    """Return what to raise where a timm network was not built: a UsageError where an option is to blame."""
    cause = error.__cause__
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(cause))
    if found and found[2] == "drop_path_rate":
        return no_drop_path(name)
    if found and found[2] in given:
        module = sys.modules[timm.model_entrypoint(architecture).__module__]
        kind = getattr(module, found[1], None)
        known = set(inspect.signature(kind).parameters) if kind else set()
        return unknown_argument(name, found[2], known - {"kwargs", "args"} - SETTLED - OWN_OPTIONS.keys())
    if given and isinstance(cause, RuntimeError | KeyError | TypeError | ValueError | AttributeError):
        return UsageError(
            f"{name} cannot be built with --model-kwargs "
            f"{','.join(f'{key}={value}' for key, value in given.items())}: {first_line(cause)}",
            hint="The arguments are those of the network's class in timm; leave out what it does not take.",
        )
    return error
