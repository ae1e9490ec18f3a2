"""One layer of many networks, with its gradient written out.

The layers of P networks of the same shape are one tensor with a leading dimension of P, so that a layer of
all of them is one batched product. A layer is linear -> batch norm (optional) -> activation -> dropout; the
last one of a network is linear alone. The gradient is written out rather than left to autograd: values are
overwritten where they lie, memory is used again, and the gradient of a network's inputs is not computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tlcli.heads.mlp import ACTIVATIONS

NORM_EPSILON = 1e-5
NORM_MOMENTUM = 0.1

# Gradients of ACTIVATIONS by (gradient of the result, argument, result).
_aten = torch.ops.aten
BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "elu": lambda gradient, _, result: _aten.elu_backward(gradient, 1.0, 1.0, 1.0, True, result),
    "relu": lambda gradient, _, result: _aten.threshold_backward(gradient, result, 0),
    "leaky-relu": lambda gradient, _, result: _aten.leaky_relu_backward(gradient, result, 0.01, True),
    "gelu": lambda gradient, argument, _: _aten.gelu_backward(gradient, argument),
    "tanh": lambda gradient, _, result: _aten.tanh_backward(gradient, result),
    "sigmoid": lambda gradient, _, result: _aten.sigmoid_backward(gradient, result),
}
# Those whose gradient needs the result alone, so that it may take the argument's place.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda value: functional.elu(value, inplace=True),
    "relu": torch.relu_,
    "leaky-relu": lambda value: functional.leaky_relu(value, inplace=True),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


@dataclass
class _Kept:
    """What a forward pass keeps for the backward pass; [P, B, in] and [P, B, out].

    Attributes:
        inputs: The layer's inputs.
        unit: Normalised values, before scale and shift; with batch norm only.
        factor: fp32 [P, 1, out] that normalised values were multiplied by, likewise.
        argument: The activation's argument, the same memory as `result` where that is enough.
        result: The activation's result, before dropout.
        dropout: What dropout multiplied the result by; None without.
    """

    inputs: Tensor
    unit: Tensor | None = None
    factor: Tensor | None = None
    argument: Tensor | None = None
    result: Tensor | None = None
    dropout: Tensor | None = None


class Layer:
    """One layer of P networks.

    Attributes:
        parameters: `weight` fp32 [P, out, in] and `bias` [P, out]; with batch norm, which takes any bias away
            again, `scale` and `shift` [P, out] instead of it.
        gradients: Of the loss with respect to each parameter, after `backward`.
        running: `mean` and `variance` [P, out] of batch norm; else empty.
    """

    def __init__(self, weight: Tensor, count: int, activation: str | None, batch_norm: bool) -> None:
        """Start `count` networks alike.

        Args:
            weight: fp32 [out, in] on the device.
            count: P.
            activation: A name of ACTIVATIONS; None for a last layer.
            batch_norm: Whether values are normalised over the batch.
        """
        zeros = weight.new_zeros(count, len(weight))
        self.activation, self.batch_norm = activation, batch_norm
        self.parameters = {"weight": weight.expand(count, -1, -1).contiguous()}
        self.running: dict[str, Tensor] = {}
        if batch_norm:
            self.parameters |= {"scale": torch.ones_like(zeros), "shift": zeros}
            self.running = {"mean": zeros.clone(), "variance": torch.ones_like(zeros)}
        else:
            self.parameters["bias"] = zeros
        self.gradients = {name: torch.empty_like(value) for name, value in self.parameters.items()}
        self._kept: _Kept | None = None

    def keep(self, index: Tensor) -> None:
        """Keep only the networks at `index`."""
        for tensors in (self.parameters, self.gradients, self.running):
            for name in tensors:
                tensors[name] = tensors[name][index]

    def _linear(self, inputs: Tensor) -> Tensor:
        """Return the weighted sums [P, B, out], plus the bias."""
        weight = self.parameters["weight"].transpose(1, 2)
        if self.batch_norm:
            return torch.bmm(inputs, weight)
        return torch.baddbmm(self.parameters["bias"][:, None], inputs, weight)

    def apply(self, inputs: Tensor) -> Tensor:
        """Return what the trained layer makes of fp32 [P, B, in]: [P, B, out]."""
        value = self._linear(inputs)
        if self.batch_norm:
            factor = self.parameters["scale"] * torch.rsqrt(self.running["variance"] + NORM_EPSILON)
            value -= self.running["mean"][:, None]
            value = torch.addcmul(self.parameters["shift"][:, None], value, factor[:, None])
        return value if self.activation is None else ACTIVATIONS[self.activation](value)

    def forward(self, inputs: Tensor, momentum: float, dropout: Tensor | None = None) -> Tensor:
        """Return [P, B, out] in training, and keep what `backward` needs.

        Args:
            inputs: fp32 [P, B, in]; may be an expanded view.
            momentum: Share of this batch in the running statistics.
            dropout: fp32 [P, B, out] that the results are multiplied by; None leaves them.
        """
        kept = self._kept = _Kept(inputs, dropout=dropout)
        value = self._linear(inputs)
        if self.batch_norm:
            value = self._normalise(value, kept, momentum)
        if self.activation is None:
            return value
        kept.argument = value
        in_place = IN_PLACE.get(self.activation)
        kept.result = in_place(value) if in_place else ACTIVATIONS[self.activation](value)
        return kept.result if dropout is None else kept.result * dropout

    def _normalise(self, value: Tensor, kept: _Kept, momentum: float) -> Tensor:
        """Return [P, B, out] batch-normalised; overwrites `value`."""
        if value.shape[1]:
            mean = value.mean(1)
            value -= mean[:, None]
            variance = value.square().mean(1)
            self.running["mean"].lerp_(mean, momentum)
            self.running["variance"].lerp_(variance, momentum)
            kept.factor = torch.rsqrt(variance + NORM_EPSILON)[:, None]
            value *= kept.factor
        kept.unit = value
        return torch.addcmul(self.parameters["shift"][:, None], value, self.parameters["scale"][:, None])

    def backward(self, gradient: Tensor) -> Tensor:
        """Fill `gradients` for the batch of the last `forward`; return the gradient of what was linear.

        Args:
            gradient: fp32 [P, B, out], of the loss with respect to the layer's results; overwritten.

        Returns:
            fp32 [P, B, out], of the loss with respect to the weighted sums; see `inputs_gradient`.
        """
        kept = self._kept
        assert kept is not None, "forward comes first"
        self._kept = None
        if self.activation is not None:
            assert kept.argument is not None
            assert kept.result is not None
            if kept.dropout is not None:
                gradient *= kept.dropout
            gradient = BACKWARD[self.activation](gradient, kept.argument, kept.result)
        if self.batch_norm:
            gradient = self._normalise_backward(gradient, kept)
        else:
            torch.sum(gradient, 1, out=self.gradients["bias"])
        torch.bmm(gradient.transpose(1, 2), kept.inputs, out=self.gradients["weight"])
        return gradient

    def inputs_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient [P, B, in] by the layer's inputs, of what `backward` returned [P, B, out]."""
        return torch.bmm(gradient, self.parameters["weight"])

    def _normalise_backward(self, gradient: Tensor, kept: _Kept) -> Tensor:
        """Return the gradient [P, B, out] by what was normalised; overwrites `gradient`."""
        unit = kept.unit
        assert unit is not None
        torch.sum(gradient, 1, out=self.gradients["shift"])
        torch.sum(gradient * unit, 1, out=self.gradients["scale"])
        if kept.factor is None:  # a batch without rows
            return gradient
        count = gradient.shape[1]
        gradient -= self.gradients["shift"][:, None] / count
        gradient.addcmul_(unit, self.gradients["scale"][:, None], value=-1.0 / count)
        return gradient.mul_(self.parameters["scale"][:, None] * kept.factor)


def loss_and_gradient(logits: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy fp32 [P] of each network and its gradient [P, B, C] by the logits.

    Args:
        logits: fp32 [P, B, C].
        targets: fp32 [B, C], each row a distribution over the classes.
        share: fp32 [B], what each row counts.
    """
    log_shares = functional.log_softmax(logits, 2)
    loss = -((log_shares * targets).sum(2) * share).sum(1)
    return loss, log_shares.exp_().sub_(targets).mul_(share[:, None])
