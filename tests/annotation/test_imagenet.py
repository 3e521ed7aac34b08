"""ImageNet classes of the classes of VOC and COCO, against torchvision's class names."""

from __future__ import annotations

import pytest
from torchvision.models import SqueezeNet1_1_Weights

from maskseg.annotation.imagenet import DATA_SETS, class_members, members_of
from maskseg.errors import UserError
from maskseg.interop.classes import coco_categories

IMAGENET: list[str] = SqueezeNet1_1_Weights.DEFAULT.meta["categories"]
# Classes of COCO without a class in ImageNet.
NONE = {
    *(
        "fire hydrant",
        "giraffe",
        "suitcase",
        "frisbee",
        "snowboard",
        "kite",
        "baseball bat",
        "baseball glove",
        "skateboard",
        "surfboard",
    ),
    *("fork", "carrot", "donut", "cake", "scissors", "toothbrush"),
}


def test_names_are_those_of_the_data_sets() -> None:
    assert list(class_members("coco")) == list(coco_categories().names)
    voc = class_members("voc")
    assert len(voc) == 20
    assert list(voc) == sorted(voc)  # the order of VOC's labels


def test_every_class_of_voc_has_members_and_of_coco_all_but_those_listed() -> None:
    assert all(class_members("voc").values())
    assert {name for name, members in class_members("coco").items() if not members} == NONE


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_a_class_of_imagenet_stands_for_one_class_at_most(data_set: str) -> None:
    members = [i for indices in class_members(data_set).values() for i in indices]
    assert len(members) == len(set(members))
    assert all(0 <= i < 1000 for i in members)


def test_members_by_name() -> None:
    members = {
        name: [IMAGENET[i] for i in indices] for name, indices in class_members("coco").items()
    }
    assert members["cat"] == ["tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"]
    assert (len(members["dog"]), members["dog"][0], members["dog"][-1]) == (
        118,
        "Chihuahua",
        "Mexican hairless",
    )
    assert len(members["bird"]) == 59
    assert {
        "cock",
        "ostrich",
        "great grey owl",
        "black grouse",
        "black swan",
        "white stork",
        "albatross",
    } <= set(members["bird"])
    assert {"tusker", "grey whale", "echidna"}.isdisjoint(members["bird"])
    assert members["cow"] == ["ox", "water buffalo", "bison"]
    assert members["couch"] == ["studio couch"]
    assert members["potted plant"] == ["pot"]
    assert members["tv"] == ["monitor", "screen", "television"]
    assert members["person"] == ["ballplayer", "groom", "scuba diver"]
    assert set(members["airplane"]) == {"airliner", "warplane"}
    assert {"school bus", "minibus", "trolleybus"} == set(members["bus"])
    assert {"beach wagon", "convertible", "sports car"} <= set(members["car"])
    assert {"pickup", "garbage truck"} <= set(members["truck"])
    assert all("bottle" in name or "jug" in name for name in members["bottle"])


def test_a_class_includes_its_own_name() -> None:
    # Guards against class indices that are off by one.
    for name, indices in class_members("coco").items():
        same = {i for i, theirs in enumerate(IMAGENET) if theirs.lower() == name}
        assert name == "kite" or same <= set(indices), name  # ImageNet's kite is a bird


def test_members_of_names_of_either() -> None:
    table = class_members("voc")
    assert members_of(["sofa", "couch", "zebra"]) == [table["sofa"], table["sofa"], [340]]
    assert [len(indices) for indices in members_of(["dog", "giraffe", "nucleus"])] == [118, 0, 0]
    assert members_of([]) == []
    with pytest.raises(UserError, match=r"no class for giraffe, nucleus: train a classifier"):
        members_of(["giraffe", "nucleus"])
    with pytest.raises(UserError, match="voc and coco, not for 'lvis'"):
        class_members("lvis")
