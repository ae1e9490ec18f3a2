"""Where the training loop's inputs come from: rows of the cache, or images decoded and augmented as it goes.

Inputs are asked for a few samples of an epoch and answer with what the network takes. The answer is a
function of (samples, epoch) alone, whoever asks, in whichever thread and after whichever restart.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from tlcli.backbones.memory_format import in_memory_format
from tlcli.data.dataset import Sample
from tlcli.data.decode import decode
from tlcli.data.image_files import DecodeError, read_bytes
from tlcli.errors import DataError
from tlcli.features.earlier import EarlierRows
from tlcli.features.extractor import Extractor


def random_seed(*parts: object) -> int:
    """Return a 63-bit seed that is a function of `parts`, equal on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by `parts`."""
    return torch.Generator().manual_seed(random_seed(*parts))


READ_AHEAD_BYTES = 16 << 20  # of files, in each of the threads that load
PLAIN = -1
"""The epoch that stands for evaluation: every sample's plain view."""


class Inputs(Protocol):
    """Gives the network's inputs."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def load(self, indices: Sequence[int], epoch: int, turn: Callable[[], object], /) -> Tensor:
        """Return what can be prepared beside training, on the CPU; called in threads.

        What needs the cores that training computes on calls `turn` before each small piece of work.
        """

    def finish(self, loaded: Tensor) -> Tensor:
        """Return the network's inputs on its device, in its memory format; called by the training loop."""


def view_of(sha256: str, epoch: int, num_views: int | None, seed: int) -> int:
    """Return the view of an image that an epoch sees.

    Each `num_views` epochs see each view of an image once, in an order of its own. Without a number every
    epoch has a view of its own.

    Args:
        sha256: The image's content.
        epoch: From 0, or PLAIN.
        num_views: How many views there are, the plain one among them.
        seed: Of the training.
    """
    if epoch == PLAIN or num_views == 1:
        return 0
    if num_views is None:
        return epoch + 1
    cycle, place = divmod(epoch, num_views)
    order = sorted(
        range(num_views), key=lambda view: hashlib.sha256(f"{sha256}|{seed}|{cycle}|{view}".encode()).digest()
    )
    return order[place]


class RowInputs:
    """Cached rows.

    Args:
        read: (positions of samples, their views) -> rows [n, *row_shape], float32 or bfloat16.
        keys: SHA-256 of each sample.
        num_views: How many views are cached.
        seed: Of the training, decides which view an epoch sees.
        device: Where the network is.
        channels_last: The memory format of maps.
        earlier: Where the rows are kept, if that is before the cut.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int], Sequence[int]], Tensor],
        keys: Sequence[str],
        *,
        num_views: int,
        seed: int,
        device: torch.device,
        channels_last: bool = True,
        earlier: EarlierRows | None = None,
    ) -> None:
        self.read, self.keys, self.channels_last, self.earlier = read, keys, channels_last, earlier
        self.num_views, self.seed, self.device = num_views, seed, device

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, indices: Sequence[int], epoch: int, turn: Callable[[], object]) -> Tensor:
        """Return rows on the CPU; reading needs little of it, and may have to wait for the disk."""
        views = [view_of(self.keys[index], epoch, self.num_views, self.seed) for index in indices]
        rows = self.read(indices, views)
        if self.earlier and self.device.type == "cpu":
            return self._at_cut(self.earlier, rows, turn)
        return rows.pin_memory() if self.device.type == "cuda" else rows

    def _at_cut(self, earlier: EarlierRows, rows: Tensor, turn: Callable[[], object]) -> Tensor:
        found = []
        for part in torch.split(rows, earlier.at_cut.batch_size):
            turn()
            found.append(earlier.rows_at_cut(part))
        return torch.cat(found)

    def finish(self, loaded: Tensor) -> Tensor:
        """Return the rows on the device, float32."""
        rows = loaded.to(self.device, non_blocking=True)
        if self.earlier and self.device.type != "cpu":
            rows = self._at_cut(self.earlier, rows, lambda: None)
        return in_memory_format(rows.float(), self.channels_last)


class ImageInputs:
    """Images, decoded and augmented now, through the frozen prefix where there is one.

    Args:
        extractor: Transform and prefix.
        samples: The images.
        keys: SHA-256 of each.
        num_views: As in `view_of`.
        seed: As in `view_of`.
        channels_last: The memory format of maps and images.
    """

    def __init__(
        self,
        extractor: Extractor,
        samples: Sequence[Sample],
        keys: Sequence[str],
        *,
        num_views: int | None,
        seed: int,
        channels_last: bool = True,
    ) -> None:
        self.extractor, self.samples, self.keys = extractor, samples, keys
        self.channels_last = channels_last
        self.num_views, self.seed = num_views, seed
        self.on_cpu = extractor.device.type == "cpu"

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, indices: Sequence[int], epoch: int, turn: Callable[[], object]) -> Tensor:
        """Return images uint8 [n, 3, h, w]; on a CPU already the prefix's rows.

        Raises:
            DataError: An image that was good when training was planned no longer is.
        """
        images = []
        for index, content in self._contents(indices):
            if self.on_cpu:
                turn()
            images.append(self._view(index, content, epoch))
        if self.on_cpu:
            turn()
        batch = torch.stack(images)
        if self.on_cpu and self.extractor.cut.num_frozen_units:
            return self._rows(batch)
        return batch.pin_memory() if self.extractor.device.type == "cuda" else batch

    def _contents(self, indices: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield each index and its file, read ahead of what asks for it: the disk need not take turns."""
        ahead: deque[tuple[int, bytes]] = deque()
        for index in indices:
            try:
                ahead.append((index, read_bytes(self.samples[index].path)))
            except DecodeError as error:
                raise self._lost(index, error) from error
            while sum(len(content) for _, content in ahead) > READ_AHEAD_BYTES:
                yield ahead.popleft()
        yield from ahead

    def _view(self, index: int, content: bytes, epoch: int) -> Tensor:
        key = hashlib.sha256(content).hexdigest()
        try:
            image = decode(content)
        except DecodeError as error:
            raise self._lost(index, error) from error
        if key != self.keys[index]:
            path = self.samples[index].path
            raise DataError(f"{path} has changed since training began.", hint="Start again.")
        return self.extractor.view(image, key, view_of(key, epoch, self.num_views, self.seed))

    def _lost(self, index: int, error: DecodeError) -> DataError:
        return DataError(
            f"{self.samples[index].path} can no longer be used: {error.reason}.",
            hint="Put the image back, or start again without it.",
        )

    def finish(self, loaded: Tensor) -> Tensor:
        """Return the network's inputs on the device, float32."""
        if self.extractor.cut.num_frozen_units == 0:
            found = self.extractor.normalise(loaded)
        else:
            found = (loaded if self.on_cpu else self._rows(loaded)).float()
        return in_memory_format(found, self.channels_last)

    def _rows(self, images: Tensor) -> Tensor:
        parts = torch.split(images, self.extractor.batch_size)
        # On a GPU rows are not bit-identical anyway, and the padding of a small batch would cost its work.
        return torch.cat([self.extractor.rows(part, pad=self.on_cpu) for part in parts])


@contextmanager
def loading(
    inputs: Inputs, batches: Sequence[Sequence[int]], epoch: int, *, workers: int
) -> Iterator[Iterator[Tensor]]:
    """Give the loaded batches of an epoch in order, prepared ahead by threads.

    Work that calls its `turn` goes on only while a batch is waited for. On a CPU training computes on all
    cores, and its threads wait for each other thousands of times a step: one that has lost its core to a
    decoder stops them all, and both together take longer than one after the other.

    Args:
        inputs: Where they come from.
        batches: Positions of the samples of each batch.
        epoch: From 0, or PLAIN.
        workers: Threads.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "tlcli-loading", torch.set_num_threads, (1,))
    waiting: deque[Future[Tensor]] = deque()
    turn = threading.Event()

    def stream() -> Iterator[Tensor]:
        for batch in batches:
            waiting.append(pool.submit(inputs.load, batch, epoch, turn.wait))
            if len(waiting) > 2 * workers:
                yield _take()
        while waiting:
            yield _take()

    def _take() -> Tensor:
        turn.set()
        loaded = waiting.popleft().result()
        turn.clear()
        # A new thread's own setting also sets MKL's, which is everybody's.
        torch.set_num_threads(threads)
        return loaded

    try:
        yield stream()
    finally:
        turn.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
