"""The built-in encoders: every layout learns what it should see, and reads its axes as they are."""

import pytest
import torch
from torch import nn

from iibalance.config import ModelConfig
from iibalance.data.standardize import Standardizer
from iibalance.errors import InputError
from iibalance.nn.encoders import (
    ImageEncoder,
    SequenceEncoder,
    TokenEncoder,
    VectorEncoder,
    VideoEncoder,
    build_encoder,
    builtin,
)
from iibalance.nn.model import MultimodalClassifier

SHAPES = {
    (20,): VectorEncoder,
    (30, 7): SequenceEncoder,
    (24, 6, 3): SequenceEncoder,
    (16, 16): ImageEncoder,
    (3, 16, 12): ImageEncoder,
    (16, 16, 3): ImageEncoder,
    (6, 12, 16): VideoEncoder,
    (6, 3, 12, 16): VideoEncoder,
    (6, 12, 16, 3): VideoEncoder,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_trains_every_parameter(shape):
    torch.manual_seed(0)
    encoder = build_encoder(shape, embedding_dim=16, width=8, dropout=0.0)
    assert type(encoder) is SHAPES[shape]
    x, y = torch.randn(32, *shape), torch.arange(32) % 2
    x[y == 1] += torch.linspace(-1, 1, shape[-1])  # the classes differ in more than their mean
    head = nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-2)
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in encoder.named_parameters()}
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(head(encoder(x)), y)
        optimizer.zero_grad()
        loss.backward()
        for name, p in encoder.named_parameters():
            moved[name] |= p.grad != 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, touched in moved.items():
        # A ReLU may be dead for this batch; a layer may not
        assert touched.float().mean() > 0.5, name


@pytest.mark.parametrize(
    ("first", "last", "axes"),
    [
        ((3, 16, 16), (16, 16, 3), (0, 2, 3, 1)),
        ((1, 20, 20), (20, 20, 1), (0, 2, 3, 1)),
        ((6, 3, 12, 16), (6, 12, 16, 3), (0, 1, 3, 4, 2)),
    ],
)
def test_channels_last_is_channels_first_on_the_same_weights(first, last, axes):
    torch.manual_seed(0)
    one, two = build_encoder(first, width=8).eval(), build_encoder(last, width=8).eval()
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, *first)
    torch.testing.assert_close(two(x.permute(axes)), one(x), atol=1e-5, rtol=1e-4)
    assert one(x).std(0).max() > 1e-3  # not the same for every sample


@pytest.mark.parametrize(("shape", "layout"), [((16, 16), "image"), ((6, 12, 16), "video")])
def test_a_missing_channel_axis_is_one_channel(shape, layout):
    torch.manual_seed(0)
    encoder = build_encoder(shape, width=8, layout=layout).eval()
    channel = build_encoder(
        (1, *shape) if layout == "image" else (shape[0], 1, *shape[1:]), width=8, layout=layout
    ).eval()
    channel.load_state_dict(encoder.state_dict())
    x = torch.randn(3, *shape)
    torch.testing.assert_close(
        channel(x.unsqueeze(1 if layout == "image" else 2)), encoder(x), atol=1e-5, rtol=1e-4
    )


def test_skeletons_are_flattened_frame_by_frame():
    torch.manual_seed(0)
    joints, flat = (
        build_encoder((24, 6, 3), width=8).eval(),
        build_encoder((24, 18), width=8).eval(),
    )
    flat.load_state_dict(joints.state_dict())
    x = torch.randn(2, 24, 6, 3)
    torch.testing.assert_close(joints(x), flat(x.reshape(2, 24, 18)))


@pytest.mark.parametrize("shape", [(16, 16), (30, 7), (6, 12, 16)])
def test_any_layout_can_be_read_as_a_vector(shape):
    encoder = build_encoder(shape, layout="vector").eval()
    x = torch.randn(2, *shape)
    torch.testing.assert_close(encoder(x), encoder(x.flatten(1)))


def test_a_sequence_tells_early_from_late_and_a_video_forwards_from_backwards():
    torch.manual_seed(0)
    for shape in ((32, 5), (8, 12, 16)):
        encoder = build_encoder(shape, width=8).eval()
        x = torch.randn(4, *shape)
        assert (encoder(x) - encoder(x.flip(1))).abs().max() > 1e-3, shape


@pytest.mark.parametrize(
    "shape",
    [(1,), (1, 2), (2, 5), (5, 4), (1, 6, 6), (1, 5, 5, 1), (2, 1, 7, 9), (3, 8, 9)],
    ids=str,
)
def test_small_samples(shape):
    """One frame, one feature, a few pixels: nothing is pooled away."""
    layout = "video" if len(shape) == 4 or shape == (3, 8, 9) else None
    encoder = build_encoder(shape, embedding_dim=5, width=4, layout=layout)
    out = encoder(torch.randn(3, *shape))
    assert out.shape == (3, 5) and out.isfinite().all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_narrow_widths(width):
    for shape in SHAPES:
        assert build_encoder(shape, width=width, embedding_dim=3)(torch.randn(2, *shape)).shape == (
            2,
            3,
        )


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    for shape in SHAPES:
        encoder, x = build_encoder(shape, width=8, dropout=0.5), torch.randn(4, *shape)
        assert not torch.equal(encoder(x), encoder(x)), shape
        encoder.eval()
        assert torch.equal(encoder(x), encoder(x)), shape


def test_the_embedding_size_can_be_read_off():
    encoders = {
        f"m{index}": build_encoder(shape, embedding_dim=10 + index, width=4)
        for index, shape in enumerate(SHAPES)
    }
    model = MultimodalClassifier(encoders, 3)
    assert list(model.head.embedding_dims.values()) == [10 + index for index in range(len(SHAPES))]
    inputs = {f"m{index}": torch.randn(2, *shape) for index, shape in enumerate(SHAPES)}
    assert model(inputs, torch.tensor([0, 2])).loss.isfinite()


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((8,), "audio", "layout: 'audio' is none of vector, sequence, image, video"),
        ((8,), "image", r"layout: 'image' does not fit samples of shape \(8,\)"),
        ((8, 8), "video", "layout: 'video' does not fit"),
        ((2, 8, 8, 3), "image", "layout: 'image' does not fit"),
        ((), None, "holds nothing to encode"),
        ((5, 0), None, "holds nothing to encode"),
        ((3, 9, 4), None, "can be read in more than one way"),
        ((2, 2, 2, 2, 2), None, "can be read in more than one way"),
    ],
)
def test_shapes_and_layouts_that_do_not_fit(shape, layout, message):
    with pytest.raises(InputError, match=message):
        build_encoder(shape, layout=layout)


def test_tokens_are_read_with_their_order_and_padding_is_zero():
    torch.manual_seed(0)
    encoder = build_encoder((6,), layout="tokens", vocabulary=9, embedding_dim=5, width=4).eval()
    vectors = encoder[0].weight
    assert vectors.shape == (9, 8) and not vectors[[0, 8]].any() and vectors[1:8].any(1).all()
    ids = torch.tensor([[1, 2, 3, 0, 0, 0], [3, 2, 1, 0, 0, 0], [1, 2, 3, 8, 8, 8]])
    out = encoder(ids)
    assert out.shape == (3, 5) and torch.equal(out[0], out[2])  # unseen ids are as padding
    encoder.train()(ids).square().sum().backward()
    assert not vectors.grad[0].any() and vectors.grad[1:4].any(1).all()
    with pytest.raises(InputError, match="vocabulary: layout 'tokens' needs the number of ids"):
        build_encoder((6,), layout="tokens")
    with pytest.raises(InputError, match="layout: 'tokens' does not fit samples of shape .6, 2."):
        build_encoder((6, 2), layout="tokens", vocabulary=9)
    with pytest.raises(InputError, match="layout: 'text' is none of vector, .*, tokens"):
        build_encoder((6,), layout="text")


def test_the_builtin_encoder_follows_the_standardizer():
    standardizer = Standardizer({"words": (4,), "sound": (12, 3)}, {"words": "tokens"})
    ids = torch.tensor([[1, 7, 0, 0]] * 3)
    standardizer.fit({"words": ids, "sound": torch.randn(3, 12, 3)}, torch.ones(3, 2) > 0)
    model = ModelConfig(embedding_dim=6, width=4)
    words = builtin("words", model, standardizer)()
    assert isinstance(words, TokenEncoder) and words[0].num_embeddings == 9  # 0 to 7, and unseen
    inputs = {"words": ids + 500, "sound": torch.randn(3, 12, 3)}
    later = standardizer.transform(inputs, torch.ones(3, 2) > 0)
    assert words(later["words"]).shape == (3, 6)
    sound = builtin("sound", model, standardizer)()
    assert isinstance(sound, SequenceEncoder) and sound(later["sound"]).shape == (3, 6)
