"""The GAN's networks: shapes, packing, what each formula says, and independence of the
micro-batch."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from models.gan.dcgan import DCGANConfig
from models.gan.layers import ImageSelfAttention, append_group_std, pack_samples
from models.gan.losses import r1_penalty
from models.gan.mlp import Maxout, MLPGanConfig
from models.gan.networks import GanNetworkConfig, build_discriminator, build_generator
from models.gan.residual import ResidualGanConfig
from models.gan.style import EqualLinear, ModulatedConv2d, StyleGanConfig
from models.init import initialise

CONFIGS: list[GanNetworkConfig] = [
    MLPGanConfig(latent=6, generator_hidden=(16, 16), discriminator_hidden=(16,), batch_norm_group=4),
    DCGANConfig(latent=6, channels=(8, 16), batch_norm_group=4),
    DCGANConfig(latent=6, channels=(8, 16), batch_norm_group=4, discriminator_norm="spectral"),
    ResidualGanConfig(latent=6, channels=(8, 8), class_embedding=5, batch_norm_group=4),
    ResidualGanConfig(latent=6, channels=(8, 8), attention_level=1, batch_norm_group=4),
    StyleGanConfig(latent=6, channels=(8, 16), std_group=4),
]
SHAPE = (2, 8, 12)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("classes", "pack"), [(None, 1), (10, 1), (10, 2)])
def test_shapes_gradients_and_micro_batches(config: GanNetworkConfig, classes: int | None, pack: int) -> None:
    torch.manual_seed(0)
    generator = build_generator(config, SHAPE, classes)
    discriminator = build_discriminator(config, SHAPE, classes, pack)
    initialise(generator, seed=0)
    initialise(discriminator, seed=1)
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        if name.endswith("gain"):  # of the self-attention: it starts at 0
            torch.nn.init.ones_(parameter)
    z = torch.randn(16, 6)
    labels_M = None if classes is None else torch.arange(16) % 10
    images = generator(z, labels_M)
    logits = discriminator(images, labels_M)
    assert images.shape == (16, *SHAPE)
    assert logits.shape == (16 // pack,)

    half = slice(0, 8)
    torch.testing.assert_close(
        generator(z[half], None if labels_M is None else labels_M[half]), images[half], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        discriminator(images[half], None if labels_M is None else labels_M[half]),
        logits[: 8 // pack],
        rtol=1e-4,
        atol=1e-5,
    )

    F.softplus(-logits).sum().backward()
    dead = [
        name
        for name, p in chain(generator.named_parameters(), discriminator.named_parameters())
        if p.grad is None or not p.grad.any()
    ]
    assert dead == []


@pytest.mark.parametrize("config", CONFIGS)
def test_r1_trains_through_every_discriminator(config: GanNetworkConfig) -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(config, SHAPE, 10, 2)
    initialise(discriminator, seed=0)
    x = torch.randn(8, *SHAPE, requires_grad=True)
    r1_penalty(discriminator(x, torch.arange(8)), x, gamma=1.0).sum().backward()
    assert discriminator.head.weight.grad is not None
    assert discriminator.head.weight.grad.abs().max() > 0


def test_labels_change_the_image_and_the_verdict() -> None:
    for config in CONFIGS:
        generator = build_generator(config, SHAPE, 10)
        discriminator = build_discriminator(config, SHAPE, 10)
        initialise(generator, seed=0)
        initialise(discriminator, seed=0)
        z = torch.randn(4, 6)
        images, others = (generator(z, torch.full((4,), label)) for label in (1, 2))
        assert not torch.allclose(images, others)
        assert not torch.allclose(
            discriminator(images, torch.full((4,), 1)), discriminator(images, torch.full((4,), 2))
        )


def test_packing_lays_consecutive_samples_side_by_side() -> None:
    x = torch.arange(24.0).view(4, 2, 3)
    packed = pack_samples(x, 2)
    assert packed.shape == (2, 4, 3)
    assert torch.equal(packed[1], torch.cat([x[2], x[3]]))
    with pytest.raises(ValueError, match="4 samples does not divide into packs of 3"):
        pack_samples(x, 3)


def test_a_packed_discriminator_projects_each_members_class() -> None:
    torch.manual_seed(0)
    discriminator = build_discriminator(MLPGanConfig(discriminator_hidden=(7,), maxout=0), (3,), 10, 2)
    x = torch.randn(6, 3)
    labels_M = torch.tensor([1, 2, 3, 4, 5, 6])
    h = discriminator.trunk(x.view(3, 6))
    table = discriminator.projection.weight
    vectors = table[labels_M[0::2]] + table[10 + labels_M[1::2]]
    expected = h @ discriminator.head.weight[0] + discriminator.head.bias + (h * vectors).sum(1)
    torch.testing.assert_close(discriminator(x, labels_M), expected)


def test_modulated_convolution_equals_a_kernel_for_each_sample() -> None:
    torch.manual_seed(0)
    layer = ModulatedConv2d(3, 5, 3, style=4)
    x = torch.randn(2, 3, 6, 6)
    w = torch.randn(2, 4)
    for n in range(2):
        style = layer.affine(w[n : n + 1])[0]
        kernel = layer.weight / (3 * 9) ** 0.5 * style[None, :, None, None]
        kernel = kernel / (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = F.conv2d(x[n : n + 1], kernel, layer.bias, padding=1)
        torch.testing.assert_close(layer(x, w)[n : n + 1], expected, rtol=1e-4, atol=1e-5)


def test_equalised_layer_starts_with_unit_variance_and_a_scaled_rate() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 64)
    plain = EqualLinear(64, 32)
    slow = EqualLinear(64, 32, rate=0.01)
    for layer in (plain, slow):
        assert layer(x).std().item() == pytest.approx(1, rel=0.1)
    # A step of the same size in the stored weight moves the output of the slow layer a hundredth as
    # far.
    moved = []
    for layer in (plain, slow):
        before = layer(x)
        with torch.no_grad():
            layer.weight += 0.1
        moved.append((layer(x) - before).abs().mean().item())
    assert moved[1] == pytest.approx(0.01 * moved[0], rel=1e-3)


def test_maxout_takes_the_largest_piece() -> None:
    layer = Maxout(4, 3, 5, spectral=False)
    x = torch.randn(6, 4)
    pieces = layer.linear(x).view(6, 3, 5)
    assert torch.equal(layer(x), pieces.max(dim=2).values)


def test_attention_starts_as_the_identity_and_is_a_convex_mix_of_values() -> None:
    torch.manual_seed(0)
    layer = ImageSelfAttention(8)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(layer(x), x)
    torch.nn.init.ones_(layer.gain)
    constant = torch.randn(1, 8, 1, 1).expand(1, 8, 4, 4)
    torch.testing.assert_close(layer(constant), constant + layer.output(layer.value(constant)))


def test_group_std_is_the_mean_deviation_of_each_group() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 2, 2)
    appended = append_group_std(x, 4)
    assert appended.shape == (8, 4, 2, 2)
    expected = x[4:].std(dim=0, correction=0).mean()
    torch.testing.assert_close(appended[4:, 3], expected.expand(4, 2, 2), rtol=1e-4, atol=1e-5)
