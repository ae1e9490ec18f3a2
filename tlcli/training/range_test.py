"""A learning rate found before training, by raising it until the loss no longer falls."""

import copy
import math

from torch import Tensor

from tlcli.errors import UsageError
from tlcli.machine import processes
from tlcli.training.inputs import Inputs, loading
from tlcli.training.stepper import Stepper

STEPS = 80
RATES = (1e-6, 1.0)
DIVISOR = 10  # the rate of the smallest loss is too large already (Smith 2017)
WORSE = 4  # times the smallest loss: further steps would show nothing


def find_rate(
    stepper: Stepper, inputs: Inputs, labels: Tensor, batches: list[list[int]], *, workers: int
) -> float:
    """Return a learning rate: a tenth of that where the loss is smallest while the rate rises.

    Smith 2017, "Cyclical learning rates", section 3.3. Network and optimiser are put back.

    Args:
        stepper: Before its first step.
        inputs: Of the training samples.
        labels: int64 [N] of them.
        batches: Positions of samples, STEPS batches.
        workers: Threads that load.
    """
    network = {name: value.clone() for name, value in stepper.network.state_dict().items()}
    optimizer = copy.deepcopy(stepper.optimizer.state_dict())
    low, high = RATES
    rates = [low * (high / low) ** (number / (STEPS - 1)) for number in range(STEPS)]
    recipe, world = stepper.recipe, processes.world_size()
    stepper.start_epoch(train_norm=recipe.norm == "train" and recipe.head_init != "probe")
    losses: list[float] = []
    smooth = 0.0
    with loading(inputs, batches, 0, workers=workers) as stream:
        for number, (rate, batch, loaded) in enumerate(zip(rates, batches, stream, strict=True), start=1):
            wanted = labels[batch].to(stepper.device)
            try:
                stepper.step(inputs.finish(loaded), wanted, rate, 0)
                loss = stepper.read()
            except UsageError:
                loss = math.inf
            if world > 1:
                loss = sum(processes.gather_objects(loss)) / world
            smooth = 0.9 * smooth + 0.1 * loss  # as Smith smooths it, and freed of its start at 0
            losses.append(smooth / (1 - 0.9**number))
            if not math.isfinite(loss) or losses[-1] > WORSE * min(losses):
                break
    stepper.network.load_state_dict(network)
    stepper.optimizer.load_state_dict(optimizer)
    stepper.sums.zero_()
    best = min(range(len(losses)), key=lambda place: losses[place])
    return float(rates[best]) / DIVISOR
