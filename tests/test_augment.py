"""Batched augmentation: torchvision's pictures, the same for every number of ranks."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torchvision.transforms import AutoAugment as TorchvisionAutoAugment
from torchvision.transforms import functional as TF
from torchvision.transforms.autoaugment import _apply_op

from victims.augment import (
    POLICIES,
    NoiseErase,
    SimClr,
    augment,
    blur,
    crop_boxes,
    erase,
    jitter,
    policy_from,
    resized_crop,
    shift_hue,
)
from victims.autoaugment import IMAGENET, OPS, SIGNED, draw_steps, magnitudes
from victims.draws import Draws, torch_rng
from victims.errors import UsageError

SIZES = (32, 64, 224)
ORACLE = TorchvisionAutoAugment()


def pictures(num: int, size: int, key: int | str = 0) -> Tensor:
    """Smooth shapes with noise, flat and dark ones among them; uint8."""
    rng = torch_rng(key, "pictures", size)
    coarse = torch.rand(num, 3, 4, 4, generator=rng)
    image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    image = image + 0.1 * torch.randn(num, 3, size, size, generator=rng)
    out = (image.clamp(0, 1) * 255).to(torch.uint8)
    out[0] = 77
    out[1] = out[1] // 8
    return out


def draws(total: int, start: int = 0, stop: int | None = None, key: int | str = 0) -> Draws:
    return Draws(torch_rng(key, "augment"), total, start, total if stop is None else stop)


def torchvision_op(name: str, image_CHW: Tensor, magnitude: float) -> Tensor:
    nearest = TF.InterpolationMode.NEAREST
    done: Tensor = _apply_op(image_CHW, name, magnitude, interpolation=nearest, fill=None)
    return done


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", POLICIES)
def test_output_is_float_in_unit_range_and_repeats_by_key(name: str, size: int) -> None:
    image = pictures(6, size)
    before = image.clone()
    first, again = augment(name, image, draws(6)), augment(name, image, draws(6))
    assert first.shape == image.shape
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert torch.equal(image, before)
    if name != "none":
        assert not torch.equal(first, augment(name, image, draws(6, key=1)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", POLICIES)
def test_two_ranks_see_the_pictures_of_one(name: str, size: int) -> None:
    total = 40 if size == 32 else 10
    half = total // 2 - 1  # shares need not be equal
    image = pictures(total, size)
    whole, left, right = draws(total), draws(total, 0, half), draws(total, half)
    for _ in range(2):  # the second step shows that every rank drew the whole batch's numbers
        together = augment(name, image, whole)
        apart = [augment(name, image[:half], left), augment(name, image[half:], right)]
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("name", ["autoaugment", "simclr", "noise_erase"])
def test_equal_images_draw_different_transforms(name: str) -> None:
    image = pictures(3, 32)[2:].expand(64, -1, -1, -1)
    changed = augment(name, image, draws(64))
    # PAR leaves a quarter of the images alone; AutoAugment's pairs repeat.
    assert len({row.numpy().tobytes() for row in changed}) > 20


def test_none_is_the_image_itself() -> None:
    image = pictures(4, 32)
    assert torch.equal(augment("none", image, draws(4)), image / 255)


def test_channels_last_changes_nothing() -> None:
    image = pictures(8, 32)
    other = image.to(memory_format=torch.channels_last)
    for name in POLICIES:
        assert torch.equal(augment(name, image, draws(8)), augment(name, other, draws(8)))


WARPS = ("ShearX", "ShearY", "Rotate")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_op_equals_torchvision(name: str, size: int) -> None:
    image = pictures(10, size)
    row = list(OPS).index(name)
    magnitude_N = magnitudes(size)[row].clone()
    for sign in (1, -1) if name in SIGNED else (1,):
        ours = OPS[name](image, sign * magnitude_N)
        theirs = torch.stack(
            [
                torchvision_op(name, picture, sign * float(magnitude))
                for picture, magnitude in zip(image, magnitude_N, strict=True)
            ]
        )
        assert ours.dtype == torch.uint8
        levels_NCHW = (ours.short() - theirs.short()).abs()
        if name in WARPS:
            # Nearest pixels: where a point lies halfway, the processor's last bit decides.
            assert (levels_NCHW > 0).float().mean() <= 3e-3
        else:
            # torchvision's own two implementations of AutoContrast differ by a level.
            assert levels_NCHW.max() <= (1 if name == "AutoContrast" else 0)


def test_policy_and_magnitudes_are_torchvisions() -> None:
    for ours, theirs in zip(IMAGENET, ORACLE.policies, strict=True):
        assert [(n, p, level or None) for n, p, level in ours] == [
            (n, p, level or None) for n, p, level in theirs
        ]
    for size in SIZES:
        space = ORACLE._augmentation_space(10, (size, size))
        assert frozenset(name for name in OPS if space[name][1]) == SIGNED
        for name, ours_10 in zip(OPS, magnitudes(size), strict=True):
            assert torch.equal(ours_10, space[name][0].double().expand(10))


def test_autoaugment_applies_its_steps_in_order() -> None:
    image = pictures(64, 32)
    steps = draw_steps(draws(64), 32)
    names = list(OPS)
    expected = []
    for row, picture in enumerate(image):
        for op, magnitude in zip(
            steps.op_B2[row].tolist(), steps.magnitude_B2[row].tolist(), strict=True
        ):
            picture = picture if op < 0 else torchvision_op(names[op], picture, magnitude)
        expected.append(picture)
    changed = augment("autoaugment", image, draws(64))
    assert (changed - torch.stack(expected) / 255).abs().max() < 1.01 / 255


def test_autoaugment_frequencies() -> None:
    total = 50_000
    steps = draw_steps(draws(total), 32)
    for turn in (0, 1):
        expected: Counter[str] = Counter()
        for pair in IMAGENET:
            expected[pair[turn][0]] += pair[turn][1] / len(IMAGENET)  # type: ignore[assignment]
        for row, name in enumerate(OPS):
            share = float((steps.op_B2[:, turn] == row).float().mean())
            sigma = math.sqrt(expected[name] * (1 - expected[name]) / total)
            assert abs(share - expected[name]) <= 4.5 * sigma
    rotated = steps.op_B2 == list(OPS).index("Rotate")
    signs = steps.magnitude_B2[rotated].sign()
    assert signs.abs().min() == 1
    assert abs(float(signs.mean())) < 0.03
    unsigned = steps.op_B2 == list(OPS).index("Solarize")
    assert steps.magnitude_B2[unsigned].min() > 0


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_torchvision(size: int) -> None:
    image = pictures(8, size).float() / 255
    box_B4 = crop_boxes(draws(8), size, (0.08, 1.0), (3 / 4, 4 / 3))
    flip_B = torch.arange(8) % 2 == 1
    ours = resized_crop(image, box_B4, flip_B)
    for row, (left, top, width, height) in enumerate(box_B4.int().tolist()):
        theirs = TF.resized_crop(image[row], top, left, height, width, [size, size])
        theirs = theirs.flip(-1) if flip_B[row] else theirs
        assert torch.allclose(ours[row], theirs, atol=3e-5)


def test_crop_boxes_fit_and_have_the_declared_area_and_ratio() -> None:
    total, size = 20_000, 224
    box_B4 = crop_boxes(draws(total), size, (0.25, 0.75), (3 / 4, 4 / 3))
    start_B2, side_B2 = box_B4[:, :2], box_B4[:, 2:]
    assert start_B2.min() == 0
    assert (start_B2 + side_B2).max() == size
    share_B = side_B2.prod(1) / size**2
    assert share_B.min() > 0.24
    assert share_B.max() < 0.76
    assert abs(float(share_B.mean()) - 0.5) < 0.01
    ratio_B = side_B2[:, 0] / side_B2[:, 1]
    assert ratio_B.min() > 0.74
    assert ratio_B.max() < 1.35
    assert abs(float(ratio_B.log().mean())) < 0.01


def test_a_crop_that_never_fits_is_the_whole_image() -> None:
    box_B4 = crop_boxes(draws(5), 32, (1.0, 1.0), (2.0, 3.0))
    assert box_B4.tolist() == [[0, 0, 32, 32]] * 5


def test_hue_equals_torchvision() -> None:
    image = pictures(9, 32).float() / 255
    turn_N = torch.linspace(-0.5, 0.5, 9)
    ours = shift_hue(image, turn_N)
    for row in range(9):
        theirs = TF.adjust_hue(image[row], float(turn_N[row]))
        assert torch.allclose(ours[row], theirs, atol=1e-5)


def test_jitter_equals_torchvision_in_every_order() -> None:
    order_B4 = torch.cartesian_prod(*[torch.arange(4)] * 4)
    order_B4 = order_B4[order_B4.sort(1).values.eq(torch.arange(4)).all(1)]
    assert len(order_B4) == 24
    image = pictures(24, 32).float() / 255
    factor_B4 = draws(24).uniform(4) + torch.tensor([0.5, 0.5, 0.5, -0.5])
    on_B = torch.arange(24) != 5
    ours = jitter(image, order_B4, factor_B4, on_B)
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for row in range(24):
        theirs = image[row]
        for kind in order_B4[row].tolist() if on_B[row] else ():
            theirs = adjust[kind](theirs, float(factor_B4[row, kind]))
        assert torch.allclose(ours[row], theirs, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_blur_equals_torchvision(size: int) -> None:
    kernel = SimClr().kernel_at(size)
    assert kernel == {32: 3, 64: 7, 224: 21}[size]
    image = pictures(4, size).float() / 255
    sigma_B = torch.tensor([0.1, 0.5, 1.0, 2.0])
    ours = blur(image, kernel, sigma_B)
    for row, sigma in enumerate(sigma_B.tolist()):
        theirs = TF.gaussian_blur(image[row], [kernel, kernel], [sigma, sigma])
        assert torch.allclose(ours[row], theirs, atol=1e-5)


def test_simclr_parts_have_their_frequencies() -> None:
    total = 2_000
    flat = torch.zeros(total, 3, 32, 32, dtype=torch.uint8)
    flat[:, 0, :, :16] = 200  # red on the left, black on the right
    still = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    changed = augment(policy_from("simclr", **still), flat, draws(total))
    flipped = changed[..., -1].sum((1, 2)) > changed[..., 0].sum((1, 2))
    assert abs(float(flipped.float().mean()) - 0.5) < 0.05
    side = torch.where(flipped.view(-1, 1), changed[:, :, 16, -1], changed[:, :, 16, 0])
    gray = (side.amax(1) - side.amin(1)) < 1e-6
    assert abs(float(gray.float().mean()) - 0.2) < 0.04
    untouched = (side - torch.tensor([200 / 255, 0, 0])).abs().amax(1) < 1e-5
    assert abs(float(untouched.float().mean()) - 0.2 * 0.8) < 0.04
    off = {"flip_probability": 0.0, "jitter_probability": 0.0, "gray_probability": 0.0}
    policy = policy_from("simclr", **still, **off, blur_sigma=(1.0, 1.0))
    blurred = blur(flat[:4] / 255, 3, torch.ones(4))
    assert torch.allclose(augment(policy, flat[:4], draws(4)), blurred, atol=1e-6)


@pytest.mark.parametrize(("size", "sides"), [(32, {2, 3}), (64, {5, 6}), (224, set(range(16, 23)))])
def test_erased_squares(size: int, sides: set[int]) -> None:
    total = 400
    policy = NoiseErase(noise_probability=0.0)
    black = torch.zeros(total, 3, size, size, dtype=torch.uint8)
    changed = augment(policy, black, draws(total))
    fill = torch.tensor(policy.erase_color).view(3, 1, 1)
    hit_BHW = (changed == fill).all(1)
    assert torch.equal(changed.amax(1) > 0, hit_BHW)
    area_B = hit_BHW.sum((1, 2))
    assert abs(float((area_B > 0).float().mean()) - 0.5) < 0.1
    assert {math.isqrt(int(area)) for area in area_B if area} == sides
    for hit_HW in hit_BHW[area_B > 0]:
        ys, xs = hit_HW.nonzero().unbind(1)
        height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        assert height == width
        assert height * width == hit_HW.sum()
    places = hit_BHW.any(0)
    assert places.any(0).float().mean() > 0.9
    assert places.any(1).float().mean() > 0.9


def test_noise_brightens_half_of_the_images() -> None:
    total = 600
    gray = torch.full((total, 3, 32, 32), 60, dtype=torch.uint8)
    changed = augment(NoiseErase(erase_probability=0.0), gray, draws(total)) - 60 / 255
    noisy = changed.flatten(1).amax(1) > 0
    assert abs(float(noisy.float().mean()) - 0.5) < 0.08
    assert changed.min() >= -1e-7
    # Mean of clip(0.2 z, 0, 1): 0.2 / sqrt(2 pi).
    assert abs(float(changed[noisy].mean()) - 0.2 / math.sqrt(2 * math.pi)) < 1e-3
    policy = NoiseErase(erase_probability=0.0, noise="symmetric")
    changed = augment(policy, gray + 68, draws(total)) - 128 / 255
    assert abs(float(changed[noisy].mean())) < 1e-3
    assert abs(float(changed[noisy].std()) - 0.2) < 0.01


def test_erase_paints_exactly_the_square() -> None:
    image = torch.zeros(2, 3, 8, 8)
    side_B, corner_B2 = torch.tensor([2.0, 3.0]), torch.tensor([[1.0, 5.0], [0.0, 0.0]])
    painted = erase(image, side_B, corner_B2, torch.tensor([True, False]), torch.ones(3))
    expected = image.clone()
    expected[0, :, 5:7, 1:3] = 1
    assert torch.equal(painted, expected)


def test_unknown_names_and_wrong_images_are_explained() -> None:
    image = pictures(4, 32)
    with pytest.raises(UsageError, match="Did you mean 'autoaugment'"):
        augment("autoaugmnet", image, draws(4))
    with pytest.raises(UsageError, match=r"image policy simclr: no parameter.*crop_scale"):
        policy_from("simclr", crop_scael=(0.5, 1.0))
    with pytest.raises(UsageError, match="crop_scale is"):
        policy_from("simclr", crop_scale=(0.5, 2.0))
    with pytest.raises(UsageError, match="noise is 'both'"):
        policy_from("noise_erase", noise="both")
    with pytest.raises(UsageError, match=r"float32 images of shape \(4, 3, 32, 32\)"):
        augment("none", image.float(), draws(4))
    with pytest.raises(UsageError, match=r"allowed are uint8 images of shape \(8, 3, S, S\)"):
        augment("none", image, draws(8))


def test_policies_are_values() -> None:
    assert policy_from("simclr", crop_scale=(0.9, 1.0)) == SimClr(crop_scale=(0.9, 1.0))
    assert all(POLICIES[name].name == name for name in POLICIES)
