"""Two processes train what one trains: within TOLERANCE where nothing looks at the batch as a whole.

Sums of floating-point numbers in another order are all that differs then. BatchNorm that follows the data
normalises by the images of its own process, so there the weights differ; its statistics are those of both.
"""

import sys

import torch

from tests.machine.test_processes import torchrun
from tests.training.test_loop import Points, network, recipe, setting
from tlcli.errors import UsageError
from tlcli.machine import processes
from tlcli.training.loop import train

TOLERANCE = 1e-5
CASES = {
    "even": {"batch_size": 8},
    "uneven": {"batch_size": 7},
    "uneven passes": {"batch_size": 11, "grad_accum": 2},
    "weights": {"batch_size": 7, "class_weights": "balanced", "label_smoothing": 0.1},
    "balanced": {"batch_size": 9, "sampling": "balanced", "clip_grad": 0.5},
    "average": {"batch_size": 8, "ema": 0.9},
    "statistics": {"batch_size": 8, "norm": "train"},
    "statistics averaged": {"batch_size": 7, "norm": "train", "ema": 0.9},
}


def trained(options):
    """Return the state of a network that was trained, and its history without what time does to it."""
    net = network(dropout=0.0)
    net.suffix[3].p = 0.0
    fixed = {"epochs": 3, "norm": "frozen", "opt": "sgd", "lr": "0.05", "mixup": 0.0}
    done = train(net, recipe(**{**fixed, **options}), Points().samples(), Points(1).samples(), setting())
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in done.history]
    return net.state_dict(), rows


def main(path):
    """Train every case, and let the first process write what each gave."""
    found = {name: trained(options) for name, options in CASES.items()}
    try:  # one image, which one of two processes has none of
        train(network(), recipe(), Points(count=1).samples(), None, setting())
    except UsageError as error:
        found["one image"] = error.message
    if processes.world_size() > 1:
        found = processes.gather_objects(found)
    if processes.is_main():
        torch.save(found, path)


def test_two_processes_train_what_one_trains(tmp_path):
    done = torchrun(["-m", "tests.training.test_two_processes"], tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two.pt", weights_only=False)
    assert all("cannot be divided over 2 processes" in found["one image"] for found in two)
    for name, options in CASES.items():
        (state, rows), (other, other_rows) = two[0][name], two[1][name]
        assert all(torch.equal(value, other[key]) for key, value in state.items()), name
        assert rows == other_rows
        expected, expected_rows = trained(options)
        if options.get("norm") == "train":
            # Of the first layer's input, which no other statistics reach: means of equal parts are its mean.
            assert state["suffix.1.num_batches_tracked"] == expected["suffix.1.num_batches_tracked"]
            torch.testing.assert_close(
                state["suffix.1.running_mean"], expected["suffix.1.running_mean"], atol=0.05, rtol=0.1
            )
            assert abs(rows[-1]["val_log_loss"] - expected_rows[-1]["val_log_loss"]) < 0.1
            continue
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, atol=TOLERANCE, rtol=TOLERANCE, msg=f"{name} {key}")
        for row, wanted in zip(rows, expected_rows, strict=True):
            assert row["train_accuracy"] == wanted["train_accuracy"]
            assert abs(row["val_log_loss"] - wanted["val_log_loss"]) < TOLERANCE


if __name__ == "__main__":
    main(sys.argv[1])
