"""Finding weights on this machine, and fetching them where that is allowed.

What is cached is used without asking: runs repeat, and start at once. A file counts as cached only when it is
complete; the hub cache names large files by their SHA-256 and torch's by its beginning, and both are checked.
A hub is asked once, with a deadline, before anything is downloaded.
"""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tlcli.backbones.weights_file import file_sha256
from tlcli.errors import BackboneError
from tlcli.machine import paths
from tlcli.warned import warn

logger = logging.getLogger(__name__)

T = TypeVar("T")

HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FOLDER_WEIGHTS = (*HUB_WEIGHTS, "pytorch_model.pth", "model.pth")
DEADLINE_SECONDS = 7.0
"""How long a hub may take to answer; with the imports a command still ends within 10 seconds."""


def registry_weights(name: str, cfg: Mapping[str, Any], *, offline: bool = False) -> Path:
    """Return the weights file of a name in timm's registry, fetching it where allowed.

    Args:
        name: Architecture and tag.
        cfg: Its pretrained configuration.
        offline: Never ask a hub.

    Raises:
        BackboneError: The weights are neither here nor to be had.
    """
    repository, _, revision = str(cfg.get("hf_hub_id") or "").partition("@")
    url = cfg.get("url")
    if isinstance(url, str) and (found := cached_url(url)):
        return found
    if repository:
        given = cfg.get("hf_hub_filename")
        names = HUB_WEIGHTS if not given else _alternatives(str(given))
        return hub_file(repository, names, revision or None, offline=offline, label=name)
    return url_file(str(url), name, offline=offline)


def folder_weights(folder: Path) -> Path:
    """Return the weights file in a folder of timm's format.

    Raises:
        BackboneError: There is none.
    """
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise BackboneError(
        f"Backbone folder {str(folder)!r} has no weights.",
        hint=f"Expected one of {', '.join(FOLDER_WEIGHTS)}.",
    )


def cached_hub_file(repository: str, names: Sequence[str], revision: str | None = None) -> Path | None:
    """Return the first of `names` that is complete in the Hugging Face cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repository, name, cache_dir=hub_cache(), revision=revision)
        if isinstance(found, str) and _is_complete(Path(found)):
            return Path(found)
    return None


def hub_file(
    repository: str,
    names: Sequence[str],
    revision: str | None = None,
    *,
    offline: bool = False,
    label: str | None = None,
) -> Path:
    """Return a file of a hub repository, from the cache or, where allowed, fetched.

    Args:
        repository: ORG/NAME.
        names: File names, best first.
        revision: Branch, tag or commit; the main branch unless given.
        offline: Never ask the hub.
        label: What the user called it, for messages.

    Raises:
        BackboneError: None of the files is here or to be had.
    """
    if found := cached_hub_file(repository, names, revision):
        return found
    label = label or f"hf-hub:{repository}"
    if offline or paths.offline():
        raise _unreachable(label, "and this command is offline", hub_cache())
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for name in names:
        url = hf_hub_url(repository, name, revision=revision)
        try:
            _within(DEADLINE_SECONDS, partial(get_hf_file_metadata, url, timeout=DEADLINE_SECONDS))
        except EntryNotFoundError:
            continue
        except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
            gated = isinstance(error, GatedRepoError)
            raise BackboneError(
                f"The hub has no {label} that can be read"
                + (": access must be asked for." if gated else "."),
                hint="Check the name; a private or gated repository needs `hf auth login`.",
            ) from error
        except Exception as error:  # every way a network can fail
            raise _unreachable(
                label, f"and the hub cannot be reached ({_brief(error)})", hub_cache()
            ) from error
        logger.info("Fetching %s of %s into %s.", name, repository, hub_cache())
        try:
            return Path(hf_hub_download(repository, name, revision=revision, cache_dir=hub_cache()))
        except Exception as error:  # as above; an unfinished download stays an .incomplete blob
            raise _unreachable(label, f"and fetching them failed ({_brief(error)})", hub_cache()) from error
    raise BackboneError(
        f"{label} has none of {', '.join(names)}.", hint="Only backbones in timm's format can be used."
    )


def cached_url(url: str) -> Path | None:
    """Return the complete file of `url` in torch's hub folder, or None."""
    path = checkpoints_dir() / os.path.basename(urlsplit(url).path)
    if not path.is_file():
        return None
    beginning = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if beginning and not file_sha256(path).startswith(beginning[1]):
        warn("damaged_download", f"{path} is not used: its content does not match the hash in its name.")
        return None
    return path


def url_file(url: str, label: str, *, offline: bool = False) -> Path:
    """Return the weights file of a URL, from torch's hub folder or, where allowed, fetched into it.

    Raises:
        BackboneError: The file is neither here nor to be had.
    """
    import urllib.request

    import torch

    if found := cached_url(url):
        return found
    if offline or paths.offline():
        raise _unreachable(label, "and this command is offline", checkpoints_dir())
    path = checkpoints_dir() / os.path.basename(urlsplit(url).path)
    try:
        request = urllib.request.Request(url, method="HEAD")
        _within(DEADLINE_SECONDS, lambda: urllib.request.urlopen(request, timeout=DEADLINE_SECONDS).close())
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("Fetching %s into %s.", url, path.parent)
        beginning = re.search(r"-([0-9a-f]{8,})\.", path.name)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=beginning and beginning[1], progress=False)
    except Exception as error:  # every way a network can fail
        reason = f"and {urlsplit(url).hostname} cannot be reached ({_brief(error)})"
        raise _unreachable(label, reason, checkpoints_dir()) from error
    return path


def hub_cache() -> Path:
    """Return the Hugging Face cache folder, from the environment as it is now."""
    if value := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(value).expanduser()
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or default).expanduser() / "hub"


def checkpoints_dir() -> Path:
    """Return torch's folder of downloaded weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def _alternatives(name: str) -> tuple[str, ...]:
    safe = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors", HUB_WEIGHTS[1]: HUB_WEIGHTS[0]}
    return (safe[name], name) if name in safe else (name,)


def _is_complete(path: Path) -> bool:
    """Return whether a file of the hub cache is whole: large ones are named by their SHA-256."""
    blob = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob) and file_sha256(path) != blob:
        warn("damaged_download", f"{path} is not used: its content does not match its hash.")
        return False
    return path.stat().st_size > 0


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise TimeoutError after `seconds`.

    Resolving a name can hang far beyond any socket timeout, so the wait is on a thread that is left behind.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller, whatever it is
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


def _unreachable(label: str, why: str, folder: Path) -> BackboneError:
    return BackboneError(
        f"The weights of {label} are not on this machine {why}.",
        hint="Use --backbone bundled (it comes with tlcli), --backbone local-dir:PATH, or --weights FILE; or "
        f"fetch the weights where there is a network and copy them to {folder}.",
    )


def _brief(error: BaseException) -> str:
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0][:200]
    return type(error).__name__
