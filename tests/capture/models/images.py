"""Networks for images."""

import torch
from torch import nn
from torch.nn import (
    Conv2d,
    ConvTranspose2d,
    GroupNorm,
    LayerNorm,
    Linear,
    Sequential,
    Tanh,
    functional,
)

from tests.capture.models.case import (
    HEADS,
    OF_NO_LAYER,
    C,
    Case,
    D,
    Made,
    N,
    heads_joined,
    images,
    parameter,
    softmax_attention,
    transformer_layer,
)


def vision_transformer(m, x):
    patches = m.patch(x).flatten(2).transpose(1, 2)
    h = torch.cat([m.cls_token.expand(len(x), -1, -1), patches], 1) + m.pos_embed
    return m.head(m.norm(m.encoder(h))[:, 0])


def windows(x):
    """`[N, 4, 4, D]` as four windows of `[N * 4, 4, D]`."""
    return x.unflatten(2, (2, 2)).unflatten(1, (2, 2)).transpose(2, 3).flatten(0, 2).flatten(1, 2)


def images_of_windows(x):
    x = x.unflatten(1, (2, 2)).unflatten(0, (-1, 2, 2)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def swin(m, x):
    """A shifted window with learned distances, and a merging of patches."""
    h = m.patch(x).permute(0, 2, 3, 1)
    y = windows(m.norm_1(h).roll((-1, -1), (1, 2)))
    qkv = (
        functional.linear(y, m.qkv.weight, m.qkv.bias)
        .unflatten(2, (3, HEADS, -1))
        .permute(2, 0, 3, 1, 4)
    )
    numbers = torch.arange(4, device=x.device)
    bias = m.table[numbers[:, None] - numbers + 3].movedim(-1, 0)
    y = functional.linear(heads_joined(softmax_attention(*qkv, bias)), m.proj.weight, m.proj.bias)
    h = h + images_of_windows(y).roll((1, 1), (1, 2))
    h = torch.cat([h[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
    return m.head(m.norm_3(m.reduction(m.norm_2(h))).mean((1, 2)))


def convnext(m, x):
    h = m.norm_1(m.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    y = m.norm_2(m.depthwise(h).permute(0, 2, 3, 1))
    y = m.scale * m.wide(functional.gelu(m.narrow(y)))
    h = h + y.permute(0, 3, 1, 2)
    return m.head(h.mean((2, 3)))


def resnet(m, x):
    """A basic block with a shorter way of its own, in place as it is written everywhere."""
    h = functional.relu_(m.bn_1(m.conv_1(x)))
    h = m.bn_2(m.conv_2(h))
    h += m.bn_3(m.shorter(x))
    return m.fc(functional.relu_(h).mean((2, 3)))


def with_statistics(model):
    """The statistics of a random batch, for evaluation."""
    model(images())
    return model.eval()


def residual_network(norm):
    return Made(
        resnet,
        conv_1=Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        bn_1=norm(3),
        conv_2=Conv2d(3, 3, 3, padding=1, bias=False),
        bn_2=norm(3),
        shorter=Conv2d(2, 3, 1, stride=2, bias=False),
        bn_3=norm(3),
        fc=Linear(3, C),
    )


def mobile(m, x):
    """A depthwise convolution, and a gate for every channel."""
    h = functional.hardswish(m.depthwise(functional.relu6(m.expand(x))))
    return m.head((h * functional.hardsigmoid(m.gate(h.mean((2, 3), keepdim=True)))).mean((2, 3)))


def u_net(m, x):
    h = m.down(x).relu()
    up = torch.cat([m.up(m.middle(h).relu()), x], 1)
    return m.out(up).flatten(2)


def mixer(m, x):
    """Linear layers along channels, and along positions."""
    h = m.patch(x).flatten(2).mT
    h = h + m.positions(m.norm_1(h).mT).relu().mT
    return m.head((h + m.channels(m.norm_2(h)).relu()).mean(1))


def densely(m, x):
    h = torch.cat([x, m.first(x).relu()], 1)
    return m.head(torch.cat([h, m.second(h).relu()], 1).amax((2, 3)))


def films(m, x):
    """Every image is a row of the batch that the convolution sees."""
    h = m.conv(x.flatten(0, 1)).tanh().flatten(1)
    return m.head(h.unflatten(0, (len(x), -1)).mean(1))


IMAGES = {
    "ViT": Case(
        lambda: Made(
            vision_transformer,
            cls_token=parameter(1, 1, D),
            pos_embed=parameter(1, 5, D),
            patch=Conv2d(2, D, 2, stride=2),
            encoder=transformer_layer(norm_first=True),
            norm=LayerNorm(D),
            head=Linear(D, C),
        ),
        images,
        {"cls_token": OF_NO_LAYER, "pos_embed": OF_NO_LAYER},
    ),
    "Swin": Case(
        lambda: Made(
            swin,
            table=parameter(7, HEADS),
            patch=Conv2d(2, D, 1),
            norm_1=LayerNorm(D),
            qkv=Linear(D, 3 * D),
            proj=Linear(D, D),
            norm_2=LayerNorm(4 * D),
            reduction=Linear(4 * D, 3, bias=False),
            norm_3=LayerNorm(3),
            head=Linear(3, C),
        ),
        images,
        {"table": OF_NO_LAYER},
    ),
    "ConvNeXt": Case(
        lambda: Made(
            convnext,
            scale=parameter(D),
            stem=Conv2d(2, D, 2, stride=2),
            norm_1=LayerNorm(D),
            depthwise=Conv2d(D, D, 3, padding=1, groups=D),
            norm_2=LayerNorm(D),
            narrow=Linear(D, 6),
            wide=Linear(6, D),
            head=Linear(D, C),
        ),
        images,
        {"scale": OF_NO_LAYER},
    ),
    "ResNet, evaluated": Case(lambda: with_statistics(residual_network(nn.BatchNorm2d)), images),
    "ResNet with norms of groups": Case(
        lambda: residual_network(lambda channels: GroupNorm(1, channels)), images
    ),
    "MobileNet": Case(
        lambda: Made(
            mobile,
            expand=Conv2d(2, 4, 1, bias=False),
            depthwise=Conv2d(4, 4, 3, padding=1, groups=4),
            gate=Conv2d(4, 4, 1),
            head=Linear(4, C),
        ),
        images,
    ),
    "U-Net": Case(
        lambda: Made(
            u_net,
            down=Conv2d(2, 3, 2, stride=2),
            middle=Conv2d(3, 3, 3, padding=1),
            up=ConvTranspose2d(3, 2, 2, stride=2),
            out=Conv2d(4, C, 1),
        ),
        images,
    ),
    "MLP-Mixer": Case(
        lambda: Made(
            mixer,
            patch=Conv2d(2, 3, 2, stride=2),
            norm_1=LayerNorm(3),
            positions=Linear(4, 4),
            norm_2=LayerNorm(3),
            channels=Linear(3, 3),
            head=Linear(3, C),
        ),
        images,
    ),
    "DenseNet": Case(
        lambda: Made(
            densely,
            first=Conv2d(2, 2, 3, padding=1),
            second=Conv2d(4, 2, 3, padding=1),
            head=Linear(6, C),
        ),
        images,
    ),
    "channels last": Case(
        lambda: Sequential(Conv2d(2, 3, 2), Tanh(), nn.Flatten(), Linear(27, C)).to(
            memory_format=torch.channels_last
        ),
        lambda: images().to(memory_format=torch.channels_last),
    ),
    "films": Case(
        lambda: Made(
            films,
            conv=Conv2d(1, 2, 2),
            head=Linear(2 * 2 * 3, C),
        ),
        lambda: torch.randn(N, 2, 1, 3, 4),
    ),
}
for mode in ("zeros", "reflect", "replicate", "circular"):
    IMAGES[f"padded by {mode}"] = Case(
        lambda mode=mode: Sequential(
            Conv2d(2, 2, 3, padding=1, padding_mode=mode), Tanh(), nn.Flatten(), Linear(32, C)
        ),
        images,
    )
for dims, channels in ((1, 4), (2, 2), (3, 2)):
    for options in ({}, {"stride": 2, "output_padding": 1, "groups": 2}, {"dilation": 2}):
        name = f"transposed convolution, {dims} axes, {list(options)}"
        IMAGES[name] = Case(
            lambda d=dims, c=channels, o=options: Made(
                lambda m, x: m.head(m.up(x).tanh().flatten(2).mean(2)),
                up=getattr(nn, f"ConvTranspose{d}d")(c, 4, 2, padding=1, **o),
                head=Linear(4, C),
            ),
            lambda d=dims, c=channels: torch.randn(N, c, *[3] * d),
        )
