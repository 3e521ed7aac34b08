"""Benchmark suites of convolutional feature masking: they run and fill tables and plots.

Times are not checked.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made.runs import SCENES
from PIL import Image

from maskseg import config as configs
from maskseg.benchmarks.boundary import boundary
from maskseg.benchmarks.cfm import cfm, crop_segments, make_proposals
from maskseg.benchmarks.report import table
from maskseg.data.datasets.scenes import make_scenes
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentMasks
from maskseg.structures import FeatureSpec
from maskseg.variants.cfm import classifier as cfm_module
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.settings import MaskingSettings, MLPSettings, PoolerSettings

pytest.importorskip("cv2")


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_image() -> np.ndarray:
    patches = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(patches).resize((80, 64), Image.Resampling.NEAREST))


def test_the_number_of_segments() -> None:
    few = make_proposals(make_image(), 5)
    many = make_proposals(make_image(), 300)
    assert (len(few), len(many)) == (5, 300)
    assert isinstance(many.masks, SegmentMasks)
    torch.testing.assert_close(many.masks.boxes(), many.boxes)


def test_a_segment_is_cropped_from_a_gray_background() -> None:
    segments = make_proposals(make_image(), 3)
    crops = crop_segments(make_image(), segments)
    assert crops.shape == (3, 3, 224, 224)
    assert isinstance(segments.masks, SegmentMasks)
    share = segments.masks.area() / (segments.boxes[:, 2:] - segments.boxes[:, :2]).prod(dim=1)
    torch.testing.assert_close(
        (crops != 0).any(dim=1).float().mean(dim=(1, 2)), share, atol=0.05, rtol=0
    )


@pytest.mark.usefixtures("at_home")
def test_a_round_of_cfm() -> None:
    config = configs.compose("benchmark", [*SCENES, "trunk=resnet18", "rounds=1"])
    numbers = cfm(config, proposals=12, crops=2, height=96, width=128)
    assert [one["name"].split(":")[0] for one in numbers["cases"]] == [
        "resnet18, p2-p5, full_map",
        "resnet18, p2-p5, pool_first",
        "resnet18, c4, full_map",
        "resnet18, c4, pool_first",
    ]
    for one in numbers["cases"]:
        assert list(one["seconds"]) == ["backbone", "CFM after it", "2 segments by themselves"]
        scaled = one["agreement"]["12 segments by themselves, s (scaled)"]
        assert scaled == pytest.approx(6 * one["seconds"]["2 segments by themselves"])
        assert (
            1 <= one["agreement"]["segments found"] <= 100
        )  # a segment may give several detections
    assert sum("projection, pooling of boxes and masks" in key for key in numbers["also"]) == 2
    assert "CFM after it over backbone" in table(numbers)


def test_the_boundary_of_an_untrained_network(at_home: Path) -> None:
    words = [
        *SCENES,
        "experiment=scenes_cfm",
        "model.backbone.channels=16",
        "model.classifier.mlp.width=16",
        "trainer.device=cpu",
        "output=out/b.json",
    ]
    numbers = boundary(configs.compose("benchmark", words), images=1)
    assert list(numbers["difference"]) == ["p2", "p3", "p4"]
    near, far = (numbers["difference"]["p2"][key] for key in ("0-4", "16-32"))
    assert near > far > 0
    assert numbers["segments"] > 1
    assert numbers == json.loads(json.dumps(numbers))
    names = {path.name for path in (at_home / "out").iterdir()}
    assert names == {"b.png", "b_001.png", "b_001_1.png", "b_001_2.png", "b_001_3.png"}
    with pytest.raises(UserError, match=r"output: out/b_001\.png already exists \(and 3 more"):
        boundary(configs.compose("benchmark", words), images=1)


@pytest.mark.usefixtures("at_home")
def test_refused_configs() -> None:
    with pytest.raises(UserError, match="no segment of the first 0 validation images"):
        boundary(
            configs.compose("benchmark", [*SCENES, "experiment=scenes_cfm", "trainer.device=cpu"]),
            images=0,
        )
    with pytest.raises(UserError, match=r"nothing\.pt"):
        boundary(configs.compose("benchmark", [*SCENES, "trainer.init=nothing.pt"]))


@pytest.mark.parametrize("design", ["full_map", "pool_first"])
def test_blocks_of_segments_give_the_same_scores(
    design: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = make_proposals(make_image(), 23)
    generator = torch.Generator().manual_seed(0)
    levels = {"p2": FeatureSpec(4, 0.5, 6), "p3": FeatureSpec(8, 0.5, 6)}
    model = CFMClassifier(
        ["p2", "p3"],
        levels,
        3,
        PoolerSettings(canonical_size=80.0),
        MaskingSettings(design),
        MLPSettings(width=8),
    )
    features = {
        name: torch.randn((1, 6, 64 // at.stride, 96 // at.stride), generator=generator)
        for name, at in levels.items()
    }
    assert segments.masks is not None
    expected = model(features, segments.boxes, segments.image_index, segments.masks)
    monkeypatch.setattr(cfm_module, "MIN_ROWS", 4)
    monkeypatch.setattr(cfm_module, "BLOCK_INPUTS", 5 * model.inputs)
    torch.testing.assert_close(
        model(features, segments.boxes, segments.image_index, segments.masks), expected
    )
