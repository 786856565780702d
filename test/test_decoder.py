"""The instance decoder against torch-em's own forward pass, and its independence of the batch."""

import copy

import pytest
import torch
from torch_em.model import UNETR

from micro_sam.core.errors import CheckpointError, InvalidInputError
from micro_sam.models import decoder_cpu
from micro_sam.models.decoder import DecoderAdapter, get_decoder, get_unetr
from micro_sam.models.tiny_vit import TinyViT

SIZE = 64


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TinyViT(img_size=SIZE).eval()


def make_unetr(encoder, features=8, transposed=False, seed=1):
    """A UNETR as torch-em builds it, with statistics that are not those of initialisation."""
    torch.manual_seed(seed)
    unetr = UNETR(
        backbone="sam", encoder=encoder, out_channels=3, final_activation="Sigmoid", use_skip_connection=False,
        initial_features=features, use_conv_transpose=transposed, use_sam_stats=True,
    )
    for module in unetr.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.num_features <= 8 * features:
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return unetr.eval()


def state_of(unetr):
    return {k: v.clone() for k, v in unetr.state_dict().items() if not k.startswith("encoder.")}


def reference(unetr, embedding, input_shape, original_shape, training):
    """torch-em's forward pass after the encoder, on a copy, since training mode changes the statistics."""
    unetr = copy.deepcopy(unetr)
    unetr.train(training)
    with torch.no_grad():
        return unetr.decode((embedding, None, None), input_shape, original_shape)


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(3, 256, SIZE // 16, SIZE // 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("values_per_strip", [decoder_cpu._VALUES_PER_STRIP, 3000, 1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("normalization", ["instance", "running"])
def test_equals_torch_em(encoder, embedding, transposed, normalization, values_per_strip, monkeypatch):
    monkeypatch.setattr(decoder_cpu, "_VALUES_PER_STRIP", values_per_strip)
    unetr = make_unetr(encoder, transposed=transposed)
    decoder = get_decoder(encoder, state_of(unetr), "cpu", normalization=normalization)
    for input_shape, original_shape in (((SIZE, SIZE), (SIZE, SIZE)), ((SIZE, 50), (123, 96))):
        output = decoder(embedding[:1], input_shape, original_shape)
        expected = reference(unetr, embedding[:1], input_shape, original_shape, training=normalization == "instance")
        assert output.shape == (1, 3, *original_shape)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        plain = decoder.postprocess_masks(decoder.layer_by_layer(embedding[:1]), input_shape, original_shape)
        torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)
    # The two modes must differ, or the comparison would show nothing.
    other = DecoderAdapter(unetr, normalization="running" if normalization == "instance" else "instance")
    assert (other(embedding[:1], input_shape, original_shape) - output).abs().max() > 0.01


@pytest.mark.parametrize("normalization", ["instance", "running"])
def test_result_does_not_depend_on_the_batch_and_statistics_stay(encoder, embedding, normalization):
    unetr = make_unetr(encoder)
    decoder = DecoderAdapter(unetr, normalization=normalization)
    before = state_of(unetr)
    decoder.train()  # as a careless caller might
    together = decoder(embedding, (SIZE, SIZE), (SIZE, SIZE))
    alone = torch.cat([decoder(e[None], (SIZE, SIZE), (SIZE, SIZE)) for e in embedding])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert not together.requires_grad
    after = state_of(unetr)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_maps_far_from_zero_are_normalised_exactly(monkeypatch):
    """Sums of squares would lose all digits of the variance; strips of other means must not change it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 50, 40, generator=generator) * 0.01 + torch.tensor([1000.0, -5, 0])[None, :, None, None]
    x[:, :, 25:] += 1
    monkeypatch.setattr(decoder_cpu, "_VALUES_PER_STRIP", 500)
    mean, variance = decoder_cpu._moments(x)
    values = x.double()[0].flatten(1)
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(variance, values.var(1, correction=0), rtol=1e-4, atol=0)


def test_published_layout_has_66_tensors():
    state = state_of(get_unetr(TinyViT(img_size=SIZE), device="cpu"))
    assert len(state) == 66
    assert state["deconv1.block.1.block.weight"].shape == (512, 512, 3, 3)
    assert state["decoder_head.block.1.weight"].shape == (64, 128, 3, 3)
    assert sum(v.numel() for k, v in state.items() if "running" not in k and "num_batches" not in k) == 9_591_235


def test_number_of_features_and_upsampling_follow_the_state(encoder):
    for features, transposed in ((4, False), (8, True)):
        state = state_of(make_unetr(encoder, features, transposed))
        unetr = get_unetr(encoder, state, "cpu")
        assert unetr.out_conv.in_channels == features
        assert unetr.use_conv_transpose == transposed
        assert all(torch.equal(v, state[k]) for k, v in state_of(unetr).items())
        assert not unetr.training


def test_half_precision_state_gives_a_float32_decoder(encoder, embedding):
    state = {k: v.half() if v.is_floating_point() else v for k, v in state_of(make_unetr(encoder)).items()}
    decoder = get_decoder(encoder, state, "cpu")
    assert decoder(embedding[:1], (SIZE, SIZE), (SIZE, SIZE)).dtype == torch.float32


def test_unfitting_states(encoder):
    state = state_of(make_unetr(encoder))
    del state["base.block.1.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: base\.block\.1\.weight"):
        get_decoder(encoder, state, "cpu")
    state = state_of(make_unetr(encoder))
    state["base.block.1.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"another shape: base\.block\.1\.weight \(\(2, 2\)"):
        get_unetr(encoder, state, "cpu")
    with pytest.warns(UserWarning, match="keep their initial values"):
        get_unetr(encoder, state, "cpu", flexible_load_checkpoint=True)
    # Keys that are not the decoder's are ignored.
    get_decoder(encoder, state_of(make_unetr(encoder)) | {"something.else": torch.zeros(1)}, "cpu")
    with pytest.raises(InvalidInputError, match="'instance' or 'running'"):
        DecoderAdapter(make_unetr(encoder), normalization="batch")
