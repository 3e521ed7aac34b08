"""Techniques of annotation: which seeds each lays, and what stands in where there is nothing to cut."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from maskseg.annotation.grabcut import (
    BACKGROUND,
    FOREGROUND,
    MAYBE_BACKGROUND,
    MAYBE_FOREGROUND,
    box_mask,
    ellipse_mask,
)
from maskseg.annotation.techniques import (
    NAMES,
    OF_BOXES,
    OF_MAPS,
    USUAL,
    WITH_THRESHOLD,
    Technique,
    at_all,
    fits,
    limits,
)
from maskseg.errors import UserError

pytest.importorskip("cv2")
BOX = (10.0, 8.0, 50.0, 38.0)
IMAGE = np.random.default_rng(0).integers(0, 40, (48, 64, 3), dtype=np.uint8)
IMAGE[ellipse_mask((14, 10, 46, 36), 48, 64)] += 150
MAP = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)


def made(name: str, **keys: object) -> Technique:
    return Technique(name, USUAL.get(name), **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "bins"),
    [
        ("gccam_pf_pb", (0, 0.6, 1)),
        ("gccam_f_pf", (0, 0.01, 0.6)),
        ("gccam_f_pb", (0, 0.6, 0.61)),
        ("gcellipse", (0, 0.1, 0.6)),
        ("cam", None),
    ],
)
def test_bins(name: str, bins: tuple[float, ...] | None) -> None:
    found = Technique(name, 0.6).thresholds()
    assert found is None if bins is None else found == pytest.approx(bins)


def test_seeds() -> None:
    values = np.array([[0, 0.005, 0.59, 0.605, 0.7]], dtype=np.float32)
    kinds = {"gccam_pf_pb": "bbbpp", "gccam_f_pf": "bbpff", "gccam_f_pb": "bbb?f"}
    letters = {"b": MAYBE_BACKGROUND, "p": MAYBE_FOREGROUND, "f": FOREGROUND, "?": MAYBE_FOREGROUND}
    for name, expected in kinds.items():
        codes = Technique(name, 0.6).codes(None, values, 1, 5)
        assert codes is not None
        assert codes.tolist() == [[letters[k] for k in expected]]
    plain = Technique("grabcut").codes((1, 0, 3, 1), None, 1, 5)
    assert plain is not None
    assert plain.tolist() == [
        [BACKGROUND, MAYBE_FOREGROUND, MAYBE_FOREGROUND, BACKGROUND, BACKGROUND]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_each_gives_a_mask_in_the_box(name: str) -> None:
    technique = made(name)
    found = technique(IMAGE, BOX, MAP)
    assert found.mask.any()
    assert not found.mask[~box_mask(BOX, 48, 64)].any()
    assert np.array_equal(found.mask, pickle.loads(pickle.dumps(technique))(IMAGE, BOX, MAP).mask)
    assert Technique(**technique.values()) == technique
    assert technique(IMAGE, None, MAP).mask.shape == (48, 64)


def test_an_object_in_its_box() -> None:
    truth = ellipse_mask((14, 10, 46, 36), 48, 64)
    for name in ("grabcut", "gcellipse"):
        found = made(name)(IMAGE, BOX).mask
        assert (found & truth).sum() / (found | truth).sum() > 0.9, name
    assert np.array_equal(made("box")(IMAGE, BOX).mask, box_mask(BOX, 48, 64))
    assert np.array_equal(made("ellipse")(IMAGE, BOX).mask, ellipse_mask(BOX, 48, 64))


def test_a_map_is_cut_at_the_threshold() -> None:
    whole = Technique("cam", 0.5, normalise="image")(IMAGE, BOX, MAP).mask
    inside = box_mask(BOX, 48, 64)
    assert np.array_equal(whole, (MAP >= 0.5) & inside)
    own = Technique("cam", 0.5)(IMAGE, BOX, MAP).mask
    low, high = MAP[inside].min(), MAP[inside].max()
    assert np.array_equal(own, ((MAP - low) / (high - low) >= 0.5) & inside)
    assert not np.array_equal(own, whole)


@pytest.mark.parametrize("name", OF_MAPS)
def test_a_constant_map(name: str) -> None:
    flat = np.full((6, 8), 3.0)
    found = made(name)(IMAGE, BOX, flat)
    assert found.fallback == "the map is constant"
    assert np.array_equal(found.mask, ellipse_mask(BOX, 48, 64))
    assert not made(name)(IMAGE, None, flat).mask.any()


@pytest.mark.parametrize("name", OF_MAPS)
def test_no_map(name: str) -> None:
    found = made(name)(IMAGE, BOX)
    assert found.fallback == "no class map"
    assert np.array_equal(found.mask, ellipse_mask(BOX, 48, 64))
    assert not made(name)(IMAGE, None).mask.any()
    assert made(name).map(BOX, None, 48, 64) is None


def test_a_box_whose_map_stays_below_the_threshold() -> None:
    """The map is at its highest elsewhere in the image; in the box it still says what is perhaps foreground."""
    truth = ellipse_mask((14, 10, 46, 36), 48, 64)
    scores = np.where(truth, 0.4, 0).astype(np.float32)
    scores[0, 63] = 1
    keys = {"threshold": 0.6, "normalise": "image"}
    found = Technique("gccam_f_pf", **keys)(IMAGE, BOX, scores)  # type: ignore[arg-type]
    assert found.fallback == ""
    assert (found.mask & truth).sum() / (found.mask | truth).sum() > 0.9
    reasons = {
        "cam": "nothing in the box reaches the threshold",
        "gccam_pf_pb": "no foreground seeds",
        "gccam_f_pb": "no foreground seeds",
    }
    for name, reason in reasons.items():
        found = Technique(name, **keys)(IMAGE, BOX, scores)  # type: ignore[arg-type]
        assert found.fallback == reason
        assert np.array_equal(found.mask, ellipse_mask(BOX, 48, 64))
    assert (
        Technique("gccam_f_pf", **keys)(IMAGE, (50, 40, 60, 48), scores).fallback
        == "the map is constant"
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OF_BOXES)
def test_constant_images_and_boxes_elsewhere(name: str) -> None:
    flat = np.full_like(IMAGE, 90)
    assert made(name)(flat, BOX).mask.any()
    assert made(name)(flat, (0, 0, 64, 48)).mask.any()
    outside = made(name)(flat, (70, 8, 80, 20))
    assert outside.fallback == "the box lies outside the image"
    assert not outside.mask.any()


def test_a_box_as_large_as_the_image_has_background_in_its_corners() -> None:
    height, width = 60, 80
    truth = ellipse_mask((2, 2, 78, 58), height, width)
    image = np.where(truth[..., None], (200, 30, 30), (30, 30, 200)).astype(np.uint8)
    found = made("gcellipse")(image, (0, 0, width, height))
    assert found.fallback == ""
    assert (found.mask & truth).sum() / (found.mask | truth).sum() > 0.95
    assert made("grabcut")(image, (0, 0, width, height)).fallback == "no background seeds"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"name": "magic"}, "one of box, ellipse"),
        ({"name": "cam"}, "cam needs a threshold"),
        ({"name": "box", "threshold": 0.5}, "box has no threshold"),
        ({"name": "gccam_f_pf", "threshold": 0.01}, "above 0.01"),
        ({"name": "gccam_f_pb", "threshold": 1.0}, "at most 0.99"),
        ({"name": "cam", "threshold": float("nan")}, "above 0.0"),
        ({"name": "box", "normalise": "world"}, "normalise"),
        ({"name": "grabcut", "iterations": 0}, "iterations"),
        ({"name": "grabcut", "margin": 0.0}, "margin"),
        ({"name": "grabcut", "side": -1}, "side"),
    ],
)
def test_wrong_keys(keys: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Technique(**keys)  # type: ignore[arg-type]


def test_all_at_their_thresholds() -> None:
    found = at_all([0.1, 0.5, 0.999], maps=True, iterations=2)
    assert [t.text for t in found if t.name in ("box", "gcellipse")] == [
        "box",
        "gcellipse 0.5",
        "gcellipse 0.999",
    ]
    assert {t.name for t in found} == set(NAMES)
    assert all(t.iterations == 2 for t in found)
    assert {t.name for t in at_all([0.5], maps=False)} == set(OF_BOXES)
    assert all(
        fits(name, USUAL[name]) and limits(name)[0] < limits(name)[1] for name in WITH_THRESHOLD
    )
