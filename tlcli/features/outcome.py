"""What became of the images whose features were wanted: reused, computed, skipped."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlcli.data.collection import Collection
from tlcli.data.image_files import BadImage
from tlcli.data.listing import spreadsheet_cell
from tlcli.machine import files


@dataclass
class Outcome:
    """What became of the images of a data set; a row is one view of an image.

    Attributes:
        rows_reused: Rows wanted that were there already.
        rows_computed: Rows computed now; copies of one image share theirs.
        bad_images: Images skipped, each with its reason.
        entry_key: Key of the plain cache entry; None with --cache never.
        seconds: Time the missing rows took.
        largest_difference: With --cache verify, the largest relative difference to a stored row.
        differing: With --cache verify, names of images whose stored row is not what was recomputed.
    """

    rows_reused: int = 0
    rows_computed: int = 0
    bad_images: list[BadImage] = field(default_factory=list)
    entry_key: str | None = None
    seconds: float = 0.0
    largest_difference: float = 0.0
    differing: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return the counts for --json."""
        return {
            "rows_reused": self.rows_reused,
            "rows_computed": self.rows_computed,
            "images_skipped": len(self.bad_images),
            "cache_key": self.entry_key,
            "seconds": round(self.seconds, 3),
        }

    def summary(self) -> str:
        """Return the counts for people."""
        rate = f" at {self.rows_computed / self.seconds:,.0f} rows/s" if self.rows_computed else ""
        return (
            f"reused {self.rows_reused:,}, computed {self.rows_computed:,}{rate}, "
            f"skipped {len(self.bad_images):,}"
        )

    def usable(self, collection: Collection) -> Collection:
        """Return the images of a collection that were not skipped."""
        bad = {image.name for image in self.bad_images}
        return collection.select([i for i, sample in enumerate(collection.samples) if sample.name not in bad])


def write_bad_images(path: Path, bad_images: Sequence[BadImage]) -> None:
    """Write the skipped images as CSV: file (as `spreadsheet_cell` has it), reason.

    Raises:
        StorageError: The disk refuses.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "reason"])
    writer.writerows((spreadsheet_cell(image.name), image.reason) for image in bad_images)
    with files.storage_errors("write", path, hint=files.OUTPUT_HINT):
        files.publish(path, [table.getvalue().encode("utf-8", "surrogateescape")])
