"""The result of a prediction: selection, masks as RLE, plots, files, conversions."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from made.fixed_model import CATEGORIES, FixedModel, random_detections
from made.runs import ROOT
from PIL import Image
from pycocotools import mask as coco_mask

from maskseg.data.single_image import SingleImage
from maskseg.errors import UserError
from maskseg.evaluation.coco_results import detection_rows
from maskseg.inference.prediction import Prediction
from maskseg.inference.predictor import Predictor
from maskseg.masks.base import rle_to_bitmaps
from maskseg.structures import Regions

SIZE = (60, 90)


def image_of(value: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.full((*size, 3), value, dtype=np.uint8)


def predict(count: int = 12, detections: Regions | None = None, **keys: Any) -> Prediction:
    model = FixedModel(random_detections(count, *SIZE) if detections is None else detections)
    return Predictor(model, CATEGORIES, SingleImage(), **keys)(image_of())


def test_masks_are_the_rle_of_the_dense_masks_bit_for_bit() -> None:
    detections = random_detections(40, *SIZE)
    prediction = predict(detections=detections)
    assert detections.masks is not None
    dense = detections.masks.to_bitmaps()
    assert torch.equal(prediction.masks, torch.from_numpy(dense))
    for rle, mask in zip(prediction.rles or (), dense, strict=True):
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle == {"size": list(SIZE), "counts": encoded["counts"].decode()}
    assert prediction.areas.tolist() == dense.sum(axis=(1, 2)).tolist()


def test_masks_in_the_frame_of_the_file() -> None:
    # The model saw the image at half its size.
    small = random_detections(20, 30, 45)
    transform = [HalfSize()]
    predictor = Predictor(FixedModel(small), CATEGORIES, SingleImage(transform))  # type: ignore[arg-type]
    prediction = predictor(image_of())
    batch, outputs = predictor.outputs(torch.from_numpy(image_of()).permute(2, 0, 1), 1)
    assert prediction.to_coco(1) == detection_rows(batch, outputs, CATEGORIES)
    assert prediction.masks.shape == (20, *SIZE)


class HalfSize:
    """A transform that keeps every second pixel."""

    def __call__(self, sample: Any, rng: Any) -> Any:
        del rng
        return replace(sample, image=sample.image[:, ::2, ::2])


def test_selection() -> None:
    prediction = predict()
    assert len(prediction) == 12
    assert prediction[-1].scores.tolist() == prediction.scores[-1:].tolist()
    assert prediction[np.int64(3)].names == ["disc"]
    for index in (slice(2, 5), slice(None, None, -2), slice(20, 30)):
        rows = list(range(12))[index]
        assert_rows(prediction[index], prediction, rows)
    assert_rows(prediction[[4, 1]], prediction, [4, 1])
    assert_rows(prediction[[]], prediction, [])
    assert_rows(prediction[prediction.scores > 0.5], prediction, [0, 1, 2, 3, 4, 5, 6])
    assert_rows(prediction[np.arange(12) == 5], prediction, [5])
    parts = list(prediction)
    assert [len(part) for part in parts] == [1] * 12
    assert torch.equal(torch.cat([part.masks for part in parts]), prediction.masks)
    for index in (12, -13, [True] * 3):
        with pytest.raises(IndexError):
            prediction[index]


def assert_rows(selected: Prediction, prediction: Prediction, rows: list[int]) -> None:
    assert torch.equal(selected.boxes, prediction.boxes[rows])
    assert torch.equal(selected.labels, prediction.labels[rows])
    assert torch.equal(selected.masks, prediction.masks[rows])
    assert selected.names == [prediction.names[i] for i in rows]


def test_filtering_by_score_and_class() -> None:
    prediction = predict()
    high = prediction.filter(min_score=0.5)
    assert high.scores.min() >= 0.5
    assert len(high) == int((prediction.scores >= 0.5).sum())
    assert set(prediction.filter(classes="box").names) == {"box"}
    assert set(prediction.filter(classes=[90, "box"]).names) == {"star", "box"}
    assert len(prediction.filter(min_score=0.5, classes=["disc"])) == 3
    assert len(prediction.filter(classes=[])) == 0
    for classes, message in (
        ("dics", "there is no 'dics'; did you mean 'disc'?"),
        (0, r"there is no 0, but disc \(id 7\), box \(id 3\), star \(id 90\)"),
    ):
        with pytest.raises(UserError, match=message):
            prediction.filter(classes=classes)


def test_repr_is_short(tmp_path: Path) -> None:
    assert repr(predict(4)) == "Prediction(image, 60 x 90, 4 objects: 2 disc, 1 box, 1 star)"
    assert repr(predict(1)) == "Prediction(image, 60 x 90, 1 object: 1 disc)"
    assert repr(predict(0)) == "Prediction(image, 60 x 90, 0 objects)"
    Image.fromarray(image_of()).save(tmp_path / "photo.png")
    model = FixedModel(random_detections(2, *SIZE))
    prediction = Predictor(model, CATEGORIES, SingleImage())(tmp_path / "photo.png")
    assert repr(prediction).startswith("Prediction(photo.png, ")


def test_polygons_cover_the_masks() -> None:
    prediction = predict(5)
    for outlines, mask in zip(prediction.polygons(), prediction.masks, strict=True):
        assert all(outline.shape[1] == 2 for outline in outlines)
        parts = [outline.ravel().tolist() for outline in outlines]
        filled = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, *SIZE)))
        assert (filled.astype(bool) & mask.numpy()).sum() == mask.sum()


def test_a_model_without_masks() -> None:
    boxes_only = predict(detections=replace(random_detections(3, *SIZE), masks=None))
    assert boxes_only.rles is None
    assert "segmentation" not in boxes_only.to_coco()[0]
    assert boxes_only.plot().size[0] > 90
    for use in (lambda: boxes_only.masks, lambda: boxes_only.areas, boxes_only.polygons):
        with pytest.raises(UserError, match="predicts no masks"):
            use()
    assert boxes_only[:0].masks.shape == (0, *SIZE)
    for what in ("segments", "classes", "boxes"):
        with pytest.raises(UserError, match="plot: "):
            boxes_only.plot(what)


def test_plots_draw_what_has_enough_score() -> None:
    prediction = predict()
    whole = np.asarray(prediction.plot(min_score=0.0))
    assert whole.dtype == np.uint8
    assert max(whole.shape) >= 640  # small images are enlarged
    default = np.asarray(prediction.plot())
    assert np.array_equal(default, np.asarray(prediction.plot(min_score=0.5)))
    assert not np.array_equal(default, whole)
    assert np.array_equal(np.asarray(prediction.filter(0.0).plot()), whole)
    assert np.array_equal(np.asarray(predict(min_score=0.0).plot()), whole)


def test_plots_read_the_image_again(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(image_of(80)).save(path)
    predictor = Predictor(FixedModel(random_detections(3, *SIZE)), CATEGORIES, SingleImage())
    prediction = predictor(path)
    assert prediction.path == path
    assert np.array_equal(prediction.image, image_of(80))
    restored = pickle.loads(pickle.dumps(prediction))
    assert np.array_equal(np.asarray(restored.plot()), np.asarray(prediction.plot()))
    Image.fromarray(image_of(80, (8, 8))).save(path)
    with pytest.raises(UserError, match=r"photo\.png: the image has changed"):
        prediction.plot()
    path.unlink()
    with pytest.raises(UserError, match="no such image file"):
        prediction.plot()
    with pytest.raises(UserError, match="has no image"):
        replace(prediction, source=None).plot()


def test_saving(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(image_of()).save(photo)
    predictor = Predictor(FixedModel(random_detections(3, *SIZE)), CATEGORIES, SingleImage())
    prediction = predictor(photo)
    for name, kind in (("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.webp", "WEBP")):
        assert prediction.save(tmp_path / name) == tmp_path / name
        assert Image.open(tmp_path / name).format == kind
    prediction.save(str(tmp_path / "rows.json"))
    assert json.loads((tmp_path / "rows.json").read_text()) == prediction.to_coco()
    with pytest.raises(UserError, match=r"a\.png already exists"):
        prediction.save(tmp_path / "a.png")
    prediction[:0].save(tmp_path / "a.png", overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is an input file"):
            prediction.save(photo, overwrite=overwrite)
    with pytest.raises(UserError, match=r"notes\.txt is no name of a plot"):
        prediction.save(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="could not be written"):
        prediction.save(tmp_path / "absent" / "a.png")


def test_to_supervision_calls_it_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for the arguments alone; the next test uses the real package where it is installed.
    class Detections:
        def __init__(self, **fields: Any) -> None:
            self.fields = fields

    package = ModuleType("supervision")
    package.Detections = Detections  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", package)
    prediction = predict(5)
    fields = prediction.to_supervision().fields
    assert set(fields) == {"xyxy", "mask", "confidence", "class_id", "data"}
    assert np.array_equal(fields["xyxy"], prediction.boxes.numpy())
    assert fields["xyxy"].dtype == np.float32
    assert np.array_equal(fields["mask"], prediction.masks.numpy())
    assert fields["mask"].dtype == bool
    assert np.array_equal(fields["confidence"], prediction.scores.numpy())
    assert fields["class_id"].tolist() == [0, 1, 2, 0, 1]
    assert fields["data"]["class_name"].tolist() == prediction.names
    assert prediction[:0].to_supervision().fields["xyxy"].shape == (0, 4)


def test_to_supervision() -> None:
    pytest.importorskip("supervision")
    prediction = predict(5)
    detections: Any = prediction.to_supervision()
    assert len(detections) == 5
    assert np.array_equal(detections.mask, prediction.masks.numpy())
    assert detections.data["class_name"].tolist() == prediction.names
    assert len(predict(0).to_supervision()) == 0


def test_to_pandas_calls_it_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("pandas")
    package.DataFrame = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", package)
    prediction = predict(5)
    columns = dict(prediction.to_pandas())
    assert list(columns) == [
        *("name", "score", "x1", "y1", "x2", "y2", "label", "category_id", "area"),
    ]
    assert columns["category_id"] == [7, 3, 90, 7, 3]
    assert np.array_equal(columns["y2"], prediction.boxes[:, 3].numpy())
    assert columns["area"].tolist() == prediction.areas.tolist()


def test_to_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    table = predict(5).to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert len(table) == 5
    assert len(predict(0).to_pandas()) == 0


@pytest.mark.parametrize("package", ["pandas", "supervision"])
def test_an_absent_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"to_{package}\(\) needs .* pip install {package}"):
        getattr(predict(2), f"to_{package}")()


LARGE = """
import resource, sys
import numpy as np, torch
from PIL import Image
from made.fixed_model import CATEGORIES, FixedModel, random_detections
from maskseg.data.single_image import SingleImage
from maskseg.data.transforms import ResizeShortestEdge
from maskseg.inference.predictor import Predictor

torch.set_num_threads(1)
model = FixedModel(random_detections(300, 480, 640, largest=0.5))
predictor = Predictor(model, CATEGORIES, SingleImage([ResizeShortestEdge([480])]))
predictor(np.zeros((48, 64, 3), np.uint8))  # what is allocated once
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
prediction = predictor(sys.argv[1])
assert prediction.size == (3000, 4000) and len(prediction) == 300
prediction.to_coco()
prediction.filter(0.5, "disc").areas
prediction[0].masks.sum()
prediction[:10].polygons()
print(peak() - before, sum(prediction.areas.tolist()))
"""


def test_twelve_megapixels_and_300_objects_stay_below_200_mb(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (4000, 3000), (90, 140, 30)).save(path)
    process = subprocess.run(
        [sys.executable, "-c", LARGE, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    megabytes, area = map(float, process.stdout.split())
    assert area > 80e6  # the dense masks would take 3,600 MB
    assert megabytes < 200


def test_bitmaps_are_decoded_when_asked_for() -> None:
    prediction = predict(3)
    assert np.array_equal(prediction.masks.numpy(), rle_to_bitmaps(prediction.rles or ()))
    assert not any(isinstance(v, torch.Tensor) for v in (prediction.rles, prediction.source))
    assert prediction.detections.masks is None
