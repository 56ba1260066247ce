import pytest
import torch

from networks.encoders import build_encoder


@pytest.mark.parametrize("shape", [(2, 3, 32, 48), (1, 3, 1, 1), (3, 3, 7, 5)])
def test_pixels_are_normalized_to_the_same_bits_in_any_layout(shape: tuple[int, ...]) -> None:
    encoder = build_encoder("resnet18")
    image = torch.rand(shape)
    given = image.clone()
    expected = (image - encoder.mean) / encoder.std
    for layout in (torch.contiguous_format, torch.channels_last):
        found = encoder._normalized(image.contiguous(memory_format=layout))
        assert torch.equal(found, expected)
        assert found.is_contiguous(memory_format=layout)
    assert torch.equal(image, given)
    image.requires_grad_()
    encoder._normalized(image.contiguous(memory_format=torch.channels_last)).sum().backward()
    assert image.grad is not None
    torch.testing.assert_close(image.grad, (1 / encoder.std).expand(shape))
