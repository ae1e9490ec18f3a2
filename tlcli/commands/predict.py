"""Name the classes of images with a finished run, in a stream."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tlcli.config.commands import PredictConfig
from tlcli.data.dataset import Sample
from tlcli.data.folders import find_images
from tlcli.errors import DataError, UsageError
from tlcli.runs.parts import network_extractor
from tlcli.runs.run import Run, open_run


@dataclass(frozen=True)
class Prediction:
    """The classes of one image.

    Attributes:
        file: The image as it was named.
        classes: Class name and probability, the most probable first; empty for a bad image.
        error: Why the image could not be used, or None.
    """

    file: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


class Predictor:
    """A finished run, ready to name classes.

    Args:
        run: From `open_run`.
        device: Name of a device.
        dtype: Compute type: auto (as in training, part by part), fp32 or bf16.

    Raises:
        BackboneError: The run's network is missing or damaged.
        DeviceError: The device is not there.
    """

    def __init__(self, run: Run, *, device: str = "auto", dtype: str = "auto") -> None:
        self.class_names = run.class_names
        self.extractor = network_extractor(run, device=device, dtype=dtype)
        self._head = run.head()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [n, C] of uint8 images [n, 3, h, w] at the network's size, on the CPU."""
        rows = [
            self.extractor.rows(part).float().cpu() for part in torch.split(images, self.extractor.batch_size)
        ]
        return self._head.logits(torch.cat(rows))

    def predict(self, samples: Iterable[Sample], *, top: int = 1, workers: int = 1) -> Iterator[Prediction]:
        """Yield the prediction of each image, in order; a bad image gives one with an error.

        Args:
            samples: Images; taken a few at a time, so that an endless stream is answered as it comes.
            top: Classes listed for each image.
            workers: Threads.
        """
        top = min(top, len(self.class_names))
        iterator = iter(samples)
        chunk_size = self.extractor.batch_size * workers
        while chunk := list(itertools.islice(iterator, chunk_size)):
            found: dict[str, Prediction] = {}
            for batch in self.extractor.compute(chunk, workers):
                for bad in batch.bad_images:
                    found[bad.name] = Prediction(bad.name, error=bad.reason)
                rows = batch.rows()
                if rows is None:
                    continue
                probabilities = self._head.logits(rows.float()).softmax(1)
                values, classes = probabilities.topk(top, dim=1)
                for (_, name), row, labels in zip(batch.keys, values.tolist(), classes.tolist(), strict=True):
                    ranked = zip(labels, row, strict=True)
                    found[name] = Prediction(name, tuple((self.class_names[i], value) for i, value in ranked))
            yield from (found[sample.name] for sample in chunk)


def predict(config: PredictConfig, lines: Iterable[str] = ()) -> Iterator[Prediction]:
    """Yield the predictions that `config` asks for.

    Args:
        config: The run and the images.
        lines: Paths, one a line, that stand for an image named `-`.

    Raises:
        UsageError: No run or no image was named.
        DataError: The run cannot be used, or no image could be.
    """
    run = open_run(config.run)
    if not config.images:
        raise UsageError(
            "IMAGES are missing.", hint="Name files or folders, or - for paths on standard input."
        )
    predictor = Predictor(run, device=config.device, dtype=config.dtype)
    workers = config.num_workers
    count = 0
    good = False
    for prediction in predictor.predict(_samples(config.images, lines), top=config.top, workers=workers):
        count += 1
        good = good or prediction.error is None
        yield prediction
    if not good:
        raise DataError(
            f"None of {count} images could be used." if count else "There are no images.",
            hint="`tlcli data check` says what is wrong with a folder of images.",
        )


def _samples(images: Iterable[str], lines: Iterable[str]) -> Iterator[Sample]:
    for image in images:
        if image == "-":
            yield from (Sample(path, path) for line in lines if (path := line.rstrip("\r\n")))
        else:
            yield from find_images([image])
