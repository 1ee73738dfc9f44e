"""Augmentations equal a plain loop over images, and torchvision's classes, which the authors use."""

import numpy as np
import pytest
import torch

from infopro_fast.data import Augmentation, augment, cifar10, draw, normalize, stl10, svhn
from infopro_fast.data.augment import Draws


def one_by_one(images, augmentation, draws):
    """Augment image by image in numpy: numpy.pad, a slice, a reversed slice."""
    mode = {"reflect": "reflect", "zeros": "constant"}[augmentation.mode]
    p, (H, W) = augmentation.padding, images.shape[2:]
    out = []
    places = zip(draws.top.tolist(), draws.left.tolist(), draws.flip.tolist(), strict=True)
    for image, (top, left, flip) in zip(images.numpy(), places, strict=True):
        crop = np.pad(image, ((0, 0), (p, p), (p, p)), mode=mode)[:, top : top + H, left : left + W]
        out.append(crop[:, :, ::-1] if flip else crop)
    return torch.from_numpy(np.stack(out).copy())


SHAPES = [((64, 3, 32, 32), 4), ((7, 3, 9, 5), 2), ((3, 1, 96, 96), 4), ((5, 3, 4, 4), 0), ((0, 3, 8, 8), 2)]


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape,padding", SHAPES)
def test_equals_a_loop_over_images(shape, padding, mode, flip):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    before = images.clone()
    augmentation = Augmentation(padding, mode, flip)
    draws = draw(shape[0], augmentation, generator)
    got = augment(images, augmentation, draws)
    assert got.dtype == torch.uint8 and got.shape == shape
    if shape[0]:
        assert torch.equal(got, one_by_one(images, augmentation, draws))
    assert torch.equal(images, before)


def test_draws_cover_every_place_equally():
    augmentation = Augmentation(2, "zeros", True)
    draws = draw(50_000, augmentation, torch.Generator().manual_seed(0))
    for places in (draws.top, draws.left):
        counts = places.bincount(minlength=5)
        assert len(counts) == 5 and (counts - 10_000).abs().max() < 500  # 5 standard deviations are 447
    assert abs(draws.flip.sum() - 25_000) < 600
    assert (
        abs(torch.corrcoef(torch.stack([draws.top, draws.left, draws.flip]).double()) - torch.eye(3)).max()
        < 0.03
    )
    assert not draw(1000, Augmentation(2, "zeros", False), torch.Generator().manual_seed(0)).flip.any()


def test_released_settings():
    assert cifar10.AUGMENTATION == Augmentation(4, "reflect", True)
    assert stl10.AUGMENTATION == Augmentation(4, "zeros", True)
    assert svhn.AUGMENTATION == Augmentation(2, "zeros", False)
    assert [round(255 * v, 6) for v in cifar10.MEAN + cifar10.STD] == [125.3, 123.0, 113.9, 63.0, 62.1, 66.7]
    assert svhn.MEAN == svhn.STD == stl10.MEAN == stl10.STD == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("padding,size", [(4, 96), (2, 32)])
def test_zero_padding_equals_random_crop_of_torchvision(padding, size):
    """torchvision pads and crops PIL images; ours gets the same draws."""
    transforms = pytest.importorskip("torchvision.transforms")
    F = pytest.importorskip("torchvision.transforms.functional")
    image = torch.randint(256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    padded = F.pad(F.to_pil_image(image), padding)
    top, left, height, width = transforms.RandomCrop.get_params(padded, (size, size))
    expected = F.pil_to_tensor(F.hflip(F.crop(padded, top, left, height, width)))
    draws = Draws(torch.tensor([top]), torch.tensor([left]), torch.tensor([True]))
    assert torch.equal(augment(image[None], Augmentation(padding, "zeros", True), draws)[0], expected)


def test_reflection_equals_that_of_torch():
    """The authors' CIFAR pipeline pads float images with F.pad(mode="reflect")."""
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.pad(image.float(), (4,) * 4, mode="reflect").to(torch.uint8)
    for top, left in ((0, 0), (8, 8), (3, 7)):
        draws = Draws(torch.full((2,), top), torch.full((2,), left), torch.tensor([False, False]))
        got = augment(image, Augmentation(4, "reflect", True), draws)
        assert torch.equal(got, expected[:, :, top : top + 32, left : left + 32])


def test_normalize_equals_torchvision_to_the_bit():
    transforms = pytest.importorskip("torchvision.transforms")
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    pil = transforms.ToPILImage()(levels[0])
    expected = transforms.Normalize(cifar10.MEAN, cifar10.STD)(transforms.ToTensor()(pil))
    got = normalize(levels, cifar10.MEAN, cifar10.STD)
    assert torch.equal(got[0], expected) and torch.equal(got[1], expected)
    assert normalize(levels, cifar10.MEAN, cifar10.STD, torch.float64).dtype == torch.float64


def test_refuses_what_it_cannot_do():
    image = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    draws = draw(2, Augmentation(2, "zeros", True), torch.Generator())
    with pytest.raises(ValueError, match="uint8 images and 2 draws"):
        augment(image.float(), Augmentation(2, "zeros", True), draws)
    with pytest.raises(ValueError, match="uint8 images and 2 draws"):
        augment(image, Augmentation(2, "zeros", True), draws.select(slice(1)))
    with pytest.raises(ValueError, match="reflect with padding < 8, got 'reflect' with 8"):
        augment(image, Augmentation(8, "reflect", True), draws)
