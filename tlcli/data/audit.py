"""What is wrong, or only odd, with a data set: every image is read, hashed and decoded once.

An *error* would poison training: the command that audits exits with 3. A *warning* deserves a look. A *note*
says by which policy something was handled.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tlcli.data.dataset import Dataset, Sample
from tlcli.data.decode import decode, inspect
from tlcli.data.image_files import BadImage, DecodeError, ImageFacts, read_bytes
from tlcli.data.split import Fingerprint, digest, map_threads
from tlcli.errors import DataError
from tlcli.progress import Progress
from tlcli.warned import Warned

SPLITS = ("train", "val", "test")
CODES_OF = {"unreadable": "images_skipped", "blank": "blank_images"}  # where a code is no finding's kind
IMBALANCE = 10  # times as many images in the largest class as in the smallest
ODD_SHARE = 0.01  # formats of at most this share of the images are odd ...
USUAL_SHARE = 0.9  # ... where another format has at least this share
ODD_AREA_FACTOR = 16  # pixels, against the median
ODD_ASPECT_FACTOR = 4  # width / height, against the median
ODD_DEVIATIONS = 6  # and this many robust standard deviations, so that varied sets do not complain
TINY_SIDE = 16  # pixels


@dataclass(frozen=True, slots=True)
class Examined:
    """What one image turned out to be.

    Attributes:
        fingerprint: Its content; without a hash when it could not be read.
        facts: What its header says, or None when it is bad.
        reason: Why it cannot be used, or None.
        blank: Every value in it is the same.
    """

    fingerprint: Fingerprint
    facts: ImageFacts | None
    reason: str | None
    blank: bool = False


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Attributes:
        severity: "error" would poison training, "warning" deserves a look, "note" is information.
        kind: A fixed word, such as "leakage".
        message: A sentence for the user.
        items: The images or classes it is about, all of them, quoted and safe to print.
        code: Of a warning, where it does not follow from `kind`.
    """

    severity: Literal["error", "warning", "note"]
    kind: str
    message: str
    items: tuple[str, ...] = ()
    code: str = ""

    @property
    def warned(self) -> Warned:
        """Return a warning as it stands in every document."""
        return Warned(self.code or CODES_OF.get(self.kind, self.kind.replace("-", "_")), self.message)


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        num_images: Images listed, bad ones included.
        num_bytes: Their size together.
        counts: Class -> split -> number of usable images.
        formats: Format -> number of usable images.
        bad: Images that cannot be used.
        findings: Errors first, then warnings, then notes.
    """

    num_images: int
    num_bytes: int
    counts: Mapping[str, Mapping[str, int]]
    formats: Mapping[str, int]
    bad: tuple[BadImage, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        """The findings that would poison training."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Warned]:
        """The findings that deserve a look."""
        return [finding.warned for finding in self.findings if finding.severity == "warning"]

    def document(self) -> dict[str, Any]:
        """Return the audit as JSON-able values."""
        return {
            "warnings": [warning.document() for warning in self.warnings],
            "num_images": self.num_images,
            "num_bytes": self.num_bytes,
            "classes": [{"name": name, **counts} for name, counts in self.counts.items()],
            "formats": dict(self.formats),
            "bad_images": [{"name": bad.name, "reason": bad.reason} for bad in self.bad],
            "findings": [
                {
                    "severity": finding.severity,
                    "kind": finding.kind,
                    "message": finding.message,
                    "items": list(finding.items),
                }
                for finding in self.findings
            ],
        }


@dataclass(frozen=True, slots=True)
class _Usable:
    """A usable image with all that is known of it."""

    sample: Sample
    label: str
    split: str
    sha256: str
    facts: ImageFacts
    blank: bool

    def __str__(self) -> str:
        return f"{self.sample.name!r} ({self.label!r}, {self.split})"


def examine(samples: Sequence[Sample], workers: int, progress: Progress) -> list[Examined]:
    """Return what every image is, in order: each is read once, hashed and fully decoded.

    Args:
        samples: What to read.
        workers: Number of threads; torch's own should be set to one meanwhile.
        progress: Told of every image.
    """
    return list(map_threads(examine_one, samples, workers, "checking", progress))


def audit(
    dataset: Dataset,
    examined: Sequence[Examined],
    splits: Sequence[str],
    *,
    max_bad: float,
    min_per_class: int,
) -> Audit:
    """Return everything worth telling of a data set.

    Args:
        dataset: The data set.
        examined: One a sample, in order.
        splits: One a sample, as `assign_splits` gives them.
        max_bad: Share of unusable images above which they are an error.
        min_per_class: Fewest training images of a class that pass without a warning.
    """
    usable: list[_Usable] = []
    bad: list[BadImage] = []
    for sample, found, split in zip(dataset.samples, examined, splits, strict=True):
        if found.facts is None or found.fingerprint.sha256 is None or sample.label is None:
            bad.append(BadImage(sample.name, sample.path, found.reason or "no label"))
        else:
            label = dataset.class_names[sample.label]
            sha256 = found.fingerprint.sha256
            usable.append(_Usable(sample, label, split, sha256, found.facts, found.blank))
    counts = {name: dict.fromkeys(SPLITS, 0) for name in dataset.class_names}
    for image in usable:
        counts[image.label][image.split] += 1
    findings = [
        *(Finding("warning", "scan", warning.message, code=warning.code) for warning in dataset.warnings),
        *_unusable(bad, len(dataset.samples), max_bad),
        *_copies(usable),
        *_divided_groups(usable),
        *_class_sizes(counts, min_per_class),
        *_odd_formats(usable),
        *_odd_sizes(usable),
        *_odd_contents(usable),
        *_policies(usable),
        *_ignored(dataset),
    ]
    order = {"error": 0, "warning": 1, "note": 2}
    return Audit(
        num_images=len(dataset.samples),
        num_bytes=sum(found.fingerprint.num_bytes for found in examined),
        counts=counts,
        formats=dict(Counter(image.facts.format for image in usable).most_common()),
        bad=tuple(bad),
        findings=tuple(sorted(findings, key=lambda finding: order[finding.severity])),
    )


def require_usable(
    dataset: Dataset, splits: Sequence[str], bad: Sequence[BadImage], *, max_bad: float, to_train: bool = True
) -> None:
    """Stop before using what is left of a data set after bad images were skipped.

    Args:
        dataset: The data set.
        splits: One a sample.
        bad: The images that could not be used.
        max_bad: Share of bad images above which this is an error.
        to_train: Whether every class needs a usable training image.

    Raises:
        DataError: Too many images are bad, or a class has no usable training image left.
    """
    skipped = {image.name for image in bad}
    trained = {
        sample.label
        for sample, split in zip(dataset.samples, splits, strict=True)
        if split == "train" and sample.name not in skipped
    }
    lost = [name for index, name in enumerate(dataset.class_names) if index not in trained]
    share = len(bad) / max(1, len(dataset.samples))
    lost = lost if to_train else []
    if share <= max_bad and not lost:
        return
    if share > max_bad:
        problem = (
            f"{_count(len(bad), 'image')} of {len(dataset.samples)} ({share:.1%}) cannot be used, "
            f"at most {max_bad:.1%} may"
        )
    else:
        problem = f"No usable training image is left of {', '.join(repr(name) for name in lost[:10])}"
    shown = "".join(f"\n  {image.name!r}: {image.reason}" for image in bad[:10])
    more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    raise DataError(
        f"{problem}{':' if bad else '.'}{shown}{more}",
        hint="Repair or remove them; `tlcli data check` lists all. --max-bad sets the share that is allowed.",
    )


def examine_one(sample: Sample) -> Examined:
    """Return what one image is."""
    try:
        data = read_bytes(sample.path)
    except DecodeError as error:
        return Examined(Fingerprint(None, 0, error.reason), None, error.reason)
    content = digest(data)
    try:
        facts = inspect(data)
        image = decode(data)
    except DecodeError as error:
        return Examined(content, None, error.reason)
    return Examined(content, facts, None, blank=bool(image.amin() == image.amax()))


def _unusable(bad: Sequence[BadImage], total: int, max_bad: float) -> Iterable[Finding]:
    if bad:
        share = len(bad) / total
        above = share > max_bad
        yield Finding(
            "error" if above else "warning",
            "unreadable",
            f"{_count(len(bad), 'image')} of {total} ({share:.1%}) cannot be used; "
            + (f"at most {max_bad:.1%} may (--max-bad)." if above else "they will be skipped."),
            tuple(f"{image.name!r}: {image.reason}" for image in bad),
        )


def _copies(usable: Sequence[_Usable]) -> Iterable[Finding]:
    by_content: dict[str, list[_Usable]] = defaultdict(list)
    for image in usable:
        by_content[image.sha256].append(image)
    conflicting, leaking, plain = [], [], []
    for images in by_content.values():
        one_label = len({image.label for image in images}) == 1
        one_split = len({image.split for image in images}) == 1
        if not one_label:
            conflicting.append(images)
        if not one_split:
            leaking.append(images)
        if len(images) > 1 and one_label and one_split:
            plain.append(images)
    if conflicting:
        noun = _count(len(conflicting), "image")
        yield Finding("error", "conflicting-labels", f"{noun} in more than one class.", _groups(conflicting))
    if leaking:
        noun = _count(len(leaking), "image")
        text = f"{noun} in more than one split: what is measured on them is memory."
        yield Finding("error", "leakage", text, _groups(leaking))
    if plain:
        extra = sum(len(images) - 1 for images in plain)
        text = f"{_count(extra, 'exact copy', 'exact copies')} of other images of the same class and split."
        yield Finding("warning", "duplicates", text, _groups(plain))


def _groups(groups: Sequence[Sequence[_Usable]]) -> tuple[str, ...]:
    return tuple(" = ".join(map(str, images)) for images in groups)


def _divided_groups(usable: Sequence[_Usable]) -> Iterable[Finding]:
    splits: dict[str, set[str]] = defaultdict(set)
    for image in usable:
        if image.sample.group is not None:
            splits[image.sample.group].add(image.split)
    divided = tuple(
        f"{group!r} in {', '.join(sorted(found))}" for group, found in splits.items() if len(found) > 1
    )
    if divided:
        yield Finding(
            "error", "divided-groups", f"{_count(len(divided), 'group')} in more than one split.", divided
        )


def _class_sizes(counts: Mapping[str, Mapping[str, int]], min_per_class: int) -> Iterable[Finding]:
    lost = tuple(repr(name) for name, found in counts.items() if not found["train"])
    if lost:
        noun = _count(len(lost), "class", "classes")
        yield Finding("error", "class-lost", f"{noun} without a usable training image.", lost)
    sizes = {name: found["train"] for name, found in counts.items() if found["train"]}
    tiny = tuple(f"{name!r}: {size}" for name, size in sizes.items() if size < min_per_class)
    if tiny:
        noun = _count(len(tiny), "class", "classes")
        text = f"{noun} with fewer than {min_per_class} training images."
        yield Finding("warning", "tiny-class", text, tiny)
    if sizes and max(sizes.values()) > IMBALANCE * min(sizes.values()):
        large, small = (choose(sizes, key=lambda name: sizes[name]) for choose in (max, min))
        text = (
            f"Class {large!r} has {sizes[large]} training images, {small!r} {sizes[small]}: look at macro F1 "
            "beside accuracy, and try --class-weights balanced."
        )
        yield Finding("warning", "imbalance", text)
    absent = tuple(repr(name) for name, found in counts.items() if not found["val"])
    if absent:
        noun = _count(len(absent), "class", "classes")
        yield Finding(
            "warning", "missing-in-val", f"{noun} without a val image: val says nothing of it.", absent
        )


def _odd_formats(usable: Sequence[_Usable]) -> Iterable[Finding]:
    formats = Counter(image.facts.format for image in usable)
    if len(formats) < 2:
        return
    usual, count = formats.most_common(1)[0]
    if count < USUAL_SHARE * len(usable):
        return
    rare = {name for name, n in formats.items() if n <= max(1, ODD_SHARE * len(usable))}
    odd = [image for image in usable if image.facts.format in rare]
    if odd:
        width, height = (
            round(statistics.median(side(image) for image in usable)) for side in (_width, _height)
        )
        yield Finding(
            "warning",
            "odd-format",
            f"{_count(len(odd), 'image')} of another format than the {usual} of the others (typically "
            f"{width}x{height}); look at {'it' if len(odd) == 1 else 'them'}, placeholders look like this.",
            tuple(f"{image}: {image.facts.format}, {_size(image)}" for image in odd),
        )


def _odd_sizes(usable: Sequence[_Usable]) -> Iterable[Finding]:
    if not usable:
        return
    tests: tuple[tuple[Callable[[_Usable], float], int], ...] = (
        (lambda image: math.log2(image.facts.width * image.facts.height), ODD_AREA_FACTOR),
        (lambda image: math.log2(image.facts.width / image.facts.height), ODD_ASPECT_FACTOR),
    )
    odd: set[int] = set()
    for measure, factor in tests:
        values = [measure(image) for image in usable]
        middle = statistics.median(values)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
        limit = max(math.log2(factor), ODD_DEVIATIONS * spread)
        odd |= {index for index, value in enumerate(values) if abs(value - middle) > limit}
    odd |= {i for i, image in enumerate(usable) if min(image.facts.width, image.facts.height) < TINY_SIDE}
    if odd and len(odd) <= max(1, 0.1 * len(usable)):
        items = tuple(f"{usable[index]}: {_size(usable[index])}" for index in sorted(odd))
        text = f"{_count(len(odd), 'image')} much larger, smaller, longer or flatter than the others."
        yield Finding("warning", "odd-size", text, items)
    elif odd:
        text = (
            f"{_count(len(odd), 'image')} of very uneven or very small size (side below {TINY_SIDE} pixels)."
        )
        yield Finding(
            "warning", "odd-size", text, tuple(f"{usable[i]}: {_size(usable[i])}" for i in sorted(odd))
        )


def _odd_contents(usable: Sequence[_Usable]) -> Iterable[Finding]:
    blank = tuple(str(image) for image in usable if image.blank)
    if blank:
        yield Finding("warning", "blank", f"{_count(len(blank), 'image')} of a single colour.", blank)


def _policies(usable: Sequence[_Usable]) -> Iterable[Finding]:
    """Notes on images that the decoder handles by a policy of its own."""
    policies: tuple[tuple[str, str, Callable[[ImageFacts], bool]], ...] = (
        ("animation", "with several frames or pages; the first is used", lambda facts: facts.animated),
        ("alpha", "with transparency; put on white", lambda facts: facts.alpha),
        ("cmyk", "in CMYK; converted to RGB", lambda facts: facts.mode == "CMYK"),
        ("grey16", "with 16-bit grey; scaled to 8 bit", lambda facts: facts.mode.startswith("I")),
        ("orientation", "turned by their EXIF orientation", lambda facts: facts.orientation != 1),
    )
    for kind, text, applies in policies:
        found = tuple(str(image) for image in usable if applies(image.facts))
        if found:
            yield Finding("note", kind, f"{_count(len(found), 'image')} {text}.", found)


def _ignored(dataset: Dataset) -> Iterable[Finding]:
    for reason, count in dataset.ignored.items():
        text = f"Ignored {reason}: {count}"
        if not any(warning.message.startswith(text) for warning in dataset.warnings):
            yield Finding("note", "ignored", f"{text}.")


def _width(image: _Usable) -> int:
    return image.facts.width


def _height(image: _Usable) -> int:
    return image.facts.height


def _size(image: _Usable) -> str:
    return f"{image.facts.width}x{image.facts.height} pixels"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
