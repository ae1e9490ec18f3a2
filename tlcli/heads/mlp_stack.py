"""Many small networks trained side by side: the grid of MLP heads.

P networks of the same shape that hold out the same fold are one stack. They see the same rows in the same
order and draw the same initial weights and dropout noise (thresholded at each network's own rate), all
functions of (seed, epoch): a network comes out the same alone or in any company. A stack's batches
leave out the rows it holds out, and it evaluates no others; networks that stopped improving leave the stack.

Standardisation of the input and batch norm are folded into the saved layers' weights.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tlcli.config.head import HeadOptions
from tlcli.heads.mlp import MlpHead, initial_weight, keyed_generator
from tlcli.heads.mlp_layers import NORM_EPSILON, NORM_MOMENTUM, Layer, loss_and_gradient
from tlcli.progress import Progress

BETAS = (0.9, 0.999)  # Adam's
EPSILON = 1e-8
MIN_GAIN = 1e-4  # smallest drop of the held-out log loss that counts as an improvement
STACK_BYTES = 1 << 28  # of a stack on the CPU


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
        held_out_loss: fp32 [E, P], likewise; of rows as the classes weigh.
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
    """Train the networks of a grid in stacks that hold out one fold each.

    Networks that hold out a fold stop once its log loss has not improved for `patience` epochs.

    Args:
        rows: What to train on.
        grid: The networks.
        options: Shape, regularisation, batch size and seed.
        epochs: Most epochs.
        progress: Advanced by one for every network finished.
    """
    inputs = _Inputs(rows.features, rows.labels.device)
    sizes = (rows.features.shape[1], *options.hidden_sizes, len(rows.targets))
    at_once = _networks_at_once(sizes, rows, options.mlp_grid().batch_size)
    # Equal steps lie side by side, so that one call updates them.
    order = torch.arange(len(grid), device=grid.lr.device)
    for values in (grid.dropout, grid.l2, grid.lr, grid.fold):
        order = order[torch.argsort(values[order], stable=True)]
    folds = torch.unique_consecutive(grid.fold[order], return_counts=True)[1].tolist()
    parts = []
    for same_fold in order.split(folds):  # type: ignore[no-untyped-call]
        for places in same_fold.split(at_once):
            stack = _Stack(rows, inputs, grid.take(places), options, sizes)
            parts.append(stack.train(epochs, progress))
    back = torch.argsort(order)
    heads = [head for part in parts for head in part.heads]
    return TrainedStack(
        torch.cat([part.best_epoch for part in parts])[back],
        torch.cat([part.log_loss for part in parts])[back],
        torch.cat([part.correct for part in parts])[back],
        torch.cat([part.train_loss for part in parts], 1)[:, back],
        torch.cat([part.held_out_loss for part in parts], 1)[:, back],
        tuple(heads[place] for place in back.tolist()) if heads else (),
    )


def _networks_at_once(sizes: tuple[int, ...], rows: TrainingRows, batch_size: int) -> int:
    """Return how many networks one stack may have for its tensors to fit."""
    device = rows.labels.device
    weights = sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(sizes))
    batch = min(batch_size, len(rows.labels))
    each = 4 * (5 * weights + 8 * batch * sum(sizes[1:]) + 4 * len(rows.labels))
    budget = STACK_BYTES
    if device.type == "cuda":
        budget = int(0.4 * torch.cuda.mem_get_info(device)[0])
    return max(1, budget // each)


class _Inputs:
    """Features, standardised as they are asked for.

    Attributes:
        centre: fp32 [D], means of the features.
        divisor: fp32 [D], their standard deviations; 1 for a constant one.
    """

    def __init__(self, features: Tensor, device: torch.device) -> None:
        self.features, self.device = features, device
        self.centre = features.mean(0)
        deviation = features.std(0, correction=0)
        constant = deviation <= 1e-6 * self.centre.abs()
        self.divisor = torch.where(constant, torch.ones_like(deviation), deviation)

    def take(self, index: Tensor) -> Tensor:
        """Return fp32 [B, D] on the device, the rows at `index`, int64 [B]."""
        rows = self.features.index_select(0, index.to(self.features.device))
        return rows.sub_(self.centre).div_(self.divisor).to(self.device)


@dataclass(frozen=True)
class _Run:
    """Neighbours in a stack that take equal steps: what Adam reads and writes, one tensor a parameter.

    Attributes:
        lr: Learning rate.
        decay: Decoupled l2.
        tensors: Parameters, gradients, first and second moments; tensors of equal shapes.
    """

    lr: float
    decay: float
    tensors: tuple[list[Tensor], ...]


class _Stack:
    """P networks of one shape in training that hold out one fold."""

    def __init__(
        self,
        rows: TrainingRows,
        inputs: _Inputs,
        grid: Grid,
        options: HeadOptions,
        sizes: tuple[int, ...],
    ) -> None:
        self.rows, self.inputs, self.grid, self.options = rows, inputs, grid, options
        self.device = rows.labels.device
        self.settings = options.mlp_grid()
        self.trains = (rows.folds != grid.fold[0]).cpu()
        self.held = torch.nonzero(rows.folds == grid.fold[0])[:, 0]
        self.last = len(sizes) - 2
        self.layers = []
        for number, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            activation = None if number == self.last else options.activation
            weight = initial_weight(fan_in, fan_out, options.init, activation, (options.seed, number))
            normalised = options.batch_norm and number < self.last
            weight = weight.T.contiguous().to(self.device)
            self.layers.append(Layer(weight, len(grid), activation, normalised))
        self.first, self.second = (
            [
                {name: torch.zeros_like(value) for name, value in layer.parameters.items()}
                for layer in self.layers
            ]
            for _ in range(2)
        )
        self.steps = 0
        self._regroup()

    @torch.no_grad()
    def train(self, epochs: int, progress: Progress) -> TrainedStack:
        """Train for at most `epochs` epochs."""
        count, num_rows = len(self.grid), len(self.rows.labels)
        place = torch.arange(count, device=self.device)
        best_loss = torch.full((count,), math.inf, device=self.device)
        best_epoch = torch.full((count,), epochs, device=self.device)
        log_loss = torch.zeros(count, len(self.held), device=self.device)
        correct = torch.zeros(count, len(self.held), dtype=torch.bool, device=self.device)
        held_share = self.rows.row_weights[self.held]
        held_share = held_share / held_share.sum()
        curves = torch.full((2, epochs, count), math.nan, device=self.device)
        for epoch in range(1, epochs + 1):
            train_loss = self._epoch(epoch)
            curves[0, epoch - 1, place] = train_loss
            if not len(self.held):
                continue
            row_loss, row_correct = self._evaluate()
            loss = row_loss @ held_share
            curves[1, epoch - 1, place] = loss
            better = loss < best_loss[place] - MIN_GAIN
            best_loss[place[better]] = loss[better]
            best_epoch[place[better]] = epoch
            log_loss[place[better]] = row_loss[better]
            correct[place[better]] = row_correct[better]
            # A network that diverged (NaN) never recovers; one that never had a finite loss leaves in time.
            stop = (epoch - best_epoch[place] >= self.settings.patience) | train_loss.isnan()
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
        heads = () if len(self.held) else tuple(self._head(index) for index in range(count))
        return TrainedStack(
            best_epoch,
            torch.zeros(count, num_rows, device=self.device).index_copy_(1, self.held, log_loss),
            torch.zeros(count, num_rows, dtype=torch.bool, device=self.device).index_copy_(
                1, self.held, correct
            ),
            curves[0],
            curves[1],
            heads,
        )

    def _keep(self, index: Tensor) -> None:
        """Keep only the networks at `index`."""
        self.grid = self.grid.take(index)
        for layer in self.layers:
            layer.keep(index)
        for moments in (*self.first, *self.second):
            for name in moments:
                moments[name] = moments[name][index]
        self._regroup()

    def _regroup(self) -> None:
        """Work out anew what Adam updates at once: weights, which l2 shrinks, and all else."""
        self.drops = bool(self.grid.dropout.any())
        pairs = torch.stack([self.grid.lr, self.grid.l2], 1)
        values, counts = torch.unique_consecutive(pairs, return_counts=True, dim=0)
        self.runs: list[_Run] = []
        first = 0
        for (lr, l2), count in zip(values.tolist(), counts.tolist(), strict=True):
            span = slice(first, first + count)
            first += count
            for shrinks in (True, False):
                tensors: tuple[list[Tensor], ...] = ([], [], [], [])
                for layer, *moments in zip(self.layers, self.first, self.second, strict=True):
                    for name in layer.parameters:
                        if (name == "weight") == shrinks:
                            for part, source in zip(
                                tensors, (layer.parameters, layer.gradients, *moments), strict=True
                            ):
                                part.append(source[name][span])
                self.runs.append(_Run(lr, l2 if shrinks else 0.0, tensors))

    @torch.no_grad()
    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """Return log loss fp32 [P, H] and whether top-1 is correct bool [P, H] of the H held-out rows."""
        losses, hits = [], []
        for index in self.held.split(1024):  # type: ignore[no-untyped-call]
            value = self.inputs.take(index).expand(len(self.grid), -1, -1)
            for layer in self.layers:
                value = layer.apply(value)
            labels = self.rows.labels[index].expand(len(value), -1)
            losses.append(functional.cross_entropy(value.transpose(1, 2), labels, reduction="none"))
            hits.append(value.argmax(2) == labels)
        return torch.cat(losses, 1).nan_to_num(math.inf), torch.cat(hits, 1)

    # ---- training -----------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> Tensor:
        """Train one epoch; return the mean training loss fp32 [P]."""
        generator = keyed_generator(torch.device("cpu"), self.options.seed, epoch, 1)
        order = torch.randperm(len(self.trains), generator=generator)
        noise = keyed_generator(self.device, self.options.seed, epoch, 2)
        total = torch.zeros(len(self.grid), device=self.device)
        weight = torch.zeros_like(total)
        for batch in order.split(self.settings.batch_size):  # type: ignore[no-untyped-call]
            kept = torch.nonzero(self.trains[batch])[:, 0]
            index = batch[kept]
            dropout = self._dropout(len(batch), kept.to(self.device), noise)
            row_weights = self.rows.row_weights[index.to(self.device)]
            loss = self._step(index, row_weights, dropout)
            amount = row_weights.sum()
            total += loss * amount
            weight += amount
        return total / weight.clamp_min(1e-12)

    def _dropout(self, num_rows: int, kept: Tensor, noise: torch.Generator) -> list[Tensor | None]:
        """Return what each layer's results are multiplied by, fp32 [P, B, out]; None for nothing.

        Args:
            num_rows: Rows of the whole batch; the noise of a row does not depend on what a stack holds out.
            kept: int64 [B], those of them that train.
            noise: Source.
        """
        dropout: list[Tensor | None] = [None] * len(self.layers)
        if self.drops:
            rate = self.grid.dropout[:, None, None]
            for number, width in enumerate(self.options.hidden_sizes):
                drawn = torch.rand(num_rows, width, generator=noise, device=self.device)[kept]
                dropout[number] = (drawn >= rate) / (1.0 - rate)
        return dropout

    def _step(self, index: Tensor, row_weights: Tensor, dropout: list[Tensor | None]) -> Tensor:
        """Take one optimiser step on the rows at `index`, int64 [B] on the CPU; return the loss fp32 [P]."""
        # The first steps average evenly, so that nothing of the initial 0 and 1 remains.
        momentum = max(NORM_MOMENTUM, 1.0 / (self.steps + 1))
        value = self.inputs.take(index).expand(len(self.grid), -1, -1)
        for layer, factor in zip(self.layers, dropout, strict=True):
            value = layer.forward(value, momentum, factor)
        share = row_weights / row_weights.sum().clamp_min(1e-12)
        loss, gradient = loss_and_gradient(value, self.rows.targets[:, index.to(self.device)].T, share)
        for number in range(self.last, -1, -1):
            gradient = self.layers[number].backward(gradient)
            if number > 0:
                gradient = self.layers[number].inputs_gradient(gradient)
        self._update()
        return loss

    def _update(self) -> None:
        """Apply Adam with decoupled l2, then the l1 proximal step and the max-norm constraint."""
        self.steps += 1
        step = torch.tensor(float(self.steps), device=self.device)
        for run in self.runs:
            parameters, gradients, first, second = run.tensors
            torch._fused_adamw_(
                parameters, gradients, first, second, [], [step] * len(parameters),
                lr=run.lr, beta1=BETAS[0], beta2=BETAS[1], weight_decay=run.decay, eps=EPSILON,
                amsgrad=False, maximize=False,
            )  # fmt: skip
        if self.options.l1:
            self._pull_to_zero()
        if self.options.max_norm:
            for layer in self.layers[:-1]:
                weight = layer.parameters["weight"]
                norms = torch.linalg.vector_norm(weight, dim=2, keepdim=True)
                weight *= (self.options.max_norm / norms.clamp_min(1e-12)).clamp_max(1.0)

    def _pull_to_zero(self) -> None:
        """Take the l1 proximal step in Adam's own metric.

        So `l1` weighs against the mean loss: a weight rests at exactly 0 where the loss pulls at it with less
        than `l1`.
        """
        for layer, second in zip(self.layers, self.second, strict=True):
            weight = layer.parameters["weight"]
            spread = (second["weight"] / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPSILON)
            bound = (self.grid.lr[:, None, None] * self.options.l1) / spread
            weight.copy_(weight.sign() * (weight.abs() - bound).clamp_min_(0.0))

    def _head(self, index: int) -> MlpHead:
        """Return one network as a plain MLP on raw features, on the CPU."""
        weights, biases = [], []
        for number, layer in enumerate(self.layers):
            own = {name: value[index].double().cpu() for name, value in layer.parameters.items()}
            weight = own["weight"]
            if layer.batch_norm:
                mean, variance = (layer.running[name][index].double().cpu() for name in ("mean", "variance"))
                factor = own["scale"] / (variance + NORM_EPSILON).sqrt()
                weight, bias = weight * factor[:, None], own["shift"] - mean * factor
            else:
                bias = own["bias"]
            if number == 0:
                weight = weight / self.inputs.divisor.double().cpu()
                bias = bias - weight @ self.inputs.centre.double().cpu()
            weights.append(weight.float().contiguous())
            biases.append(bias.float())
        return MlpHead(tuple(weights), tuple(biases), self.options.activation)
