"""Views are pure functions of (content, view, seed, policy), and every operation does what its name says."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as operations

from tlcli.config.backbone import Preprocess
from tlcli.config.data import AugmentOptions
from tlcli.data import color_ops
from tlcli.data.augment import (
    MANY_IMAGES,
    PRESETS,
    ZOOM_OUT,
    Augmenter,
    AugmentPolicy,
    choose_preset,
    resolve_policy,
)
from tlcli.data.color_ops import OPERATIONS, RANDAUGMENT, Operation
from tlcli.data.resampling import WARP_KNOTS, cut_and_resize, evaluation_window, look_up, warp_shifts
from tlcli.data.transforms import EvalTransform
from tlcli.errors import UsageError

PREPROCESS = Preprocess(image_size=(32, 32), crop_pct=0.875)
ALL_ON = {
    "mirror": 1.0, "crop_scale": 0.5, "rotate": 20.0, "shear": 10.0, "warp": 0.02, "brightness": 0.4,
    "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "pca_color": 0.3, "erase": 1.0, "magnitude": 9,
}  # fmt: skip


def photograph(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return a smooth colour image with some noise, laid out channels-last as the decoders do."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [120 + 60 * np.sin(rows / (9 + 4 * k) + columns / (17 - 3 * k) + k) for k in range(3)]
    noisy = np.stack(planes, axis=2) + generator.normal(0, 4, (height, width, 3))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def sha(text: str = "image") -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def policy(**values: Any) -> AugmentPolicy:
    return resolve_policy(AugmentOptions(**{"augment": "none", **values}), 100)


def view(image: torch.Tensor, number: int = 1, **values: Any) -> torch.Tensor:
    return Augmenter(policy(**values), PREPROCESS)(image, sha(), number, 0)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


# ---- the policy -------------------------------------------------------------------------------------------


def test_presets_differ_and_none_is_none() -> None:
    policies = {name: policy(augment=name) for name in PRESETS}
    assert len({json.dumps(one.key_facts()) for one in policies.values()}) == len(PRESETS)
    assert [name for name, one in policies.items() if one.is_none] == ["none"]
    assert len({one.describe() for one in policies.values()}) == len(PRESETS)


def test_light_and_the_default_keep_letters_and_colours() -> None:
    for chosen in (policy(augment="light"), policy(augment="auto")):
        changed = {k for k, v in chosen.values().items() if v != AugmentPolicy().values()[k]}
        assert changed == {"crop_scale"}


def test_auto_goes_by_the_number_of_training_images() -> None:
    assert choose_preset(1) == choose_preset(MANY_IMAGES - 1) == "light"
    assert choose_preset(MANY_IMAGES) == "none"
    few = resolve_policy(AugmentOptions(), 245)
    assert "245 training images" in few.reason
    assert resolve_policy(AugmentOptions(), 10**6).is_none
    assert few == resolve_policy(AugmentOptions(augment="light"), 10**6)  # why it was chosen is no difference


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "trivialaugment"])
def test_a_given_option_wins_over_the_preset(preset: Any) -> None:
    chosen = policy(augment=preset, **ALL_ON)
    assert {name: getattr(chosen, name) for name in ALL_ON} == ALL_ON
    off = {name: type(value)(name == "crop_scale") for name, value in ALL_ON.items()}
    assert policy(augment=preset, **off).is_none


def test_trivialaugment_takes_no_magnitude() -> None:
    with pytest.raises(UsageError, match="magnitude"):
        policy(augment="trivialaugment", magnitude=5)


def test_facts_are_json_without_floats_and_name_every_value() -> None:
    facts = policy(**ALL_ON).key_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert not any(isinstance(value, float) for value in facts.values())
    fields = {field.name for field in dataclasses.fields(AugmentPolicy)} - {"name", "reason"}
    assert set(facts) == {"version", *fields}
    for name, value in ALL_ON.items():
        assert policy(**{name: value}).key_facts() != policy().key_facts()
    assert policy(rotate=20).key_facts() == policy(rotate=20.0).key_facts()


# ---- purity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_view_0_is_the_evaluation_transform(preset: Any, mode: Any) -> None:
    preprocess = Preprocess(image_size=(32, 40), crop_pct=0.9, crop_mode=mode)
    image = photograph(60, 90)
    augmenter = Augmenter(policy(augment=preset), preprocess)
    assert torch.equal(augmenter(image, sha(), 0, 7), EvalTransform(preprocess)(image))


def test_views_depend_on_content_view_and_seed_alone() -> None:
    image = photograph(60, 90)
    augmenter = Augmenter(policy(augment="strong"), PREPROCESS)
    first = augmenter(image, sha(), 1, 0)
    assert torch.equal(first, Augmenter(policy(augment="strong"), PREPROCESS)(image.clone(), sha(), 1, 0))
    assert torch.equal(first, augmenter(image.contiguous(), sha(), 1, 0))  # in another memory layout
    others = [(sha(), 2, 0), (sha(), 1, 1), (sha("other"), 1, 0), (sha(), 11, 0)]
    assert not any(torch.equal(first, augmenter(image, *other)) for other in others)


def test_order_threads_and_torch_threads_do_not_matter() -> None:
    images = [photograph(60 + n, 90 - n, seed=n) for n in range(3)]
    preprocess = Preprocess(image_size=(200, 200), crop_pct=0.875)  # large enough for torch to divide work
    augmenter = Augmenter(policy(**ALL_ON), preprocess)
    keys = [(number, view) for number in range(3) for view in range(1, 5)]

    def make(key: tuple[int, int]) -> torch.Tensor:
        return augmenter(images[key[0]], sha(str(key[0])), key[1], 3)

    one_by_one = [make(key) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(make, reversed(keys)))[::-1]
    assert all(map(torch.equal, one_by_one, at_once))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(make(key), made) for key, made in zip(keys, one_by_one, strict=True))
    finally:
        torch.set_num_threads(before)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    image = photograph(50, 50)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        results.append([view(image, number, **ALL_ON) for number in range(1, 6)])
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
    assert all(map(torch.equal, *results))


def test_the_input_is_never_changed() -> None:
    image = photograph(32, 32)
    before = image.clone()
    augmenter = Augmenter(
        policy(**{**ALL_ON, "crop_scale": 1.0}), Preprocess(image_size=(32, 32), crop_pct=1.0)
    )
    erasing = Augmenter(policy(erase=1.0), Preprocess(image_size=(32, 32), crop_pct=1.0))
    for number in range(4):
        augmenter(image, sha(), number, 0)
        erasing(image, sha(), number, 0)
    assert torch.equal(image, before)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_options_on_any_image_give_an_image(data: st.DataObject) -> None:
    ranges = {
        "mirror": 1, "rotate": 180, "shear": 60, "warp": 0.2, "brightness": 1, "contrast": 1, "saturation": 1,
        "hue": 0.5, "pca_color": 1, "erase": 1,
    }  # fmt: skip
    values = {name: data.draw(st.none() | st.floats(0, limit), label=name) for name, limit in ranges.items()}
    values["crop_scale"] = data.draw(st.none() | st.floats(0.05, 1))
    preset = data.draw(st.sampled_from(list(PRESETS)))
    if preset != "trivialaugment":
        values["magnitude"] = data.draw(st.none() | st.integers(0, 30))
    preprocess = Preprocess(
        image_size=data.draw(st.sampled_from([(8, 8), (17, 32), (32, 32)])),
        crop_pct=data.draw(st.sampled_from([0.5, 0.875, 1.0])),
        crop_mode=data.draw(st.sampled_from(["center", "squash", "border"])),
        interpolation=data.draw(st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"])),
    )
    height, width = data.draw(
        st.sampled_from([(1, 1), (1, 2), (2, 1), (5, 3), (1, 200), (300, 2), (40, 60), (32, 32)])
    )
    image = photograph(height, width)
    if data.draw(st.booleans()):
        image = image[:1].expand(3, -1, -1)  # grey
    augmenter = Augmenter(policy(augment=preset, **values), preprocess)
    made = augmenter(image, sha(), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 2**63)))
    assert made.dtype == torch.uint8
    assert made.shape == (3, *preprocess.image_size)
    assert made.is_contiguous()


# ---- geometry ---------------------------------------------------------------------------------------------


def test_the_mirror_mirrors_and_nothing_else() -> None:
    image = photograph(60, 90)
    rest = {"crop_scale": 0.5, "rotate": 15.0}
    assert torch.equal(view(image, mirror=1.0), EvalTransform(PREPROCESS)(image).flip(-1))
    for number in range(1, 5):
        assert torch.equal(view(image, number, mirror=1.0, **rest).flip(-1), view(image, number, **rest))
    mirrored = [torch.equal(view(image, n, mirror=0.5), view(image, n, mirror=1.0)) for n in range(1, 201)]
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(60, 90), (90, 40), (16, 16), (200, 150)], ids=str)
def test_a_lookup_that_moves_nothing_is_the_evaluation_transform(mode: Any, size: tuple[int, int]) -> None:
    preprocess = Preprocess(image_size=(32, 32), crop_pct=0.875, crop_mode=mode)
    transform = EvalTransform(preprocess)
    image = photograph(*size)
    plain = transform(image)
    window = evaluation_window(transform, *size)
    assert distance(look_up(image, window, np.eye(3), None, transform), plain) < 2
    assert distance(cut_and_resize(image, window, transform), plain) < 8  # whole pixels of the source
    shifts = torch.zeros(2, 32, 32)
    assert distance(look_up(image, window, np.eye(3), shifts, transform), plain) < 2


def test_the_lookup_turns_and_moves_by_what_it_is_told() -> None:
    transform = EvalTransform(Preprocess(image_size=(33, 33), crop_pct=1.0))
    image = torch.zeros(3, 33, 33, dtype=torch.uint8)
    image[:, 6, 10] = 255
    window = evaluation_window(transform, 33, 33)

    def peak(matrix: np.ndarray, shifts: torch.Tensor | None = None) -> tuple[int, int]:
        made = look_up(image, window, matrix, shifts, transform)[0]
        return divmod(int(made.argmax()), 33)

    quarter = np.eye(3)
    quarter[:2, :2] = color_ops.rotation(90)
    assert peak(quarter) in {(10, 26), (22, 6)}
    moved = np.eye(3)
    moved[:, 2] = [3, -2, 1]
    assert peak(moved) == (8, 7)
    shifts = torch.tensor([3.0, -2.0])[:, None, None].expand(2, 33, 33)
    assert peak(np.eye(3), shifts) == (8, 7)


def test_small_operations_stay_near_the_plain_view() -> None:
    image = photograph(120, 120)
    plain = EvalTransform(PREPROCESS)(image)
    for values in ({"rotate": 1e-3}, {"shear": 1e-3}, {"warp": 1e-5}):
        assert distance(view(image, **values), plain) < 1
    for values in ({"rotate": 45.0}, {"shear": 30.0}, {"warp": 0.05}, {"crop_scale": 0.3}):
        assert max(distance(view(image, number, **values), plain) for number in range(1, 6)) > 5


@pytest.mark.parametrize("crop_pct", [0.8, 1.0])
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (100, 100), (3000, 40)], ids=str)
def test_crops_show_objects_as_large_as_evaluation_does_on_average(
    size: tuple[int, int], crop_pct: float
) -> None:
    augmenter = Augmenter(policy(augment="light"), dataclasses.replace(PREPROCESS, crop_pct=crop_pct))
    shown = evaluation_window(augmenter.plain, *size)
    from tlcli.data.augment import _draw

    windows = [augmenter._window(_draw(sha(), number, 0)[0], *size) for number in range(300)]
    sides = np.array([[one.width / shown.width, one.height / shown.height] for one in windows])
    assert np.allclose(sides[:, 0], sides[:, 1])  # no distortion
    assert np.allclose(sides.min(), 0.75**0.5, atol=0.01)
    assert np.allclose(sides.max(), ZOOM_OUT, atol=0.01)
    assert abs(sides.mean() - 1) < 0.03
    margin = (ZOOM_OUT - 1) / 2 + 1e-9
    for one in windows:
        assert one.left >= -margin * shown.width
        assert one.top >= -margin * shown.height
        assert one.left + one.width <= size[1] + margin * shown.width
        assert one.top + one.height <= size[0] + margin * shown.height
    assert np.std([one.left for one in windows]) > 0.01 * shown.width  # it does move
    assert np.std([one.top for one in windows]) > 0.01 * shown.height


def test_the_image_continues_as_its_reflection_and_with_the_mean_in_border_mode() -> None:
    image = torch.full((3, 20, 20), 200, dtype=torch.uint8)
    for values in ({"rotate": 180.0}, {"crop_scale": 0.5}, {"warp": 0.1}, {"shear": 50.0}):
        for number in range(1, 6):
            made = Augmenter(policy(**values), dataclasses.replace(PREPROCESS, crop_pct=1.0))(
                image, sha(), number, 0
            )
            assert set(made.unique().tolist()) == {200}
    border = Preprocess(image_size=(32, 32), crop_pct=1.0, crop_mode="border", mean=(0.1, 0.5, 0.9))
    corners = [
        Augmenter(policy(rotate=180.0), border)(image, sha(), number, 0)[:, 0, 0].tolist()
        for number in range(1, 6)
    ]
    assert [26, 128, 230] in corners


def test_warp_shifts_have_the_asked_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    fields = [
        warp_shifts(torch.randn(2, WARP_KNOTS, WARP_KNOTS, generator=generator), (64, 32), 0.02)
        for _ in range(200)
    ]
    spread = torch.stack(fields).std(dim=(0, 2, 3))
    assert torch.allclose(spread, torch.tensor([0.02 * 32, 0.02 * 64]), rtol=0.05)


# ---- colours and contents ---------------------------------------------------------------------------------

COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.6, "hue": 0.2, "pca_color": 0.5}


@pytest.mark.parametrize("name", COLOUR)
def test_colour_operations_move_no_pixel_and_leave_the_rest_alone(name: str) -> None:
    image = photograph(60, 90)
    plain = EvalTransform(PREPROCESS)(image)
    flat = torch.full((3, 40, 40), 90, dtype=torch.uint8)
    for number in range(1, 4):
        assert 0 < distance(view(image, number, **{name: COLOUR[name]}), plain) < 80
        made = view(flat, number, **{name: COLOUR[name]})
        assert (made == made[:, :1, :1]).all()  # one colour stays one colour
        if name in {"saturation", "hue"}:  # grey has neither
            assert (made.int() - 90).abs().max() <= 1
        # The same crop, whatever is done to its colours.
        crop = {"crop_scale": 0.4}
        assert distance(view(image, number, **crop, **{name: 1e-9}), view(image, number, **crop)) <= 1


def test_contrast_and_solarize_are_torchvisions() -> None:
    image = EvalTransform(PREPROCESS)(photograph(60, 90))
    for factor in (0.5, 1.0, 1.7):
        ours, theirs = color_ops.contrast(image, factor), operations.adjust_contrast(image, factor)
        assert (ours.int() - theirs.int()).abs().max() <= 1
    for strength in (0.0, 0.3, 1.0):
        ours = color_ops.apply(image, Operation("Solarize", strength), RANDAUGMENT)
        assert torch.equal(ours, operations.solarize(image, 255.0 * (1 - strength)))


def test_pca_colour_is_one_shift_along_imagenets_first_component() -> None:
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    moved = color_ops.pca_color(image, (-0.1, 0.0, 0.0))
    assert moved[:, 0, 0].tolist() == [103, 103, 103]  # 255 * 0.1 * 0.2175 * 0.57: nearly grey
    directions = np.array(color_ops.PCA_DIRECTIONS)
    assert np.allclose(directions.T @ directions, np.eye(3), atol=1e-3)


def test_erasing_replaces_one_rectangle() -> None:
    image = torch.full((3, 64, 64), 90, dtype=torch.uint8)
    shares = []
    for number in range(1, 60):
        made = view(image, number, erase=1.0)
        changed = (made != 90).any(dim=0)
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.float().mean() > 0.95  # noise may be 90 by chance
        shares.append(changed.float().mean().item())
    assert 0.01 < min(shares) < 0.08
    assert 0.25 < max(shares) < 0.36
    erased = [not torch.equal(view(image, n, erase=0.25), view(image, n)) for n in range(1, 201)]
    assert 30 < sum(erased) < 75


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_of_randaugment_does_something_once(name: str) -> None:
    image = EvalTransform(PREPROCESS)(photograph(60, 90))
    operation = Operation(name, 0.6)
    matrix = color_ops.geometry(operation, RANDAUGMENT, (32, 32))
    changed = not torch.equal(color_ops.apply(image, operation, RANDAUGMENT), image)
    assert changed + (matrix is not None) == (name != "Identity")
    if matrix is not None:
        assert np.allclose(color_ops.geometry(Operation(name, 0.0), RANDAUGMENT, (32, 32)), np.eye(3))


def test_randaugment_and_trivialaugment_draw_every_operation_equally() -> None:
    from tlcli.data.augment import _draw

    for values, count in (({"magnitude": 9}, 2), ({"augment": "trivialaugment"}, 1)):
        augmenter = Augmenter(policy(**values), PREPROCESS)
        drawn = [augmenter._operations(_draw(sha(), number, 0)[0]) for number in range(1400)]
        assert {len(one) for one in drawn} == {count}
        names = [operation.name for one in drawn for operation in one]
        expected = len(names) / len(OPERATIONS)
        assert all(0.6 * expected < names.count(name) < 1.4 * expected for name in OPERATIONS)
        strengths = {round(abs(operation.strength) * 30) for one in drawn for operation in one}
        assert strengths == ({9} if count == 2 else set(range(31)))
        assert {operation.strength > 0 for one in drawn for operation in one} == {True, False}


@pytest.mark.real
def test_real_photographs_keep_their_mean_under_every_preset(real_assets: Path) -> None:
    from tlcli.data.decode import decode

    path = sorted((real_assets / "hymenoptera" / "train" / "bees").iterdir())[0]
    image = decode(path.read_bytes())
    for preset in PRESETS:
        augmenter = Augmenter(policy(augment=preset), Preprocess(image_size=(96, 96), crop_pct=0.875))
        made = torch.stack([augmenter(image, sha(), number, 0) for number in range(1, 9)])
        assert abs(made.float().mean() - augmenter.plain(image).float().mean()) < 40
