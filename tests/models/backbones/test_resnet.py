"""ResNet trunks: levels, frozen stages, and weights."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from made.downloads import FileServer, file_server
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from maskseg.errors import UserError
from maskseg.files import downloads
from maskseg.models.backbones.resnet import NAMES, ResNet, load_pretrained_state

TORCH_SERVER = "https://download.pytorch.org"


def torchvision_trunk(name: str = "resnet18") -> nn.Module:
    """torchvision's network with random weights and statistics, so that the norms matter."""
    torch.manual_seed(0)
    trunk: nn.Module = getattr(torchvision.models, name)(weights=None)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
    return trunk.eval()


def torchvision_features(trunk: Any, images: Tensor) -> list[Tensor]:
    x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
    maps = []
    for layer in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        x = layer(x)
        maps.append(x)
    return maps


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_what_comes_out(name: str) -> None:
    trunk = ResNet(name).eval()
    with torch.no_grad():
        features = trunk(torch.zeros((1, 3, 64, 96)))
    assert list(features) == list(trunk.levels) == ["c2", "c3", "c4", "c5"]
    for level, map_ in zip(trunk.levels.values(), features.values(), strict=True):
        assert map_.shape == (1, level.channels, 64 // level.stride, 96 // level.stride)


def linear_trunk(name: str, **settings: Any) -> ResNet:
    """Make all weights equal and positive, and the max pooling an average.

    Each output is then a sum over its receptive field, symmetric if the padding is symmetric.
    """
    trunk = ResNet(name, **settings)
    trunk.stem.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    return trunk.double().eval()


@pytest.mark.parametrize(
    ("name", "first"), [("resnet18", False), ("resnet50", False), ("resnet50", True)]
)
@pytest.mark.parametrize("across", [True, False])
def test_centre_is_the_middle_of_the_receptive_field(name: str, first: bool, across: bool) -> None:
    """The gradient of a cell far from the borders is centred at centre + cell * stride."""
    trunk = linear_trunk(name, stride_in_1x1=first)
    images = torch.ones(
        (1, 3, 32, 1024) if across else (1, 3, 1024, 32), dtype=torch.float64, requires_grad=True
    )
    features = trunk(images)
    pixels = torch.arange(1024) + 0.5
    for level, map_ in zip(trunk.levels.values(), features.values(), strict=True):
        cell = 512 // level.stride
        (gradient,) = torch.autograd.grad(
            map_[0, :, 0, cell].sum() if across else map_[0, :, cell, 0].sum(),
            images,
            retain_graph=True,
        )
        profile = gradient.sum(dim=(0, 1, 2) if across else (0, 1, 3))
        seen = torch.nonzero(profile).squeeze(1)
        assert seen[0] > 0
        assert seen[-1] < 1023
        declared = level.centre + cell * level.stride
        assert float(pixels[seen[0]] + pixels[seen[-1]]) / 2 == declared
        assert float((pixels * profile).sum() / profile.sum()) == pytest.approx(declared, abs=1e-6)


def test_stride_in_the_first_convolution() -> None:
    trunk, other = ResNet("resnet50", stride_in_1x1=True), ResNet("resnet50")
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2), ("layer4", 2)):
        for model, strides in ((trunk, [stride, 1]), (other, [1, stride])):
            block = model.get_submodule(f"{stage}.0")
            assert [block.get_submodule(c).stride[0] for c in ("conv1", "conv2")] == strides  # type: ignore[index]
            assert block.get_submodule("downsample.0").stride == (stride, stride)
            assert model.get_submodule(f"{stage}.1.conv1").stride == (1, 1)
    assert trunk.state_dict().keys() == other.state_dict().keys()
    with pytest.raises(
        UserError, match="stride_in_1x1 needs bottlenecks, which resnet18 does not have"
    ):
        ResNet("resnet18", stride_in_1x1=True)


NORMS: dict[str, type[nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": nn.GroupNorm,
    "SyncBN": nn.SyncBatchNorm,
}


@pytest.mark.parametrize(("norm", "kind"), NORMS.items())
def test_norms(norm: str, kind: type[nn.Module]) -> None:
    trunk = ResNet("resnet18", norm=norm, norm_eps=1e-3)
    norms = [m for m in trunk.modules() if isinstance(m, tuple(NORMS.values()))]
    assert len(norms) == 20
    assert all(isinstance(m, kind) for m in norms)
    if norm != "GN":
        assert {m.eps for m in norms} == {1e-3}
    if norm != "SyncBN":  # can be trained on several devices only
        features = trunk.train()(torch.rand((2, 3, 64, 64)))
        assert all(torch.isfinite(f).all() for f in features.values())


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages_learn_nothing_and_keep_their_statistics(frozen: int) -> None:
    trunk = ResNet("resnet18", norm="BN", frozen_stages=frozen).train()
    before = {k: v.clone() for k, v in trunk.state_dict().items() if "running" in k}
    features = trunk(torch.rand((2, 3, 64, 64)))
    if frozen < 5:
        sum(f.sum() for f in features.values()).backward()
    for i, name in enumerate(("stem", "layer1", "layer2", "layer3", "layer4")):
        stage = trunk.get_submodule(name)
        assert all((p.grad is None) == (i < frozen) for p in stage.parameters())
        assert all(p.requires_grad == (i >= frozen) for p in stage.parameters())
        now = {f"{name}.{k}": v for k, v in stage.state_dict().items() if "running" in k}
        assert now
        assert all(torch.equal(v, before[k]) == (i < frozen) for k, v in now.items())
    assert all(not f.requires_grad for f in features.values()) == (frozen == 5)


def test_frozen_stages_stay_so_inside_another_module() -> None:
    trunk = ResNet("resnet18", norm="BN", frozen_stages=2)
    nn.Sequential(trunk).eval().train()
    assert [trunk.stem.training, trunk.layer1.training, trunk.layer2.training] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
def test_weights_of_a_file_give_torchvisions_features(tmp_path: Path, norm: str) -> None:
    theirs = torchvision_trunk()
    torch.save(theirs.state_dict(), tmp_path / "trunk.pth")
    ours = ResNet("resnet18", weights=str(tmp_path / "trunk.pth"), norm=norm).eval()
    state = {
        (k if k.startswith("layer") else f"stem.{k}"): v
        for k, v in theirs.state_dict().items()
        if not k.startswith("fc.")
    }
    own = ours.state_dict()
    assert set(own) == {
        k for k in state if norm != "FrozenBN" or not k.endswith("num_batches_tracked")
    }
    assert all(torch.equal(v, state[k]) for k, v in own.items())
    if norm == "SyncBN":
        return
    with torch.no_grad():
        images = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(0))
        for found, wanted in zip(
            ours(images).values(), torchvision_features(theirs, images), strict=True
        ):
            assert wanted.std() > 0.05
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_weights_without_the_counter_of_batches_are_complete(tmp_path: Path) -> None:
    state = {
        k: v
        for k, v in torchvision_trunk().state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "trunk.pth")
    own = ResNet("resnet18", weights=str(tmp_path / "trunk.pth"), norm="BN").state_dict()
    assert torch.equal(own["layer4.1.bn2.running_var"], state["layer4.1.bn2.running_var"])


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "trunk.pth"
    torch.save(torchvision_trunk().state_dict(), file)
    with pytest.raises(UserError) as error:
        ResNet("resnet18", weights=str(file), norm="GN")
    assert str(file) in one_line(error)
    assert "norm=FrozenBN, BN or SyncBN" in one_line(error)
    with pytest.raises(UserError) as error:
        ResNet("resnet34", weights=str(file))
    assert "do not fit resnet34" in one_line(error)
    with pytest.raises(UserError) as error:
        ResNet("resnet50", weights=str(file))
    assert "do not fit resnet50" in one_line(error)
    assert "size mismatch" in one_line(error)


class Code:
    """An object that must not be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be printed",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a file of torch", "not a file of weights"),
        ({"conv1.weight": Code()}, "not a file of weights"),
        ({"model": {"conv1.weight": torch.zeros(1)}}, "do not fit resnet18"),
        ([torch.zeros(1)], "weights"),
        (torch.zeros(1), "weights"),
    ],
    ids=["text", "code", "nested", "list", "tensor"],
)
def test_a_wrong_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, words: str
) -> None:
    file = tmp_path / "wrong.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=words) as error:
        ResNet("resnet18", weights=str(file))
    assert str(file) in one_line(error)
    assert "printed" not in capsys.readouterr().out


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trunk must be one of resnet18, .*not 'resnet19'"):
        ResNet("resnet19")
    with pytest.raises(UserError, match="frozen_stages must be 0 to 5, not 6"):
        ResNet("resnet18", frozen_stages=6)
    with pytest.raises(UserError, match="norm must be one of FrozenBN, BN, SyncBN, GN, not 'LN'"):
        ResNet("resnet18", norm="LN")
    with pytest.raises(UserError, match="no such file, and torchvision has IMAGENET1K_V1") as error:
        ResNet("resnet18", weights=str(tmp_path / "gone.pth"))
    assert "gone.pth" in one_line(error)
    with pytest.raises(
        UserError, match=r"torchvision has IMAGENET1K_V1, IMAGENET1K_V2, .*for resnet50"
    ):
        ResNet("resnet50", weights="IMAGENET1K_V3")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server that answers in the place of torch's, whose files torch keeps in its own folder."""
    with file_server() as running:
        open_address = downloads._open
        monkeypatch.setattr(
            downloads,
            "_open",
            lambda address: open_address(address.replace(TORCH_SERVER, running.address)),
        )
        yield running


def publish(
    content: object, server: FileServer, monkeypatch: pytest.MonkeyPatch, prefix: str = ""
) -> str:
    """Make a file of the server, with its hash (or another) in its name, ResNet-18's weights."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    prefix = prefix or hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    path = f"/models/resnet18-{prefix}.pth"
    server.add(path, buffer.getvalue())
    address = f"{TORCH_SERVER}{path}"
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", address)
    return address


def test_weights_by_name_are_taken_from_torchs_cache(
    hub: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = torchvision_trunk()
    address = publish(theirs.state_dict(), server, monkeypatch)
    hub.mkdir(parents=True)
    (hub / address.rsplit("/", 1)[1]).write_bytes(server.files.popitem()[1])
    trunk = ResNet("resnet18", weights="IMAGENET1K_V1")
    assert torch.equal(trunk.state_dict()["stem.conv1.weight"], theirs.state_dict()["conv1.weight"])
    assert torch.equal(
        trunk.state_dict()["layer3.1.bn2.running_mean"],
        theirs.state_dict()["layer3.1.bn2.running_mean"],
    )


def test_a_cached_file_runs_no_code(
    hub: Path,
    server: FileServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish({"conv1.weight": Code()}, server, monkeypatch)
    for _ in range(2):  # the download, and the cached file
        with pytest.raises((pickle.UnpicklingError, UserError)):
            load_pretrained_state("resnet18", "IMAGENET1K_V1")
        assert "printed" not in capsys.readouterr().out
    assert len(list(hub.iterdir())) == 1


def test_weights_are_downloaded_once(
    hub: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = torchvision_trunk()
    address = publish(theirs.state_dict(), server, monkeypatch)
    for weights in ("IMAGENET1K_V1", address):
        state = load_pretrained_state("resnet18", weights)
        assert torch.equal(state["conv1.weight"], theirs.state_dict()["conv1.weight"])
        server.files.clear()
    (cached,) = hub.iterdir()
    assert cached.name == address.rsplit("/", 1)[1]


def test_a_download_with_another_hash_is_refused(
    hub: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(torchvision_trunk().state_dict(), server, monkeypatch, "0badf00d")
    with pytest.raises(UserError, match=r"its SHA-256 begins with .*, not with 0badf00d"):
        load_pretrained_state("resnet18", "IMAGENET1K_V1")
    assert list(hub.iterdir()) == []


@pytest.mark.usefixtures("server")
def test_a_failed_download_is_told_in_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = f"{TORCH_SERVER}/resnet18-0000000f.pth"
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value, "url", gone)
    with pytest.raises(UserError, match="could not be downloaded") as error:
        load_pretrained_state("resnet18", "IMAGENET1K_V1")
    assert gone in one_line(error)
    assert one_line(error).endswith(f"put the file at {hub / 'resnet18-0000000f.pth'}")
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("first", [False, True])
def test_what_is_behind_the_last_level_is_not_built(first: bool, tmp_path: Path) -> None:
    torch.save(torchvision_trunk("resnet50").state_dict(), tmp_path / "weights.pth")
    keys: dict[str, Any] = {
        "weights": str(tmp_path / "weights.pth"),
        "norm": "BN",
        "stride_in_1x1": first,
        "frozen_stages": 5,
    }
    whole, part = (
        ResNet("resnet50", **keys).eval(),
        ResNet("resnet50", **keys, out_level="c3").eval(),
    )
    assert part.levels == {name: whole.levels[name] for name in ("c2", "c3")}
    images = torch.randn(1, 3, 64, 96)
    found, wanted = part(images), whole(images)
    assert list(found) == ["c2", "c3"]
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert not any(name.startswith(("layer3", "layer4")) for name in part.state_dict())
    assert not any(p.requires_grad for p in part.parameters())
    with pytest.raises(UserError, match="out_level must be one of c2, c3, c4, c5, not 'p3'"):
        ResNet("resnet50", out_level="p3")
