"""A few images, for what computes and keeps their rows."""

import pytest

from tlcli.data.folders import find_images


@pytest.fixture
def samples(request, tmp_path, make_images):
    """Return images; a module's IMAGES says how many of each class."""
    make_images(tmp_path / "images", getattr(request.module, "IMAGES", {"a": 7, "b": 6}))
    return find_images([str(tmp_path / "images")])
