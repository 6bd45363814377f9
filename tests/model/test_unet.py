# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from anomalib.models.image.draem.torch_model import DraemModel
from torch import nn

from anomalib_twostage import UNet
from anomalib_twostage.model.variants import VARIANTS, two_stage_superpixel_model


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("levels", [2, 3, 5])
def test_the_output_has_the_size_of_the_input(stem_stride: int, levels: int) -> None:
    network = UNet(in_channels=2, widths=(4,) * levels, stem_stride=stem_stride)
    least = network.minimum_size
    for height, width in ((least, least), (least + 1, least + 3), (2 * least - 1, least + 7), (least, 3 * least + 5)):
        assert network(torch.rand(2, 2, height, width)).shape == (2, 1, height, width)


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_the_minimum_size_leaves_two_pixels_at_the_coarsest_level(stem_stride: int) -> None:
    network = UNet(widths=(4, 4, 4, 4), stem_stride=stem_stride)
    sizes = []
    network.encoder[-1].register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[-2:])))
    network(torch.rand(1, 3, network.minimum_size, network.minimum_size))
    assert sizes == [(2, 2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_is_larger_than_published(variant: str) -> None:
    assert count(two_stage_superpixel_model(variant)) <= 23.9e6


def test_the_paper_variant_is_of_the_published_size() -> None:
    assert count(two_stage_superpixel_model("paper")) == pytest.approx(23.9e6, rel=0.05)


def test_draem_is_as_large_as_the_paper_says() -> None:
    assert count(DraemModel()) == pytest.approx(97.4e6, abs=0.1e6)


def test_a_small_network_has_the_parameters_one_counts_by_hand() -> None:
    def block(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs  # two convolutions, two batch norms

    expected = block(3, 5) + block(5, 7) + block(7 + 5, 5) + 5 + 1
    assert count(UNet(in_channels=3, widths=(5, 7))) == expected


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_gradients_reach_every_parameter(stem_stride: int) -> None:
    network = UNet(widths=(4, 6, 8), stem_stride=stem_stride)
    network(torch.rand(2, 3, 33, 40)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_each_output_pixel_sits_on_its_input_pixel(stem_stride: int) -> None:
    # Every convolution an even blur: whatever shifts the map shifts the centre of mass of a lone spot.
    network = UNet(in_channels=1, widths=(1, 1, 1), stem_stride=stem_stride).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0 if parameter.ndim != 4 else 1 / parameter[0].numel())
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.zero_()
        network.head.bias.zero_()
        image = torch.zeros(1, 1, 64, 64)
        image[..., 24:40, 24:40] = 1  # its centre is at 31.5
        weight = network(image)[0, 0]
    position = torch.arange(64.0)
    tolerance = 0.1 if stem_stride == 1 else 0.75  # a convolution of stride two sees half a pixel ahead
    assert (weight.sum(1) @ position / weight.sum()).item() == pytest.approx(31.5, abs=tolerance)
    assert (weight.sum(0) @ position / weight.sum()).item() == pytest.approx(31.5, abs=tolerance)


def test_half_resolution_is_enlarged_smoothly() -> None:
    logits = UNet(widths=(4, 6, 8), stem_stride=2)(torch.rand(1, 3, 32, 32))[0, 0]
    step = logits.diff(dim=1).abs()
    # Not in blocks of two by two: steps within a block are about as large as those between blocks.
    assert step[:, 0::2].mean() > 0.5 * step[:, 1::2].mean()


def test_images_of_a_batch_do_not_mix_in_evaluation() -> None:
    network = UNet(widths=(4, 6, 8)).eval()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        together = network(images)
        for i in range(3):
            torch.testing.assert_close(network(images[i : i + 1])[0], together[i])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8,)}, r"two levels.*\(8,\)"),
        ({"widths": (8, 0)}, r"\(8, 0\)"),
        ({"stem_stride": 3}, "stem_stride.*3"),
        ({"stem_stride": 0}, "stem_stride.*0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**options)
