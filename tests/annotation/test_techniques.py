"""Techniques of annotation: the trimap of each, and the fallbacks."""

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
    BOX_TECHNIQUES,
    CAM_TECHNIQUES,
    DEFAULT_THRESHOLDS,
    TECHNIQUES,
    WITH_THRESHOLD,
    Technique,
    all_techniques,
    is_valid_threshold,
    threshold_range,
)
from maskseg.errors import UserError

pytest.importorskip("cv2")
BOX = (10.0, 8.0, 50.0, 38.0)
IMAGE = np.random.default_rng(0).integers(0, 40, (48, 64, 3), dtype=np.uint8)
IMAGE[ellipse_mask((14, 10, 46, 36), 48, 64)] += 150
MAP = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)


def make(name: str, **keys: object) -> Technique:
    return Technique(name, DEFAULT_THRESHOLDS.get(name), **keys)  # type: ignore[arg-type]


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
    result = Technique(name, 0.6).thresholds()
    assert result is None if bins is None else result == pytest.approx(bins)


def test_seeds() -> None:
    values = np.array([[0, 0.005, 0.59, 0.605, 0.7]], dtype=np.float32)
    kinds = {"gccam_pf_pb": "bbbpp", "gccam_f_pf": "bbpff", "gccam_f_pb": "bbb?f"}
    letters = {"b": MAYBE_BACKGROUND, "p": MAYBE_FOREGROUND, "f": FOREGROUND, "?": MAYBE_FOREGROUND}
    for name, expected in kinds.items():
        trimap = Technique(name, 0.6).trimap(None, values, 1, 5)
        assert trimap is not None
        assert trimap.tolist() == [[letters[k] for k in expected]]
    plain = Technique("grabcut").trimap((1, 0, 3, 1), None, 1, 5)
    assert plain is not None
    assert plain.tolist() == [
        [BACKGROUND, MAYBE_FOREGROUND, MAYBE_FOREGROUND, BACKGROUND, BACKGROUND]
    ]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_gives_a_mask_in_the_box(name: str) -> None:
    technique = make(name)
    result = technique(IMAGE, BOX, MAP)
    assert result.mask.any()
    assert not result.mask[~box_mask(BOX, 48, 64)].any()
    assert np.array_equal(result.mask, pickle.loads(pickle.dumps(technique))(IMAGE, BOX, MAP).mask)
    assert Technique(**technique.to_dict()) == technique
    assert technique(IMAGE, None, MAP).mask.shape == (48, 64)


def test_an_object_in_its_box() -> None:
    truth = ellipse_mask((14, 10, 46, 36), 48, 64)
    for name in ("grabcut", "gcellipse"):
        result = make(name)(IMAGE, BOX).mask
        assert (result & truth).sum() / (result | truth).sum() > 0.9, name
    assert np.array_equal(make("box")(IMAGE, BOX).mask, box_mask(BOX, 48, 64))
    assert np.array_equal(make("ellipse")(IMAGE, BOX).mask, ellipse_mask(BOX, 48, 64))


def test_a_map_is_cut_at_the_threshold() -> None:
    in_image = Technique("cam", 0.5, normalise="image")(IMAGE, BOX, MAP).mask
    inside = box_mask(BOX, 48, 64)
    assert np.array_equal(in_image, (MAP >= 0.5) & inside)
    in_box = Technique("cam", 0.5)(IMAGE, BOX, MAP).mask
    low, high = MAP[inside].min(), MAP[inside].max()
    assert np.array_equal(in_box, ((MAP - low) / (high - low) >= 0.5) & inside)
    assert not np.array_equal(in_box, in_image)


@pytest.mark.parametrize("name", CAM_TECHNIQUES)
def test_a_constant_map(name: str) -> None:
    flat = np.full((6, 8), 3.0)
    result = make(name)(IMAGE, BOX, flat)
    assert result.fallback_reason == "the map is constant"
    assert np.array_equal(result.mask, ellipse_mask(BOX, 48, 64))
    assert not make(name)(IMAGE, None, flat).mask.any()


@pytest.mark.parametrize("name", CAM_TECHNIQUES)
def test_no_map(name: str) -> None:
    result = make(name)(IMAGE, BOX)
    assert result.fallback_reason == "no class map"
    assert np.array_equal(result.mask, ellipse_mask(BOX, 48, 64))
    assert not make(name)(IMAGE, None).mask.any()
    assert make(name).foreground_map(BOX, None, 48, 64) is None


def test_a_box_whose_map_stays_below_the_threshold() -> None:
    """The maximum of the map is elsewhere; in the box it still gives probable foreground."""
    truth = ellipse_mask((14, 10, 46, 36), 48, 64)
    scores = np.where(truth, 0.4, 0).astype(np.float32)
    scores[0, 63] = 1
    keys = {"threshold": 0.6, "normalise": "image"}
    result = Technique("gccam_f_pf", **keys)(IMAGE, BOX, scores)  # type: ignore[arg-type]
    assert result.fallback_reason == ""
    assert (result.mask & truth).sum() / (result.mask | truth).sum() > 0.9
    reasons = {
        "cam": "nothing in the box reaches the threshold",
        "gccam_pf_pb": "no foreground seeds",
        "gccam_f_pb": "no foreground seeds",
    }
    for name, reason in reasons.items():
        result = Technique(name, **keys)(IMAGE, BOX, scores)  # type: ignore[arg-type]
        assert result.fallback_reason == reason
        assert np.array_equal(result.mask, ellipse_mask(BOX, 48, 64))
    assert (
        Technique("gccam_f_pf", **keys)(IMAGE, (50, 40, 60, 48), scores).fallback_reason
        == "the map is constant"
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BOX_TECHNIQUES)
def test_constant_images_and_boxes_elsewhere(name: str) -> None:
    flat = np.full_like(IMAGE, 90)
    assert make(name)(flat, BOX).mask.any()
    assert make(name)(flat, (0, 0, 64, 48)).mask.any()
    outside = make(name)(flat, (70, 8, 80, 20))
    assert outside.fallback_reason == "the box lies outside the image"
    assert not outside.mask.any()


def test_a_box_as_large_as_the_image_has_background_in_its_corners() -> None:
    height, width = 60, 80
    truth = ellipse_mask((2, 2, 78, 58), height, width)
    image = np.where(truth[..., None], (200, 30, 30), (30, 30, 200)).astype(np.uint8)
    result = make("gcellipse")(image, (0, 0, width, height))
    assert result.fallback_reason == ""
    assert (result.mask & truth).sum() / (result.mask | truth).sum() > 0.95
    assert make("grabcut")(image, (0, 0, width, height)).fallback_reason == "no background seeds"


@pytest.mark.parametrize(
    ("keys", "message"),
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
def test_wrong_keys(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Technique(**keys)  # type: ignore[arg-type]


def test_all_at_their_thresholds() -> None:
    result = all_techniques([0.1, 0.5, 0.999], maps=True, iterations=2)
    assert [t.label for t in result if t.name in ("box", "gcellipse")] == [
        "box",
        "gcellipse 0.5",
        "gcellipse 0.999",
    ]
    assert {t.name for t in result} == set(TECHNIQUES)
    assert all(t.iterations == 2 for t in result)
    assert {t.name for t in all_techniques([0.5], maps=False)} == set(BOX_TECHNIQUES)
    assert all(
        is_valid_threshold(name, DEFAULT_THRESHOLDS[name])
        and threshold_range(name)[0] < threshold_range(name)[1]
        for name in WITH_THRESHOLD
    )
