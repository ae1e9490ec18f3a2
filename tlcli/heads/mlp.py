"""The head that is a multi-layer perceptron, and how its layers are initialised.

What is saved is a plain MLP on raw features. How many of them are trained side by side is in mlp_stack.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": functional.elu,
    "relu": functional.relu,
    "leaky-relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


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

    def rescaled(self, factor: float) -> "MlpHead":
        """Return the head that gives features the logits of this one for `factor` times the features."""
        return dataclasses.replace(self, weights=(self.weights[0] * factor, *self.weights[1:]))

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


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
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
    return torch.randn(fan_in, fan_out, generator=keyed_generator(torch.device("cpu"), *key)) * math.sqrt(
        variance
    )
