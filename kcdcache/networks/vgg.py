"""The VGG networks of the paper, in the layout of the published CRD checkpoints."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from kcdcache.networks.resnet import initialise_classifier, initialise_convolutions

WIDTHS = (64, 128, 256, 512, 512)
POOLED_SIDE = 64
"""image height from which the last block comes after a pooling, too"""


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, each normalised and activated, then one linear classifier.

    `depths` are the convolutions per block. The image, of at least 8x8, is halved after each of the first three blocks,
    and after the fourth from a height of 64 on. Source: Simonyan and Zisserman 2015, Table 1, with batch normalisation
    (Ioffe and Szegedy 2015); pooling, names and initialisation as in RepDistiller's `models/vgg.py`, for 32 and 64.
    """

    def __init__(self, depths: tuple[int, int, int, int, int], classes: int, channels: int = 3) -> None:
        super().__init__()
        for n, (pair, depth) in enumerate(zip(pairwise((channels, *WIDTHS)), depths, strict=True)):
            self.add_module(f"block{n}", _block(*pair, depth))
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDTHS[-1], classes)
        initialise_convolutions(self)
        initialise_classifier(self.classifier)

    def forward(self, pixels: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of transformed pixels."""
        features, pooled = pixels, 4 if pixels.shape[2] >= POOLED_SIDE else 3
        for n in range(len(WIDTHS)):
            features = self.get_submodule(f"block{n}")(features)
            features = self.pool(features) if n < pooled else features
        return self.classifier(self.avgpool(features).flatten(1))


def _block(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(depth):
        convolution = nn.Conv2d(inputs if number == 0 else outputs, outputs, 3, padding=1)
        # the last is not in place: feature taps read its input
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=number < depth - 1)]
    return nn.Sequential(*layers)
