"""The network that is trained: suffix, dropout, head, and side branches where the architecture has them.

It takes rows at the cut (images where nothing is frozen) and gives logits. Frozen parts, and BatchNorm that
keeps its statistics, stay in eval mode after every `train()`.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tlcli.backbones.initialise import BATCH_NORMS
from tlcli.backbones.side_branches import side_branches
from tlcli.config.head import HeadOptions
from tlcli.heads.head import Head
from tlcli.heads.linear import LinearHead
from tlcli.heads.mlp import ACTIVATIONS, MlpHead, initial_weight

SMALLEST_SCALE = -20.0  # the exponent
HEAD = "head."  # how names of the head's parameters begin; the suffix's keep the backbone's own names


class MlpClassifier(nn.Module):
    """Linear layers with an activation, optional batch norm and dropout between them.

    Args:
        sizes: Features, hidden units of each layer, classes.
        options: Activation, initialisation, batch norm and seed.
        dropout: Rate after each hidden layer.
    """

    def __init__(self, sizes: tuple[int, ...], options: HeadOptions, dropout: float) -> None:
        super().__init__()
        self.activation = options.activation
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        hidden = sizes[1:-1] if options.batch_norm else ()
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for size in hidden)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                activation = None if index == len(self.layers) - 1 else options.activation
                fan_in, fan_out = sizes[index], sizes[index + 1]
                weight = initial_weight(fan_in, fan_out, options.init, activation, (options.seed, index))
                layer.weight.copy_(weight.T)  # type: ignore[operator]
                layer.bias.zero_()  # type: ignore[operator]

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] of features [B, D]."""
        for index, layer in enumerate(self.layers):
            features = layer(features)
            if index == len(self.layers) - 1:
                break
            if len(self.norms):
                features = self.norms[index](features)
            features = self.dropout(ACTIVATIONS[self.activation](features))
        return features

    def head(self) -> MlpHead:
        """Return the trained head, batch norm folded into the layers."""
        weights, biases = [], []
        for index, layer in enumerate(self.layers):
            weight, bias = layer.weight.detach().cpu().clone(), layer.bias.detach().cpu().clone()  # type: ignore[operator]
            if index < len(self.norms):
                norm: Any = self.norms[index]
                scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().cpu()
                weight = weight * scale[:, None]
                bias = (bias - norm.running_mean.cpu()) * scale + norm.bias.detach().cpu()
            weights.append(weight)
            biases.append(bias)
        return MlpHead(tuple(weights), tuple(biases), self.activation)


class Network(nn.Module):
    """Suffix, dropout and head.

    Args:
        suffix: Rows [B, *row_shape] -> features [B, D]; from a cut.
        head: Features -> logits [B, C].
        dropout: Rate before a linear head.
        branches: Module name in the suffix -> side branch on what that module gives; used in training alone.

    Attributes:
        train_norm: Whether BatchNorm statistics of trained units follow the data in train mode.
    """

    def __init__(
        self,
        suffix: nn.Module,
        head: nn.Module,
        *,
        dropout: float = 0.0,
        branches: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.suffix = suffix
        self.head = head
        self.dropout = nn.Dropout(dropout)
        self.train_norm = True
        self.branch_names = tuple(branches or {})
        self.branches = nn.ModuleList((branches or {}).values())
        self._taps: dict[str, Tensor] = {}
        for name in self.branch_names:
            suffix.get_submodule(name).register_forward_hook(self._tap(name))

    def _tap(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if self.training:
                self._taps[name] = output

        return keep

    def forward(self, rows: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits [B, C]; in train mode with side branches those of every branch after them."""
        self._taps.clear()
        features = self.suffix(rows)
        logits: Tensor = self.head(self.dropout(features))
        if not self.training or not self.branch_names:
            return logits
        branches = zip(self.branch_names, self.branches, strict=True)
        return (logits, *(branch(self._taps[name]) for name, branch in branches))

    def train(self, mode: bool = True) -> "Network":
        """Switch to `mode`; what is frozen stays in eval mode."""
        super().train(mode)
        if mode and not self.train_norm:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> Iterator[nn.Module]:
        return (module for module in self.suffix.modules() if isinstance(module, BATCH_NORMS))

    def norm_statistics(self) -> list[Tensor]:
        """Return the BatchNorm statistics that follow the data, to be changed in place."""
        norms = [norm for norm in self.modules() if isinstance(norm, BATCH_NORMS) and norm.training]
        return [
            value for norm in norms for name, value in norm.named_buffers(recurse=False)
            if value.is_floating_point()
        ]  # fmt: skip

    @property
    def has_batch_norm(self) -> bool:
        """Return whether trained units hold batch normalisation."""
        return any(parameter.requires_grad for norm in self._norms() for parameter in norm.parameters())

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return [module for module in self.head.modules() if isinstance(module, nn.Linear)][-1].out_features

    def backbone_names(self) -> dict[str, str]:
        """Return this network's name -> the backbone's own, of the suffix's parameters."""
        return {f"suffix.{name}": name for name, _ in self.suffix.named_parameters()}

    def scale_logits(self, factor: float) -> None:
        """Multiply the logits by a positive factor, which changes no answer."""
        last = [module for module in self.head.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():
            last.weight.mul_(factor)
            last.bias.mul_(factor)

    def trained_head(self) -> Head:
        """Return the head as `heads` has it, on the CPU."""
        if isinstance(self.head, MlpClassifier):
            return self.head.head()
        linear: Any = self.head
        return LinearHead(linear.weight.detach().cpu().clone(), linear.bias.detach().cpu().clone(), False)


def make_network(
    suffix: nn.Module,
    num_features: int,
    num_classes: int,
    options: HeadOptions,
    *,
    dropout: float,
    start: Head | None = None,
    full: bool = False,
) -> Network:
    """Return the network to train.

    Args:
        suffix: From a cut, on the CPU.
        num_features: Width of what the suffix gives.
        num_classes: Number of classes.
        options: The head's shape, initialisation and seed.
        dropout: Rate before a linear head, or after each hidden layer.
        start: A head fitted on the frozen features, to start from; a random one otherwise.
        full: Whether the suffix is the whole backbone, so that side branches can be attached.
    """
    for name in getattr(suffix, "unused_names", ()):  # several processes would wait for their gradients
        value = operator.attrgetter(name)(suffix)
        if isinstance(value, nn.Parameter):
            value.requires_grad_(False)
    hidden = options.hidden_sizes
    if hidden:
        mlp = MlpClassifier((num_features, *hidden, num_classes), options, dropout)
        if isinstance(start, MlpHead):
            _load_mlp(mlp, start)
        head: nn.Module = mlp
    else:
        head = nn.Linear(num_features, num_classes)
        with torch.no_grad():
            if isinstance(start, LinearHead) and not start.normalise:
                head.weight.copy_(start.weight)
                head.bias.copy_(start.bias)
            else:
                weight = initial_weight(num_features, num_classes, options.init, None, (options.seed, 0))
                head.weight.copy_(weight.T)
                head.bias.zero_()
    branches = {}
    if full:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            branches = {item.module_name: item.build(num_classes) for item in side_branches(suffix)}
    return Network(suffix, head, dropout=0.0 if hidden else dropout, branches=branches)


def smoothed_scale(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    """Return the factor of a head's logits at which the loss with label smoothing is smallest, in (0, 1].

    A probe is surer of the training images than smoothing allows. Left as it is, the first steps would only
    press its logits down, and bend the features to do so: of a probe on 150 images of steel that named 0.89
    of others rightly, 12 steps at a rate of 2.4e-4 left 0.63, and 0.87 without smoothing.

    Args:
        logits: fp32 [N, C] of the training images.
        labels: int64 [N].
        smoothing: In [0, 1).
    """
    if not smoothing:
        return 1.0

    from scipy.optimize import minimize_scalar

    def loss(exponent: float) -> float:
        return float(cross_entropy(math.exp(exponent) * logits, labels, label_smoothing=smoothing))

    found = minimize_scalar(loss, bounds=(SMALLEST_SCALE, 0.0), method="bounded")
    return 1.0 if loss(0.0) <= found.fun else math.exp(found.x)


def _load_mlp(module: MlpClassifier, head: MlpHead) -> None:
    """Start from a fitted MLP, whose batch norm is folded into its layers."""
    module.norms = nn.ModuleList()
    with torch.no_grad():
        for layer, weight, bias in zip(module.layers, head.weights, head.biases, strict=True):
            layer.weight.copy_(weight)  # type: ignore[operator]
            layer.bias.copy_(bias)  # type: ignore[operator]


@contextmanager
def holding(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a network hold other weights, given by the names of its state, inside the block."""
    own = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(values)
    try:
        yield
    finally:
        network.load_state_dict(own)


@contextmanager
def fp32_where_bf16_is_slow(network: nn.Module) -> Iterator[None]:
    """Let depthwise convolutions with a stride compute in fp32 under autocast on a CPU.

    Their backward pass in bf16 has no fast kernel there: in a MobileNetV2 at 128 pixels two of 34 layers took
    200 of the 285 ms that all convolutions took backwards, and 12 ms in fp32.
    """
    slow = [
        module for module in network.modules()
        if isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels > 1
        and max(module.stride) > 1
    ]  # fmt: skip

    def forward(module: nn.Conv2d, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            result: Tensor = type(module).forward(module, inputs.float())
            return result

    for module in slow:
        module.forward = functools.partial(forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in slow:
            del module.forward
