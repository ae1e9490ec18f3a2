"""Many small networks trained side by side: the grid of MLP heads.

P networks of the same shape are one stack of tensors with a leading dimension of P, so that a layer of all of
them is one batched product. They see the same rows in the same order and draw the same initial weights and
dropout noise (thresholded at each network's own rate), all functions of (seed, epoch): a network comes out
the same alone or in any company. A fold is a mask of rows; networks that stopped improving leave the stack.

Each layer is linear -> batch norm (optional) -> activation -> dropout. What is saved is a plain MLP on raw
features: standardisation of the input and batch norm are folded into the layers' weights.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlcli.config.head import HeadOptions
from tlcli.progress import Progress

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": functional.elu,
    "relu": functional.relu,
    "leaky-relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
BETAS = (0.9, 0.999)  # Adam's
EPSILON = 1e-8
NORM_EPSILON = 1e-5
NORM_MOMENTUM = 0.1
MIN_GAIN = 1e-4  # smallest drop of the held-out log loss that counts as an improvement


@dataclass(frozen=True)
class MlpHead:
    """A multi-layer perceptron that applies to raw features.

    Attributes:
        weights: One fp32 [out, in] a layer.
        biases: One fp32 [out] a layer.
        activation: Between layers; a name of ACTIVATIONS.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: str

    def logits(self, features: Tensor) -> Tensor:
        """Return the fp32 logits [N, C] of raw features [N, D]."""
        value = features.to(self.weights[0])
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            value = functional.linear(value, weight, bias)
            if layer < len(self.weights) - 1:
                value = ACTIVATIONS[self.activation](value)
        return value

    def shifted(self, values: Tensor) -> "MlpHead":
        """Return the head whose logits are larger by `values`, fp32 [C]."""
        return dataclasses.replace(self, biases=(*self.biases[:-1], self.biases[-1] + values))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save."""
        state = {f"layers.{index}.weight": weight for index, weight in enumerate(self.weights)}
        return state | {f"layers.{index}.bias": bias for index, bias in enumerate(self.biases)}

    def document(self) -> dict[str, object]:
        """Return what is needed beside `state` to rebuild the head; plain values."""
        return {"kind": "mlp", "activation": self.activation, "num_layers": len(self.weights)}

    @classmethod
    def load(cls, facts: Mapping[str, Any], state: Mapping[str, Tensor]) -> "MlpHead":
        """Return the head that `facts` and `state` describe.

        Raises:
            KeyError: A fact or a tensor is missing.
        """
        layers = range(int(facts["num_layers"]))
        weights = tuple(state[f"layers.{index}.weight"].float() for index in layers)
        biases = tuple(state[f"layers.{index}.bias"].float() for index in layers)
        return cls(weights, biases, str(facts["activation"]))


@dataclass(frozen=True)
class TrainingRows:
    """The rows networks train on; features may stay on the CPU, all else is where the networks are.

    Attributes:
        features: fp32 [N, D], raw.
        labels: int64 [N].
        targets: fp32 [C, N], each column a distribution over the classes.
        row_weights: fp32 [N].
        folds: int64 [N]; -1 always trains.
    """

    features: Tensor
    labels: Tensor
    targets: Tensor
    row_weights: Tensor
    folds: Tensor


@dataclass(frozen=True)
class Grid:
    """Hyperparameters of P networks, fp32 [P] each; `fold` int64 [P] is held out (-2: nothing is)."""

    lr: Tensor
    l2: Tensor
    dropout: Tensor
    fold: Tensor

    def __len__(self) -> int:
        return len(self.lr)

    def take(self, index: Tensor | slice) -> "Grid":
        """Return the networks at `index`."""
        return Grid(self.lr[index], self.l2[index], self.dropout[index], self.fold[index])


@dataclass(frozen=True)
class TrainedStack:
    """What training gave, for P networks.

    Attributes:
        best_epoch: int64 [P], from 1; the epoch of the smallest held-out log loss, else the last.
        log_loss: fp32 [P, N] at the best epoch; only a network's held-out rows mean anything.
        correct: bool [P, N], likewise.
        train_loss: fp32 [E, P], NaN after a network has stopped.
        held_out_loss: fp32 [E, P], likewise.
        heads: The networks after the last epoch, on the CPU; only when nothing was held out.
    """

    best_epoch: Tensor
    log_loss: Tensor
    correct: Tensor
    train_loss: Tensor
    held_out_loss: Tensor
    heads: tuple[MlpHead, ...]


def train_mlps(
    rows: TrainingRows, grid: Grid, options: HeadOptions, *, epochs: int, progress: Progress
) -> TrainedStack:
    """Train the networks of a grid side by side, in as few stacks as memory allows.

    Networks that hold out a fold stop once its log loss has not improved for `patience` epochs.

    Args:
        rows: What to train on.
        grid: The networks.
        options: Shape, regularisation, batch size and seed.
        epochs: Most epochs.
        progress: Advanced by one for every network finished.
    """
    device = rows.labels.device
    sizes = (rows.features.shape[1], *options.hidden_sizes, len(rows.targets))
    weights = sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(sizes))
    batch = min(options.mlp_grid().batch_size, len(rows.labels))
    each = 4 * (8 * weights + 8 * batch * sum(sizes[1:]) + 4 * len(rows.labels))
    budget = 1 << 30
    if device.type == "cuda":
        budget = int(0.4 * torch.cuda.mem_get_info(device)[0])
    at_once = max(1, budget // each)
    parts = []
    for first in range(0, len(grid), at_once):
        stack = _Stack(rows, grid.take(slice(first, first + at_once)), options, sizes)
        parts.append(stack.train(epochs, progress))
    return TrainedStack(
        torch.cat([part.best_epoch for part in parts]),
        torch.cat([part.log_loss for part in parts]),
        torch.cat([part.correct for part in parts]),
        torch.cat([part.train_loss for part in parts], 1),
        torch.cat([part.held_out_loss for part in parts], 1),
        tuple(head for part in parts for head in part.heads),
    )


def _generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator that is a function of `key` alone."""
    seed = 0
    for part in key:  # a 63-bit mix; the constants are Knuth's MMIX generator
        seed = (seed * 6364136223846793005 + part + 1442695040888963407) % (1 << 63)
    return torch.Generator(device).manual_seed(seed)


def initial_weight(
    fan_in: int, fan_out: int, init: str, activation: str | None, key: tuple[int, int]
) -> Tensor:
    """Return fp32 [fan_in, fan_out] drawn from a normal distribution.

    Args:
        fan_in: Inputs of the layer.
        fan_out: Units of the layer.
        init: "he" (variance 2 / fan_in, a little less for a leaky ReLU), "xavier" (2 / (fan_in + fan_out)) or
            "normal" (1).
        activation: What follows; None for the last layer, whose variance "he" takes as 1 / fan_in.
        key: (seed, layer).
    """
    gain = 1.0 if activation is None else 2.0 / (1 + 0.01**2) if activation == "leaky-relu" else 2.0
    variance = {"xavier": 2.0 / (fan_in + fan_out), "normal": 1.0}.get(init, gain / fan_in)
    return torch.randn(fan_in, fan_out, generator=_generator(torch.device("cpu"), *key)) * math.sqrt(variance)


class _Stack:
    """P networks of one shape in training.

    A layer holds `weight` [P, in, out] and `bias` [P, 1, out], and with batch norm `scale`, `shift` and the
    running `mean` and `variance`, each [P, 1, out].
    """

    def __init__(self, rows: TrainingRows, grid: Grid, options: HeadOptions, sizes: tuple[int, ...]) -> None:
        self.rows, self.grid, self.options = rows, grid, options
        self.device = rows.labels.device
        self.activation = ACTIVATIONS[options.activation]
        self.settings = options.mlp_grid()
        self.centre = rows.features.mean(0)
        deviation = rows.features.std(0, correction=0)
        constant = deviation <= 1e-6 * self.centre.abs()
        self.divisor = torch.where(constant, torch.ones_like(deviation), deviation)
        self.last = len(sizes) - 2
        self.parameters: list[dict[str, Tensor]] = []
        self.running: list[dict[str, Tensor]] = []
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            activation = None if layer == self.last else options.activation
            weight = initial_weight(fan_in, fan_out, options.init, activation, (options.seed, layer))
            values = {"weight": weight, "bias": torch.zeros(1, fan_out)}
            running = {}
            if options.batch_norm and layer < self.last:
                values |= {"scale": torch.ones(1, fan_out), "shift": torch.zeros(1, fan_out)}
                running = {"mean": torch.zeros(1, fan_out), "variance": torch.ones(1, fan_out)}
            self.parameters.append({name: self._repeat(value) for name, value in values.items()})
            self.running.append({name: self._repeat(value) for name, value in running.items()})
        zeros = [
            {name: torch.zeros_like(value) for name, value in layer.items()} for layer in self.parameters
        ]
        self.moments = (zeros, [{name: value.clone() for name, value in layer.items()} for layer in zeros])
        self.steps = 0

    def _repeat(self, value: Tensor) -> Tensor:
        """Return a copy of `value` for every network, on the device."""
        return value.to(self.device).expand(len(self.grid), *value.shape).clone()

    def train(self, epochs: int, progress: Progress) -> TrainedStack:
        """Train for at most `epochs` epochs."""
        count, num_rows = len(self.grid), len(self.rows.labels)
        holds_out = bool((self.grid.fold >= 0).any())
        place = torch.arange(count, device=self.device)
        best_loss = torch.full((count,), math.inf, device=self.device)
        best_epoch = torch.full((count,), epochs, device=self.device)
        log_loss = torch.zeros(count, num_rows, device=self.device)
        correct = torch.zeros(count, num_rows, dtype=torch.bool, device=self.device)
        curves = torch.full((2, epochs, count), math.nan, device=self.device)
        for epoch in range(1, epochs + 1):
            curves[0, epoch - 1, place] = self._epoch(epoch)
            if not holds_out:
                continue
            row_loss, row_correct = self._evaluate()
            held = self.rows.folds[None] == self.grid.fold[:, None]
            loss = (row_loss * held).sum(1) / held.sum(1).clamp_min(1)
            curves[1, epoch - 1, place] = loss
            better = loss < best_loss[place] - MIN_GAIN
            best_loss[place[better]] = loss[better]
            best_epoch[place[better]] = epoch
            log_loss[place[better]] = row_loss[better]
            correct[place[better]] = row_correct[better]
            # A network that diverged (NaN) never improves, and leaves like the others.
            stop = epoch - best_epoch[place] >= self.settings.patience
            stop |= best_loss[place].isinf() & (epoch >= self.settings.patience)
            if bool(stop.any()):
                progress.advance(int(stop.sum()))
                keep = torch.nonzero(~stop)[:, 0]
                place = place[keep]
                if not len(keep):
                    break
                self._keep(keep)
        progress.advance(len(place))
        log_loss[best_loss.isinf()] = math.inf
        heads = () if holds_out else tuple(self._head(index) for index in range(count))
        return TrainedStack(best_epoch, log_loss, correct, curves[0], curves[1], heads)

    def _keep(self, index: Tensor) -> None:
        """Keep only the networks at `index`."""
        self.grid = self.grid.take(index)
        for layers in (self.parameters, self.running, *self.moments):
            for layer in layers:
                for name in layer:
                    layer[name] = layer[name][index]

    # ---- forward ------------------------------------------------------------------------------------------

    def _inputs(self, index: Tensor | slice) -> Tensor:
        """Return standardised features of some rows on the device."""
        if isinstance(index, Tensor):
            index = index.to(self.rows.features.device)
        return ((self.rows.features[index] - self.centre) / self.divisor).to(self.device)

    def _forward(self, value: Tensor, mask: Tensor | None, noise: torch.Generator | None) -> Tensor:
        """Return logits [P, B, C] of inputs [B, D].

        Args:
            value: Standardised features.
            mask: fp32 [P, B], 1 where the row trains the network; None evaluates.
            noise: Source of dropout; None evaluates.
        """
        for number, layer in enumerate(self.parameters):
            value = torch.matmul(value, layer["weight"]) + layer["bias"]
            if number == self.last:
                break
            if self.options.batch_norm:
                value = self._normalise(value, number, mask)
            value = self.activation(value)
            if noise is not None and bool(self.grid.dropout.any()):
                rate = self.grid.dropout[:, None, None]
                drawn = torch.rand(value.shape[1:], generator=noise, device=self.device)
                value = value * (drawn >= rate) / (1.0 - rate)
        return value

    def _normalise(self, value: Tensor, number: int, mask: Tensor | None) -> Tensor:
        """Batch-normalise [P, B, H] by the rows that train each network, or by running statistics."""
        layer, running = self.parameters[number], self.running[number]
        if mask is None:
            mean, variance = running["mean"], running["variance"]
        else:
            share = (mask / mask.sum(1, keepdim=True).clamp_min(1))[:, None]  # [P, 1, B]
            mean = torch.bmm(share, value)
            variance = torch.bmm(share, (value - mean).square())
            # The first steps average evenly, so that nothing of the initial 0 and 1 remains.
            momentum = max(NORM_MOMENTUM, 1.0 / (self.steps + 1))
            running["mean"] = torch.lerp(running["mean"], mean.detach(), momentum)
            running["variance"] = torch.lerp(running["variance"], variance.detach(), momentum)
        return (value - mean) * torch.rsqrt(variance + NORM_EPSILON) * layer["scale"] + layer["shift"]

    @torch.no_grad()
    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """Return log loss fp32 [P, N] and whether top-1 is correct bool [P, N], of every row."""
        losses, hits = [], []
        for first in range(0, len(self.rows.labels), 1024):
            span = slice(first, first + 1024)
            logits = self._forward(self._inputs(span), None, None)
            labels = self.rows.labels[span].expand(len(logits), -1)
            losses.append(functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none"))
            hits.append(logits.argmax(2) == labels)
        return torch.cat(losses, 1).nan_to_num(math.inf), torch.cat(hits, 1)

    # ---- training -----------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> Tensor:
        """Train one epoch; return the mean training loss fp32 [P]."""
        num_rows = len(self.rows.labels)
        order = torch.randperm(
            num_rows, generator=_generator(torch.device("cpu"), self.options.seed, epoch, 1)
        ).to(self.device)
        noise = _generator(self.device, self.options.seed, epoch, 2)
        total = torch.zeros(len(self.grid), device=self.device)
        weight = torch.zeros_like(total)
        for index in order.split(self.settings.batch_size):  # type: ignore[no-untyped-call]
            mask = (self.rows.folds[index][None] != self.grid.fold[:, None]).float()
            row_weights = mask * self.rows.row_weights[index]
            loss = self._step(self._inputs(index), self.rows.targets[:, index].T, row_weights, mask, noise)
            amount = row_weights.sum(1)
            total += loss * amount
            weight += amount
        return total / weight.clamp_min(1e-12)

    def _step(
        self, inputs: Tensor, targets: Tensor, row_weights: Tensor, mask: Tensor, noise: torch.Generator
    ) -> Tensor:
        """Take one optimiser step on a batch; return its loss fp32 [P]."""
        leaves = [value.requires_grad_() for layer in self.parameters for value in layer.values()]
        logits = self._forward(inputs, mask, noise)
        row_loss = -(functional.log_softmax(logits, 2) * targets).sum(2)
        loss = (row_loss * row_weights).sum(1) / row_weights.sum(1).clamp_min(1e-12)
        gradients = iter(torch.autograd.grad(loss.sum(), leaves))
        for value in leaves:
            value.requires_grad_(False)
        self.steps += 1
        for number, layer in enumerate(self.parameters):
            for name in layer:
                self._update(number, name, next(gradients))
        return loss.detach()

    def _update(self, number: int, name: str, gradient: Tensor) -> None:
        """Apply Adam with decoupled l2, then the l1 proximal step and the max-norm constraint.

        The proximal step is taken in Adam's own metric, so that `l1` weighs against the mean loss: a weight
        rests at exactly 0 where the loss pulls at it with less than `l1`.
        """
        value = self.parameters[number][name]
        first, second = self.moments[0][number][name], self.moments[1][number][name]
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        size = self.grid.lr[:, None, None]
        if name == "weight":
            value *= 1.0 - size * self.grid.l2[:, None, None]
        spread = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPSILON)
        size = size / spread
        value -= size * first / (1 - BETAS[0] ** self.steps)
        if name != "weight":
            return
        if self.options.l1:
            value.copy_(value.sign() * (value.abs() - size * self.options.l1).clamp_min_(0.0))
        if self.options.max_norm and number < self.last:
            norms = torch.linalg.vector_norm(value, dim=1, keepdim=True)
            value *= (self.options.max_norm / norms.clamp_min(1e-12)).clamp_max(1.0)

    def _head(self, index: int) -> MlpHead:
        """Return one network as a plain MLP on raw features, on the CPU."""
        weights, biases = [], []
        for number, layer in enumerate(self.parameters):
            weight, bias = layer["weight"][index].double().cpu(), layer["bias"][index, 0].double().cpu()
            if "scale" in layer:
                running = {
                    name: value[index, 0].double().cpu() for name, value in self.running[number].items()
                }
                factor = layer["scale"][index, 0].double().cpu() / (running["variance"] + NORM_EPSILON).sqrt()
                weight = weight * factor
                bias = (bias - running["mean"]) * factor + layer["shift"][index, 0].double().cpu()
            if number == 0:
                weight = weight / self.divisor.double().cpu()[:, None]
                bias = bias - self.centre.double().cpu() @ weight
            weights.append(weight.T.float().contiguous())
            biases.append(bias.float())
        return MlpHead(tuple(weights), tuple(biases), self.options.activation)
