"""All readers of files of unknown origin, with valid files and strategies of hostile ones."""

from __future__ import annotations

import atexit
import functools
import io
import json
import pickle
import pickletools
import shutil
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fastapi import HTTPException
from fuzz.inputs import HOSTILE, documents, lines, mutated, trees
from hypothesis import strategies as st
from made.coco_files import SQUARE, dataset
from made.reviews import proposals
from PIL import Image

from maskseg import config as configs
from maskseg.annotation.jobs import run_jobs
from maskseg.annotation.review.guards import read_strokes
from maskseg.annotation.review.serve import CocoImageStore
from maskseg.annotation.review.state import ReviewFile
from maskseg.commands.compare import config_differences, metrics_table, read_runs
from maskseg.commands.convert import read_categories
from maskseg.commands.sweep import RESULT_FILE, report_trials
from maskseg.data.coco.categories import parse_categories
from maskseg.data.coco.checks import ImageRecord
from maskseg.data.coco.file import check_coco, read_coco
from maskseg.data.coco.packed_segmentations import (
    SegmentationError,
    SegmentationPacker,
    clip_polygon,
)
from maskseg.data.coco.report import Report
from maskseg.data.datasets.bsds import _read_segmentations, _to_segments
from maskseg.data.datasets.matlab import MatError
from maskseg.data.datasets.panoptic import _parse_annotations, _parse_file
from maskseg.data.datasets.semantic_maps import read_values
from maskseg.data.datasets.stuff import read_labels
from maskseg.data.datasets.voc import read_list
from maskseg.data.image_files import image_size, load_image
from maskseg.data.proposal_file import ImageProposals, ProposalFile, write_proposals
from maskseg.engine.checkpoint import load_checkpoint, save_checkpoint
from maskseg.engine.logs import _drop_later_lines
from maskseg.engine.run_folder import record
from maskseg.errors import UserError
from maskseg.files.documents import parse_json, parse_yaml
from maskseg.interop.weight_files import read_weights
from maskseg.masks.annotated import AnnotatedMasks, Polygons
from maskseg.masks.base import rle_from_counts
from maskseg.masks.superpixel import SegmentProposals
from maskseg.ops.rle import counts_from_string
from maskseg.structures import Categories
from maskseg.variants.cfm import store as segment_store
from maskseg.variants.cfm.rle_import import RleFile, segments_from_masks

HEIGHT, WIDTH = 20, 30  # of the images of `dataset`
MAX_PIXELS = 10_000


def _place(folder: Path, data: bytes, file_name: str) -> Path:
    path = folder / file_name
    path.write_bytes(data)
    return path


@dataclass(frozen=True)
class Reader:
    """A reader of one kind of file.

    file_name: of the file that `read` gets; seeds: valid files; structured: strategy of files
    whose content is mutated instead of the bytes; errors: what `read` may raise; names_file:
    whether its messages contain the file's name.
    """

    name: str
    file_name: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    structured: Callable[[], Any] | None = None
    errors: tuple[type[Exception], ...] = (UserError,)
    names_file: bool = True

    def place(self, folder: Path, data: bytes) -> Path:
        """Write the file into an otherwise unchanged folder."""
        return _place(folder, data, self.file_name)

    def strategy(self) -> Any:
        """Return the strategy of hostile files."""
        strategy = mutated(self.seeds())
        return strategy if self.structured is None else self.structured() | strategy


def _dump(*trees: Any) -> list[bytes]:
    return [json.dumps(tree).encode() for tree in trees]


# COCO files.
RLE = {"size": [HEIGHT, WIDTH], "counts": [45, 10, 10, 10, 525]}
COMPRESSED = rle_from_counts(np.array(RLE["counts"]), HEIGHT, WIDTH)["counts"]
COCO = dataset(
    {"bbox": [2, 5, 2, 10], "segmentation": RLE, "iscrowd": 1, "area": 20},
    {"bbox": [1, 1, 5, 5], "segmentation": {"size": [HEIGHT, WIDTH], "counts": COMPRESSED}},
    {"bbox": [1.5, 1, 5, 5], "segmentation": [], "keypoints": [2, 2, 2, 3, 3, 1]},
    {"bbox": [-5, 1, 50, 5], "segmentation": [[-5.0, 1, 45, 1, 45, 6, -5, 6], *SQUARE]},
)
COCO["categories"][0] |= {"keypoints": ["nose", "left_ear"], "skeleton": [[1, 2]]}
COCO["images"][0]["category_ids"] = [4]


def _read_coco(path: Path) -> None:
    assert check_coco(path, max_pixels=MAX_PIXELS).text()
    file = read_coco(path, check_images=False, max_pixels=MAX_PIXELS)
    for index, image in enumerate(file.images):
        shapes = [shape for shape in file.annotations(index).shapes if shape is not None]
        if shapes:
            _use_masks(AnnotatedMasks.from_file(shapes, image.height, image.width))
    json.dumps(file.to_dict())


def _use_masks(masks: AnnotatedMasks) -> None:
    height, width = masks.to_rle()[0]["size"]
    assert masks.to_bitmaps().shape == (len(masks), height, width)
    masks.crop_and_resize(torch.tensor([[0.0, 0.0, width, height]] * len(masks)), 14)
    assert torch.isfinite(masks.boxes()).all()
    assert torch.isfinite(masks.area()).all()


def _read_segmentations_of(path: Path) -> None:
    """The segmentation of an annotation: polygons or an RLE."""
    packer = SegmentationPacker(MAX_PIXELS)
    packer.add(parse_json(path.read_bytes()))
    packed = packer.to_segmentations()
    shape = packed.shape(0)
    height, width = HEIGHT, WIDTH
    if isinstance(shape, Polygons):
        parts = [clip_polygon(part, height, width) for part in shape.parts]
        shape = Polygons(tuple(part for part in parts if len(part)))
    elif shape is not None:
        height, width = int(packed.heights[0]), int(packed.widths[0])
    if shape is None or (isinstance(shape, Polygons) and not shape.parts):
        return
    _use_masks(AnnotatedMasks.from_file([shape], height, width))


def _read_rle_string(path: Path) -> None:
    counts = counts_from_string(path.read_bytes())
    assert counts.dtype == np.int64


# Images.
def _image_seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 17, 4), dtype=np.uint8)
    color = Image.fromarray(pixels[..., :3])
    gray = Image.fromarray(pixels[..., 0])
    seeds = []
    for image, kind, keys in (
        (color, "PNG", {}),
        (Image.fromarray(pixels), "PNG", {}),
        (color.quantize(), "PNG", {}),
        (gray.convert("1"), "PNG", {}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), "PNG", {}),
        (color, "JPEG", {}),
        (color, "JPEG", {"progressive": True}),
        (color.convert("CMYK"), "JPEG", {}),
        (color, "BMP", {}),
        (gray, "BMP", {}),
        (color.quantize(), "GIF", {}),
        (color, "TIFF", {}),
        (color, "TIFF", {"compression": "tiff_lzw"}),
        (color, "TIFF", {"compression": "jpeg"}),
        (gray, "TIFF", {"compression": "packbits"}),
        (color, "WEBP", {}),
        (Image.fromarray(pixels), "WEBP", {"lossless": True}),
        (color, "PPM", {}),
        (color, "JPEG2000", {}),
    ):
        exif = Image.Exif()
        exif[0x0112] = 6
        with_exif = {} if kind in ("BMP", "GIF", "PPM", "JPEG2000") else {"exif": exif}
        data = io.BytesIO()
        image.save(data, kind, **keys, **with_exif)
        seeds.append(data.getvalue())
    return seeds


def _read_image(path: Path) -> None:
    image = load_image(path)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    assert image_size(path) == tuple(image.shape[1:])


def _png_seeds() -> list[bytes]:
    return [data for data in _image_seeds() if data.startswith(b"\x89PNG")]


def _read_strokes(path: Path) -> None:
    try:
        read_strokes(path.read_bytes(), 12, 17)
    except HTTPException as error:
        if error.status_code not in (413, 415, 422):
            raise


# Binary stores.
def _save(content: Any, zipped: bool = True) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, _use_new_zipfile_serialization=zipped)
    return data.getvalue()


_PROPOSAL_IMAGES = ((7, HEIGHT, WIDTH), (3, HEIGHT, WIDTH))


@functools.cache
def _proposal_content() -> Any:
    path = _temporary_folder() / "proposals.pt"
    boxes = torch.tensor([[1.0, 2, 5, 6], [3, 3, 9, 9]])
    images = [
        ImageProposals(i, h, w, boxes, torch.tensor([0.9, 0.5])) for i, h, w in _PROPOSAL_IMAGES
    ]
    write_proposals(path, images, "data")
    return torch.load(path, weights_only=True)


def _read_proposals(path: Path) -> None:
    file = ProposalFile(path, _PROPOSAL_IMAGES)
    for image_id, height, width in _PROPOSAL_IMAGES:
        boxes, scores = file.load(image_id, height, width)
        assert boxes.shape == (len(scores), 4)


TENSORS = [
    torch.zeros(0),
    torch.zeros(2, 2),
    torch.full((3,), float("nan")),
    torch.full((3,), -1),
    torch.tensor([0, 2**40, 2**62]),
    torch.tensor(5),
    torch.zeros(3, dtype=torch.bool),
    torch.zeros(2, 4, dtype=torch.float64),
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(3).to_sparse(),
    torch.zeros(1).expand(1000, 1000),
]


@st.composite
def _saved(draw: st.DrawFn, seed: Any) -> bytes:
    """Draw a file of torch with mutated values and tensors."""
    tree = draw(trees([seed]))
    if isinstance(tree, dict) and tree and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(tree, key=str)))
        tree[key] = draw(st.sampled_from(TENSORS))
    return _save(tree, draw(st.booleans()))


@functools.cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="maskseg_fuzz_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _segment_seeds() -> list[bytes]:
    path = _temporary_folder() / "7.npz"
    labels = (np.arange(HEIGHT * WIDTH) % 9).reshape(HEIGHT, WIDTH).astype(np.int32)
    members = np.random.default_rng(0).random((5, 9)) < 0.5
    segment_store._write_segments(path, SegmentProposals(labels, members))
    return [path.read_bytes()]


def _npy(dtype: str, shape: Any, data: bytes) -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@st.composite
def _archives(draw: st.DrawFn) -> bytes:
    """Draw an archive of arrays with a mutated header or content."""
    arrays = {
        "shape": ("<i8", (4,), np.array([HEIGHT, WIDTH, 5, 9]).tobytes()),
        "labels": ("<u2", (HEIGHT, WIDTH), (np.arange(HEIGHT * WIDTH) % 9).astype("<u2").tobytes()),
        "members": ("|u1", (5, 2), bytes(10)),
    }
    name = draw(st.sampled_from(sorted(arrays)))
    dtype, shape, data = arrays[name]
    sizes = st.sampled_from([0, 1, -1, 9, 2**31, 2**62])
    edit = draw(st.sampled_from(("dtype", "shape", "data", "sides")))
    if edit == "dtype":
        dtype = draw(st.sampled_from(["|O", "<f4", ">i8", "|S9999999", "<M8", "junk", "|b1"]))
    elif edit == "shape":
        shape = draw(st.lists(sizes, max_size=3).map(tuple) | st.sampled_from(HOSTILE))
    elif edit == "data":
        data = draw(st.binary(max_size=60))
    else:
        name, dtype, shape = "shape", "<i8", (4,)
        sides = draw(st.lists(sizes, min_size=4, max_size=4))
        data = np.array(sides, dtype=np.int64).tobytes()
    arrays[name] = (dtype, shape, data)
    kind = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", kind) as archive:
        for key, values in arrays.items():
            archive.writestr(f"{key}.npy", _npy(*values))
    return content.getvalue()


# MATLAB files.
def _mat_seeds() -> list[bytes]:
    import scipy.io

    seeds = []
    for compressed in (False, True):
        truths = np.empty((1, 2), dtype=object)
        for i in range(2):
            numbers = np.ones((4, 5), dtype=np.uint16)
            numbers[:, 3:] = 2
            truths[0, i] = {"Segmentation": numbers, "Boundaries": numbers > 1}
        data = io.BytesIO()
        scipy.io.savemat(data, {"groundTruth": truths}, do_compression=compressed)
        seeds.append(data.getvalue())
    return seeds


def _read_mat(path: Path) -> None:
    for array in _read_segmentations(path):
        assert _to_segments(array).ndim == 2


# Weights.
STATE = {"a.weight": np.arange(6.0).reshape(2, 3), "a.bias": np.ones(2, np.float16)}


def _pickle_seeds() -> list[bytes]:
    content = {"model": STATE, "__author__": "somebody", "n": [1, 2.5, None, (True,)]}
    return [pickle.dumps(content, protocol) for protocol in range(6)]


@st.composite
def _opcodes(draw: st.DrawFn) -> bytes:
    """Draw a program of random opcodes with short arguments."""
    codes = st.sampled_from([opcode.code.encode("latin1") for opcode in pickletools.opcodes])
    arguments = st.sampled_from(
        [
            b"",
            b"\x00",
            b"\x01a",
            b"\xff\xff\xff\x7f",
            b"cnumpy\nndarray\n",
            b"1\n",
            b"K\x01K\x02\x86",
        ]
    )
    steps = draw(st.lists(st.tuples(codes, arguments), max_size=25))
    return b"\x80\x02" + b"".join(code + argument for code, argument in steps) + b"."


def _torch_state() -> dict[str, Any]:
    tensors = OrderedDict((name, torch.from_numpy(values)) for name, values in STATE.items())
    return {"model": tensors, "epoch": 3, "args": {"lr": 0.1}}


def _torch_seeds() -> list[bytes]:
    return [_save(_torch_state(), zipped) for zipped in (True, False)]


# Checkpoints of this package.
@functools.cache
def _checkpoint() -> dict[str, Any]:
    config = configs.compose("train", ["experiment=scenes_r18"])
    categories = Categories(("cat", "dog"), (1, 2))
    configs.set_categories(config, categories)
    content = {
        "config": configs.to_yaml(config),
        "categories": categories.to_dict(),
        "model": {"a.weight": torch.ones(2, 2)},
        "step": 3,
        "metrics": {"bbox/AP": 0.5},
    }
    path = _temporary_folder() / "checkpoint.pt"
    save_checkpoint(path, content)
    return dict(torch.load(path, weights_only=True))


def _read_checkpoint(path: Path) -> None:
    """As `trained_model`, but without the model."""
    checkpoint = load_checkpoint(path)
    try:
        Categories.from_dict(checkpoint["categories"])
        text = checkpoint["config"]
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        return
    configs.from_checkpoint(text, [], "predict")


@st.composite
def _checkpoints(draw: st.DrawFn) -> bytes:
    """Draw a checkpoint with mutated values, or a mutated config."""
    content = dict(_checkpoint())
    if draw(st.booleans()):
        return draw(_saved(content))
    content["config"] = draw(_yaml(content["config"]))
    return _save(content)


@st.composite
def _yaml(draw: st.DrawFn, text: str) -> str:
    tree = draw(trees([yaml.safe_load(text)]))
    return yaml.safe_dump(tree, allow_unicode=True, default_flow_style=draw(st.booleans()))


# Run folders.
METRICS: list[Any] = [
    {"step": 1, "kind": "train", "loss": 2.5, "loss/cls": 1.0, "lr": 0.01},
    {"step": 2, "kind": "train", "loss": 2.0, "loss/cls": 0.5, "lr": 0.02},
    {"step": 2, "kind": "val", "bbox/AP": 0.5, "segm/AP50": 0.25, "loss": 2.0},
]
ENVIRONMENT: Any = [
    {"time": "2026-01-01 00:00:00 +0000", "from_step": 0, "versions": {"torch": "2"}}
]
CONFIG: Any = {"name": "x", "optimizer": {"lr": 0.01, "betas": [0.9, 0.99]}, "data": None}


def _lines(entries: list[Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def _read_run(path: Path) -> None:
    """The metrics of a run: those of `compare`, and the resumed log."""
    runs = read_runs([path.parent])
    metrics_table(runs)
    config_differences([*runs, *runs])
    _drop_later_lines(path, 1, 1)
    _drop_later_lines(path, 0, 0)


def _read_config(path: Path) -> None:
    _place(path.parent, _lines(METRICS), "metrics.jsonl")
    runs = read_runs([path.parent])
    config_differences([*runs, *runs])


def _read_environment(path: Path) -> None:
    record(path.parent, torch.device("cpu"), 1, 0)


def _read_trial(path: Path) -> None:
    report_trials(path.parents[1], {"optimizer.lr"})


class _Trial(Reader):
    """The result of a trial of a sweep lies in a folder of its own."""

    def place(self, folder: Path, data: bytes) -> Path:
        (folder / "trials" / "0").mkdir(parents=True, exist_ok=True)
        return _place(folder / "trials" / "0", data, self.file_name)


TRIAL = {"overrides": ["optimizer.lr=0.1"], "metric": "bbox/AP", "value": 0.5, "problem": ""}


# The review page.
def _read_review(path: Path) -> None:
    for leftover in path.parent.glob("masks.json.journal"):
        leftover.unlink()
    file = ReviewFile(path, path.with_name("reviewed.json"), delay=1e6)
    try:
        for row in file.rows()[:3]:
            file.decide(row.id, "rejected")
        file.undo()
    finally:
        file.close()
        path.with_name("reviewed.json").unlink(missing_ok=True)
    coco = read_coco(path, check_images=False, max_pixels=MAX_PIXELS)
    store = CocoImageStore(coco, path.parent, MAX_PIXELS)
    for row in file.rows():
        if row.image_id in coco.index_of:
            store.mask(file.annotation(row.id))


def _read_journal(path: Path) -> None:
    _place(path.parent, json.dumps(proposals()).encode(), "masks.json")
    file = ReviewFile(path.with_name("masks.json"), delay=1e6)
    file.close()


JOURNAL = [{**annotation, "review": "accepted"} for annotation in proposals()["annotations"]]


# Other formats.
RECORDS = [ImageRecord(1, "1.png", HEIGHT, WIDTH), ImageRecord(2, "2.png", HEIGHT, WIDTH)]
MASKS = [
    {"image_id": 1, "segmentation": RLE, "score": 0.5},
    {"image_id": 2, "segmentation": SQUARE, "score": 1},
    {"image_id": 2, "segmentation": {"size": [HEIGHT, WIDTH], "counts": COMPRESSED}, "score": 0},
]


def _read_masks(path: Path) -> None:
    for job in RleFile(path, RECORDS, RECORDS, 10, MAX_PIXELS):
        segments_from_masks(job)


PANOPTIC = {
    "annotations": [
        {
            "image_id": 1,
            "file_name": "1.png",
            "segments_info": [
                {"id": 5, "category_id": 4},
                {"id": 6, "category_id": 4, "iscrowd": 1},
            ],
        }
    ],
    "categories": [{"id": 4, "name": "cat", "isthing": 1}],
}


def _read_panoptic(path: Path) -> None:
    report = Report(str(path))
    entries, category_ids = _parse_file(path, report)
    _parse_annotations(entries, {1, 2}, category_ids, report)
    report.text()


def _parse_category_file(path: Path) -> None:
    read_categories(path)
    report = Report(str(path))
    parse_categories(parse_json(path.read_bytes())["categories"], report)


def _read_store_settings(path: Path) -> None:
    segment_store.check_settings(path.parent, {"data": "/x/train.json", "sigma": 0.5})


def _read_map(path: Path) -> None:
    read_values(path, 12, 17, MAX_PIXELS)


JOBS: list[Any] = [{"format": "maskseg annotations 1", "keys": [1]}, [7, [1]], [9, [2]]]


def _read_job_journal(path: Path) -> None:
    run_jobs([], _refuse, path, {"keys": [1]}, 1, "masks")


def _refuse(_: Any) -> None:
    raise AssertionError


def _text(*texts: str) -> Callable[[], list[bytes]]:
    return lambda: [text.encode() for text in texts]


READERS: tuple[Reader, ...] = (
    Reader("COCO JSON", "data.json", _read_coco, lambda: _dump(COCO), lambda: documents([COCO])),
    Reader(
        "categories",
        "classes.json",
        _parse_category_file,
        lambda: _dump(COCO),
        lambda: documents([{"categories": COCO["categories"] * 2}]),
    ),
    Reader(
        "segmentation",
        "segmentation.json",
        _read_segmentations_of,
        lambda: _dump(RLE, SQUARE, COCO["annotations"][2]["segmentation"]),
        lambda: documents([RLE, SQUARE, COCO["annotations"][2]["segmentation"]]),
        (SegmentationError, ValueError),
        names_file=False,
    ),
    Reader(
        "RLE string",
        "rle.txt",
        _read_rle_string,
        _text(COMPRESSED, "0" * 40, "oo0"),
        lambda: st.text("0123456789:;<=>?@OPQXYZ^_`abcmno", max_size=60).map(str.encode),
        (ValueError,),
        names_file=False,
    ),
    Reader("image", "image.bin", _read_image, _image_seeds),
    Reader("semantic map", "map.png", _read_map, _png_seeds),
    Reader("strokes", "strokes.png", _read_strokes, _png_seeds, errors=()),
    Reader(
        "proposal file",
        "proposals.pt",
        _read_proposals,
        lambda: [_save(_proposal_content())],
        lambda: _saved(_proposal_content()),
    ),
    Reader(
        "segment store",
        "7.npz",
        lambda path: segment_store.read_segments(path, HEIGHT, WIDTH),
        _segment_seeds,
        _archives,
    ),
    Reader(
        "segment settings",
        segment_store.SETTINGS_FILE,
        _read_store_settings,
        lambda: _dump({"format": segment_store.FORMAT, "data": "/x/train.json", "sigma": 0.5}),
        lambda: documents([{"format": segment_store.FORMAT, "data": "x", "images": "y"}]),
        names_file=False,
    ),
    Reader(
        "MATLAB file",
        "a.mat",
        _read_mat,
        _mat_seeds,
        errors=(MatError,),
        names_file=False,
    ),
    Reader("pickle", "weights.pkl", read_weights, _pickle_seeds, _opcodes),
    Reader(
        "torch weights", "weights.pth", read_weights, _torch_seeds, lambda: _saved(_torch_state())
    ),
    Reader(
        "checkpoint",
        "checkpoint.pt",
        _read_checkpoint,
        lambda: [_save(_checkpoint())],
        _checkpoints,
        names_file=False,
    ),
    Reader(
        "metrics",
        "metrics.jsonl",
        _read_run,
        lambda: [_lines(METRICS)],
        lambda: lines(METRICS),
        names_file=False,
    ),
    Reader(
        "config of a run",
        "config.yaml",
        _read_config,
        lambda: [yaml.safe_dump(CONFIG).encode()],
        lambda: _yaml(yaml.safe_dump(CONFIG)).map(lambda text: text.encode("utf-8", "replace")),
    ),
    Reader(
        "YAML",
        "x.yaml",
        lambda path: parse_yaml(path.read_text(encoding="utf-8")),
        lambda: [yaml.safe_dump(CONFIG).encode(), b"a: &x [1]\nb: *x\n", b"!!python/object:x {}\n"],
        lambda: st.text("ab: -[]{},&*!|>\n'\"#?%@0123e.~", max_size=60).map(str.encode),
        (ValueError,),
        names_file=False,
    ),
    Reader(
        "environment",
        "environment.json",
        _read_environment,
        lambda: _dump(ENVIRONMENT),
        lambda: documents([ENVIRONMENT]),
    ),
    _Trial(
        "trial of a sweep",
        RESULT_FILE,
        _read_trial,
        lambda: _dump(TRIAL),
        lambda: documents([TRIAL]),
    ),
    Reader(
        "reviewed file",
        "masks.json",
        _read_review,
        lambda: _dump(proposals()),
        lambda: documents([proposals()]),
        names_file=False,
    ),
    Reader(
        "journal of a review",
        "masks.json.journal",
        _read_journal,
        lambda: [_lines(JOURNAL)],
        lambda: lines(JOURNAL),
        names_file=False,
    ),
    Reader(
        "journal of jobs",
        "jobs.jsonl",
        _read_job_journal,
        lambda: [_lines(JOBS)],
        lambda: lines(JOBS),
    ),
    Reader(
        "masks as RLE",
        "masks.json",
        _read_masks,
        lambda: _dump(MASKS),
        lambda: documents([MASKS]),
    ),
    Reader(
        "panoptic JSON",
        "panoptic.json",
        _read_panoptic,
        lambda: _dump(PANOPTIC),
        lambda: documents([PANOPTIC]),
    ),
    Reader(
        "labels",
        "labels.txt",
        lambda path: read_labels(path, "key"),
        _text("1: accordion\n2: cat\n\n33: dog\n"),
        lambda: st.text("0123456789: ²a\n\0", max_size=60).map(str.encode),
    ),
    Reader("VOC list", "train.txt", read_list, _text("2007_000032\n2008_000123\n")),
)
