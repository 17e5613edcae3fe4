"""Images seen another way, against loops over pixels in float64."""

import math
import pickle

import numpy as np
import pytest
import torch

from mas_ext.scenarios.transforms import Canvas, Permutation, Rotation


def test_permutation_moves_pixels_of_all_channels_alike() -> None:
    x, order = torch.randn(3, 2, 4, 5), torch.randperm(20)
    mixed = Permutation(order)(x)
    for i in range(20):
        old, new = divmod(int(order[i]), 5), divmod(i, 5)
        assert torch.equal(mixed[:, :, new[0], new[1]], x[:, :, old[0], old[1]])


def bilinear(image: np.ndarray, degrees: float) -> np.ndarray:
    """The image (H, W) turned counter-clockwise: each pixel looks up where it came from."""
    height, width = image.shape
    turned, angle = np.zeros_like(image), math.radians(degrees)
    for row in range(height):
        for column in range(width):
            # To the right and up from the middle, turned back by the angle.
            right, up = column - (width - 1) / 2, (height - 1) / 2 - row
            right, up = (
                right * math.cos(angle) + up * math.sin(angle),
                up * math.cos(angle) - right * math.sin(angle),
            )
            y, x = (height - 1) / 2 - up, right + (width - 1) / 2
            for near_y in (math.floor(y), math.floor(y) + 1):
                for near_x in (math.floor(x), math.floor(x) + 1):
                    if 0 <= near_y < height and 0 <= near_x < width:
                        share = (1 - abs(y - near_y)) * (1 - abs(x - near_x))
                        turned[row, column] += share * image[near_y, near_x]
    return turned


@pytest.mark.parametrize("degrees", [0, 18, 90, 133.7, 180, -45])
@pytest.mark.parametrize("shape", [(7, 7), (6, 9)])
def test_rotation_is_bilinear(degrees: float, shape: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *shape, dtype=torch.float64)
    turned = Rotation(degrees)(x)
    for n in range(2):
        for channel in range(3):
            expected = torch.tensor(bilinear(x[n, channel].numpy(), degrees))
            torch.testing.assert_close(turned[n, channel], expected)


def test_a_quarter_turn_is_counter_clockwise() -> None:
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(Rotation(90)(x), x.rot90(1, (2, 3)), atol=1e-5, rtol=0)


def test_canvas_frames_and_repeats() -> None:
    x = torch.rand(2, 1, 3, 4)
    framed = Canvas((3, 6, 6))(x)
    assert framed.shape == (2, 3, 6, 6)
    for n, channel, row, column in np.ndindex(2, 3, 6, 6):
        inside = 1 <= row < 4 and 1 <= column < 5
        assert framed[n, channel, row, column] == (x[n, 0, row - 1, column - 1] if inside else 0)
    framed += 1  # memory of its own: none of it is shared between channels
    colours = torch.rand(2, 3, 6, 6)
    assert torch.equal(Canvas((3, 6, 6))(colours), colours)


@pytest.mark.parametrize("shape", [(2, 4, 4), (3, 7, 6), (1, 6, 7)])
def test_what_does_not_fit_on_a_canvas(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"x: got images .*, expected ones that fit into \(3, 6, 6\)"
    ):
        Canvas((3, 6, 6))(torch.rand(1, *shape))


def test_transforms_can_be_sent_to_other_processes() -> None:
    x = torch.rand(1, 1, 4, 4)
    for transform in (Permutation(torch.randperm(16)), Rotation(30), Canvas((3, 8, 8))):
        assert torch.equal(pickle.loads(pickle.dumps(transform))(x), transform(x))
