"""Filling a feature store, as plans do it."""

from tlcli.data.split import fingerprint
from tlcli.progress import Silent


def fill(store, samples, views=None, **options):
    """Compute the rows of samples; return what became of them, and the SHA-256 of each.

    `views` are those of every sample, a range, or a list with those of each.
    """
    fingerprints = fingerprint(samples, 2, Silent())
    wanted = [views] * len(samples) if isinstance(views, range) else views
    options = {"workers": 2, "progress": Silent(), "views": wanted, **options}
    return store.fill(samples, fingerprints, **options), [item.sha256 for item in fingerprints]
