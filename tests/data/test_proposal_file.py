"""Proposal files: round trip, transforms with the image, and invalid files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made.training import make_model, make_source, write_scenes

from maskseg.data.proposal_file import ImageProposals, ProposalFile, write_proposals
from maskseg.data.transforms import Flip, RandomCrop, ResizeShortestEdge
from maskseg.errors import UserError
from maskseg.models.file_proposer import FileProposer
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch


def proposals(image_id: int, height: int, width: int, count: int, seed: int = 0) -> ImageProposals:
    rng = np.random.default_rng([seed, abs(image_id)])
    corners = rng.random((count, 2, 2)).astype(np.float32) * np.array(
        [width, height], dtype=np.float32
    )
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return ImageProposals(
        image_id,
        height,
        width,
        torch.from_numpy(boxes),
        torch.from_numpy(rng.random(count).astype(np.float32)).sort(descending=True).values,
    )


def write(path: Path, *images: ImageProposals) -> Path:
    write_proposals(path, images, "some.json by some.pt")
    return path


def test_written_proposals_are_read_back(tmp_path: Path) -> None:
    given = [
        proposals(7, 480, 640, 1000),
        proposals(2**40, 64, 4000, 0),
        proposals(-3, 1333, 800, 5),
    ]
    path = write(tmp_path / "a.proposals", *given)
    assert path.stat().st_size < 10 * 1005 + 4000  # 10 bytes each
    found = ProposalFile(path, [(image.image_id, image.height, image.width) for image in given])
    for image in given:
        boxes, scores = found.load(image.image_id, image.height, image.width)
        assert boxes.dtype == scores.dtype == torch.float32
        assert boxes.shape == image.boxes.shape
        assert torch.allclose(boxes, image.boxes, atol=max(image.height, image.width) / 65535)
        assert torch.allclose(scores, image.scores, atol=1e-5)
        assert (scores[1:] <= scores[:-1]).all()


def test_invalid_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.proposals", proposals(1, 40, 60, 3), proposals(2, 40, 60, 3))
    with pytest.raises(
        UserError,
        match=r"a\.proposals is of another dataset \(some\.json by some\.pt\): "
        r"it lacks image 5 \(2 of 3 are missing\)",
    ):
        ProposalFile(path, [(1, 40, 60), (5, 40, 60), (6, 40, 60)])
    with pytest.raises(UserError, match=r"image 2 is 40 x 60 there, not 60 x 40"):
        ProposalFile(path, [(1, 40, 60), (2, 60, 40)])
    with pytest.raises(UserError, match="no such file of proposals; tools/propose"):
        ProposalFile(tmp_path / "absent", [])
    (tmp_path / "cut").write_bytes(path.read_bytes()[:200])
    torch.save({"format": "something else"}, tmp_path / "other")
    for name in ("cut", "other"):
        with pytest.raises(UserError, match="not a file of proposals"):
            ProposalFile(tmp_path / name, [])


LARGE = torch.zeros(3, dtype=torch.int64)
DAMAGE: dict[str, list[object]] = {
    "starts": [
        None,
        [0, 3, 6],
        torch.tensor([0, 3]),
        torch.tensor([0, 3, 7]),
        torch.tensor([0, 9, 6]),
        torch.tensor([-1, 3, 6]),
        torch.tensor([1, 3, 6]),
        torch.tensor([0.0, 3.0, 6.0]),
        torch.tensor(3),
        LARGE[:1].expand(3),
    ],
    "boxes": [
        None,
        "x",
        torch.zeros(6, 4),
        torch.zeros(5, 4, dtype=torch.uint16),
        torch.zeros(6, 1, dtype=torch.uint16),
        torch.zeros(24, dtype=torch.uint16),
        torch.zeros(4, 6, dtype=torch.uint16).T,
        torch.zeros(1, 1, dtype=torch.uint16).expand(6, 4),
        torch.zeros(1, dtype=torch.uint16).expand(350_000_000, 4),
    ],
    "scores": [None, torch.zeros(6), torch.zeros(5, dtype=torch.uint16)],
    "image_ids": [None, [1, 2], torch.tensor([1, 1]), torch.tensor([1]), torch.tensor([1.0, 2.0])],
    "sizes": [None, [[40, 60]], torch.tensor([[40, 60]]), torch.tensor([40, 60, 40, 60])],
    "format": [None, 1, "maskseg proposals 2", torch.zeros(2)],
}


@pytest.mark.parametrize("key", DAMAGE)
def test_wrong_content_is_refused_in_one_line(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.proposals", proposals(1, 40, 60, 3), proposals(2, 40, 60, 3))
    content = torch.load(path, weights_only=True)
    images = [(1, 40, 60), (2, 40, 60)]
    changes = [content | {key: value} for value in DAMAGE[key]]
    changes.append({name: value for name, value in content.items() if name != key})
    for changed in changes:
        torch.save(changed, path)
        with pytest.raises(UserError, match=r"a\.proposals: .*(damaged|proposals)") as raised:
            ProposalFile(path, images)
        assert "\n" not in str(raised.value)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.proposals", proposals(1, 40, 60, 100))
    whole = path.read_bytes()
    values = torch.load(path, weights_only=True)["boxes"].numpy().tobytes()
    position = whole.index(values)
    for offset in (0, 7, len(values) - 1):
        content = bytearray(whole)
        content[position + offset] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.proposals: damaged, the checksum .* is wrong"):
            ProposalFile(path, [(1, 40, 60)])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 4)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_ids", None),
        ("image_ids", [1, 2]),
        ("image_ids", torch.tensor([1])),
        ("sizes", torch.tensor([40, 60])),
        ("sizes", torch.zeros(2, 3, dtype=torch.int64)),
        ("starts", torch.tensor([0, 3])),
        ("starts", torch.tensor([0, 3, 7])),
        ("starts", torch.tensor([0, 9, 6])),
        ("starts", torch.tensor([-1, 3, 6])),
        ("starts", torch.tensor([0.0, 3.0, 6.0])),
        ("boxes", torch.zeros(6, 4)),
        ("boxes", torch.zeros(6, 3, dtype=torch.uint16)),
        ("scores", torch.zeros(5, dtype=torch.uint16)),
        ("scores", torch.zeros(6).to_sparse()),
    ],
)
def test_tensors_that_do_not_fit_each_other(tmp_path: Path, name: str, value: object) -> None:
    path = write(tmp_path / "a.proposals", proposals(1, 40, 60, 3), proposals(2, 40, 60, 3))
    content = torch.load(path, weights_only=True)
    torch.save({**content, name: value}, path)
    with pytest.raises(
        UserError, match=r"a\.proposals: (the file of proposals is damaged|refused)"
    ):
        ProposalFile(path, [(1, 40, 60)])
    del content[name]
    torch.save(content, path)
    with pytest.raises(UserError, match=f"damaged: {name} is missing"):
        ProposalFile(path, [(1, 40, 60)])


def test_proposals_are_transformed_with_the_image(scenes: Path, tmp_path: Path) -> None:
    """Proposals that equal the ground-truth boxes stay equal."""
    file = make_source(scenes).train
    truth = [file.annotations(i).boxes for i in range(len(file.images))]
    images = zip(file.images, truth, strict=True)
    exact = [
        ImageProposals(
            r.id, r.height, r.width, torch.from_numpy(b), torch.linspace(0.9, 0.8, len(b))
        )
        for r, b in images
    ]
    path = str(write(tmp_path / "a.proposals", *exact))
    transforms = [Flip(1.0, 1.0), ResizeShortestEdge([90], 200), RandomCrop(200)]
    batches = list(
        make_source(scenes, transforms, train_proposals=path, num_workers=2).train_loader(2, 4, 0)
    )
    for batch in batches:
        assert batch.proposals is not None
        assert batch.targets is not None
        assert torch.allclose(batch.proposals.boxes, batch.targets.boxes, atol=0.01)
        assert torch.equal(batch.proposals.image_index, batch.targets.image_index)
    cut = next(
        iter(make_source(scenes, [RandomCrop(30)], train_proposals=path).train_loader(4, 1, 0))
    )
    assert cut.proposals is not None
    assert (cut.proposals.boxes >= 0).all()
    assert (cut.proposals.boxes <= 30).all()
    assert ((cut.proposals.boxes[:, 2:] - cut.proposals.boxes[:, :2]) > 0).all()


def test_a_model_with_its_own_proposals_from_a_batch_is_the_same_model(scenes: Path) -> None:
    joint = make_model().eval()
    alone = GeneralizedRCNN(
        joint.backbone, FileProposer(), joint.sampler, joint.classifier, dict(joint.heads)
    ).eval()
    joint.classifier.score_threshold = 0.0  # type: ignore[assignment]
    batch = next(iter(make_source(scenes).test_loader("val", 2)))
    given = Batch(**{**batch.__dict__, "proposals": joint.propose(batch)})
    one, two = joint.predict(batch).detections, alone.predict(given).detections
    assert len(one) > 10
    assert torch.equal(one.boxes, two.boxes)
    assert torch.equal(one.scores, two.scores)
    own, other = joint(batch), alone(given)
    assert {k: v for k, v in own.items() if not k.startswith("rpn")} == other


def test_limits_and_batches_without_any(scenes: Path) -> None:
    batch = next(iter(make_source(scenes).test_loader("val", 2)))
    proposer = FileProposer(train_limit=30, test_limit=5)
    with pytest.raises(UserError, match=r"set data\.train_proposals and data\.val_proposals"):
        proposer({}, batch)
    given = Batch(**{**batch.__dict__, "proposals": make_model().eval().propose(batch)})
    assert given.proposals is not None
    found, losses = proposer.eval()({}, given)
    assert losses == {}
    assert torch.bincount(found.image_index).tolist() == [5, 5]
    assert torch.equal(found.scores[:5], given.proposals.scores[:5])
    assert torch.bincount(proposer.train()({}, given)[0].image_index).tolist() == [30, 30]
