"""Methods that compare feature maps: AT, FitNet, FSP, VID and ReviewKD."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional

from kcdcache.errors import MismatchError, SettingsError
from kcdcache.methods.base import Batch, Compared, Outputs, Pair, Term
from kcdcache.teacher import fields


def squared_error(student: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Return the mean over entries of (student - target)^2 per sample, in float32; no gradient into the target.

    For AT, FSP and FitNet the papers have the sum (or half of it) and their released losses the mean. Raises
    MismatchError if the shapes differ.
    """
    return _difference(student, target).square().flatten(1).mean(dim=1)


def _difference(student: Tensor, target: Tensor) -> Tensor:
    if student.shape != target.shape:  # broadcasting would hide it
        raise MismatchError(
            f"expected the student's features in the teacher's shape {tuple(target.shape)}, "
            f"found {tuple(student.shape)}: pool or project one of the two first"
        )
    return student.float() - target.detach().float()


class Attention(Term):
    """AT: sum over stages of the mean squared difference of normalised attention maps.

    Both networks' features are pooled to the smaller size before they are squared.
    Source: Zagoruyko & Komodakis, ICLR 2017, Eq. 2 with p = 2; stages and pooling of RepDistiller (facts.md section 4).
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._places = [(ours, theirs, _common_side(pair, ours, theirs)) for ours, theirs in pair.stages()]
        self.taps = tuple(tap for tap, _, _ in self._places)
        self.fields = tuple(f"attention:{theirs}:{h}x{w}" for _, theirs, (h, w) in self._places)

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        return sum(  # type: ignore[return-value]
            squared_error(fields.attention(outputs[tap], side), batch.knowledge[name])
            for (tap, _, side), name in zip(self._places, self.fields, strict=True)
        )


def _common_side(pair: Pair, ours: str, theirs: str) -> tuple[int, int]:
    (_, h, w), (_, height, width) = pair.student_shape(ours), pair.teacher_shape(theirs)
    return min(h, height), min(w, width)


HINT_STAGE = 2
"""number of the hint's stage, from 1, of the matched stages"""


class Hint(Compared):
    """FitNet: mean over entries of (r(F_S) - F_T)^2 at the second stage, r = ReLU(BN(conv)) to the teacher's shape.

    The hint is used from the first step on, together with the hard label, not in a stage of its own before.
    Source: Romero et al., ICLR 2015 (arXiv 1412.6550), Eq. 3; regressor, stage and joint training of RepDistiller.
    """

    def __init__(self, pair: Pair) -> None:
        ours, theirs = pair.stages()[HINT_STAGE - 1]
        super().__init__(ours, f"maps:{theirs}")
        shapes = pair.student_shape(ours), pair.teacher_shape(theirs)
        self.regressor = nn.Sequential(_to_shape(*shapes), nn.BatchNorm2d(shapes[1][0]), nn.ReLU())

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss per sample."""
        return squared_error(self.regressor(student), teacher)


def _to_shape(ours: tuple[int, ...], theirs: tuple[int, ...]) -> nn.Module:
    """Return a convolution from one shape of map to the other: halving, doubling, or valid with a kernel that fits."""
    (channels, *sides), (wanted, *target) = ours, theirs
    if sides == [2 * side for side in target]:
        return nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
    if [2 * side for side in sides] == target:
        return nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
    kernel = [1 + side - other for side, other in zip(sides, target, strict=True)]
    if min(kernel) < 1:
        raise SettingsError(
            f"fitnet: the student's map of shape {ours} should be no smaller than the teacher's of shape {theirs}, "
            "or half its size; take a student with larger maps, or a method that pools them (at, vid, reviewkd)"
        )
    return nn.Conv2d(channels, wanted, (kernel[0], kernel[1]))


FLOW_SHARE = 8
"""the first 1 / 8 of the epochs use the flow alone: 30 of 240"""


class Flow(Term):
    """FSP: sum over consecutive stages of the mean over entries of (G_S - G_T)^2, G = F_i F_{i+1}^T / (h w).

    In two phases: the first eighth of the epochs (rounded down, at least one of two or more) uses this term alone, the
    rest does not use it. The stem is the first stage if both networks have as many stages. Both need equal numbers of
    channels; heights and widths may differ. Values grow with the fourth power of the features, so gradients of float16
    features beyond a few hundred can overflow.
    Source: Yim et al., CVPR 2017 (A Gift from Knowledge Distillation), Sec. 3; layers, mean over entries, thirty epochs
    and their weight 1 of RepDistiller, which adds them to the 240; the 50 of its script has no effect there, and made a
    wide network diverge here.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        stages = pair.stages()
        if stages[0] == ("stage1", "stage1"):
            stages = [("stage0", "stage0"), *stages]
        for ours, theirs in stages:
            found, wanted = pair.student_shape(ours), pair.teacher_shape(theirs)
            if found[0] != wanted[0]:
                raise SettingsError(
                    f"fsp needs equal numbers of channels: '{theirs}' of the teacher '{pair.teacher}' has shape "
                    f"{wanted}, '{ours}' of the student '{pair.student}' has {found}; take a student as wide, or "
                    "another method"
                )
        self._places = [(bottom, top, f"fsp:{below}:{above}") for (bottom, below), (top, above) in pairwise(stages)]
        self.taps = tuple(tap for tap, _ in stages)
        self.fields = tuple(name for _, _, name in self._places)

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return (0, 1) in the first phase, (1, 0) in the second."""
        first = min(max(1, epochs // FLOW_SHARE), epochs - 1)
        return (0.0, 1.0) if epoch < first else (1.0, 0.0)

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        return sum(  # type: ignore[return-value]
            squared_error(fields.fsp_matrix(outputs[bottom], outputs[top]), batch.knowledge[name])
            for bottom, top, name in self._places
        )


VARIANCE, LEAST_VARIANCE = 5.0, 1e-5
"""VID's initial variance of each channel, and the constant added to its softplus"""


class Variational(Term):
    """VID: sum over stages of the `variational` loss of three 1x1 convolutions of F_S against F_T; may be negative.

    The convolutions have no bias, a ReLU between them and the width of the teacher's map; the variance, one per channel
    of the teacher, is learned and starts at 5. The larger of the two maps is average-pooled to the other's size.
    Source: Ahn et al., CVPR 2019 (arXiv 1904.05835); modules, stages and pooling of RepDistiller.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        stages = pair.stages()
        self.taps = tuple(ours for ours, _ in stages)
        self.fields = tuple(f"maps:{theirs}" for _, theirs in stages)
        self._sides = [_common_side(pair, ours, theirs) for ours, theirs in stages]
        self.means, self.raw_variances = nn.ModuleList(), nn.ParameterList()
        for ours, theirs in stages:
            channels, wanted = pair.student_shape(ours)[0], pair.teacher_shape(theirs)[0]
            widths = pairwise((channels, wanted, wanted, wanted))
            first, second, third = (nn.Conv2d(width, following, 1, bias=False) for width, following in widths)
            self.means.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third))
            start = math.log(math.expm1(VARIANCE - LEAST_VARIANCE))
            self.raw_variances.append(nn.Parameter(torch.full((wanted,), start)))

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        losses = []
        places = zip(self.taps, self.fields, self._sides, self.means, self.raw_variances, strict=True)
        for tap, name, side, mean, raw in places:
            # another memory layout than a store's values would change the last bits
            maps = outputs[tap], batch.knowledge[name].contiguous()
            own, target = (functional.adaptive_avg_pool2d(values, side) for values in maps)
            losses.append(variational(mean(own), target, raw))
        return torch.stack(losses).sum(dim=0)


def variational(
    mean: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    raw_variance: Float[Tensor, " channels"],
) -> Float[Tensor, " batch"]:
    """Return the mean over entries of 1/2 [(mu - t)^2 / s_c^2 + log s_c^2], s_c^2 = softplus(raw_variance_c) + 1e-5.

    This is the negative log-likelihood of the teacher's map without its constant, so it may be negative.
    Source: Ahn et al. 2019 (Variational Information Distillation), with the mean over entries as released.
    """
    variance = (functional.softplus(raw_variance.float()) + LEAST_VARIANCE).view(1, -1, 1, 1)
    squared = _difference(mean, target).square()
    return ((squared / variance + variance.log()) / 2).flatten(1).mean(dim=1)


WIDTH = 512
"""most channels of ReviewKD's fused features"""
WARM_UP = 20
"""epochs until ReviewKD has its full weight"""
POOLED_SIDES = (4, 2, 1)
"""of the hierarchical context loss"""


class Review(Term):
    """ReviewKD: sum over levels of HCL(ABF-fused student's features, teacher's map before its last ReLU).

    Levels are all stages and, as a map of one position, the vector before the classifier. Fused features go from each
    level to the one below it, brought to its size by nearest neighbours, at a width of at most 512. The weight grows
    linearly over the first 20 epochs. Its authors' weights for CIFAR-100 are 5 (the default: WRN-40-2 -> WRN-16-2,
    WRN-40-1 and ShuffleV1; ResNet32x4 -> ResNet8x4 and ShuffleV1), 8 (ResNet32x4 -> ShuffleV2), 0.6 (ResNet56 ->
    ResNet20) and 1 (ResNet110 -> ResNet32).
    Source: Chen et al., CVPR 2021 (arXiv 2104.09044); levels, widths, initial weights and warm-up of
    their CIFAR-100 code (dvlab-research/ReviewKD).
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        stages = [(ours, f"{theirs}.pre") for ours, theirs in reversed(pair.stages())]
        self.taps = ("penultimate", *(ours for ours, _ in stages))
        self.fields = ("penultimate", *(f"maps:{theirs}" for _, theirs in stages))
        shapes = [(pair.student_shape(ours), pair.teacher_shape(theirs)) for ours, theirs in stages]
        vectors = (*pair.student_shape("penultimate"), 1, 1), (*pair.teacher_shape("penultimate"), 1, 1)
        self._shapes = [vectors, *shapes]
        width = min(WIDTH, vectors[0][0])
        self.fusions = nn.ModuleList(
            Fusion(ours[0], width, theirs, number > 0) for number, (ours, theirs) in enumerate(self._shapes)
        )

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return (1, epoch / 20), the latter at most 1."""
        return 1.0, min(1.0, epoch / WARM_UP)

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        losses, fused = [], None
        for tap, name, (ours, theirs), fusion in zip(self.taps, self.fields, self._shapes, self.fusions, strict=True):
            # another memory layout than a store's values would change the last bits
            target = batch.knowledge[name].contiguous()
            answer, fused = fusion(outputs[tap].reshape(-1, *ours), fused)
            losses.append(hierarchical_context(answer, target.reshape(-1, *theirs)))
        return torch.stack(losses).sum(dim=0)


class Fusion(nn.Module):
    """ABF: f = a_1 conv(F) + a_2 up(above), a = sigmoid(conv([conv(F), up(above)])); without above conv(F)."""

    def __init__(self, channels: int, width: int, wanted: tuple[int, ...], fuse: bool) -> None:
        super().__init__()
        self._side = wanted[1:]
        self.narrow = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuse else None
        self.answer = nn.Sequential(nn.Conv2d(width, wanted[0], 3, padding=1, bias=False), nn.BatchNorm2d(wanted[0]))
        for block in (self.narrow, self.answer):
            nn.init.kaiming_uniform_(block[0].weight, a=1)  # type: ignore[arg-type]

    def forward(
        self, features: Float[Tensor, "batch channels h w"], above: Float[Tensor, "batch width h2 w2"] | None
    ) -> tuple[Float[Tensor, "batch wanted height width2"], Float[Tensor, "batch width height width2"]]:
        """Return the features to compare with the teacher's map, and the fused features for the level below."""
        fused = self.narrow(features)
        if self.attend is not None and above is not None:
            above = functional.interpolate(above, fused.shape[2:])
            shares = self.attend(torch.cat([fused, above], dim=1))
            fused = fused * shares[:, :1] + above * shares[:, 1:]
        if fused.shape[2:] != self._side:
            fused = functional.interpolate(fused, self._side)
        return self.answer(fused), fused


def hierarchical_context(
    student: Float[Tensor, "batch channels height width"], target: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, " batch"]:
    """Return the weighted mean of the squared error at full size and pooled to 4, 2 and 1; weights 1, 1/2, 1/4, 1/8.

    Sizes not below the map's shorter side are left out, and the weights are halved over the others.
    Source: Chen et al. 2021 (Distilling Knowledge via Knowledge Review): HCL, weights as released.
    """
    student, target = student.float(), target.float()
    loss, weight, total = squared_error(student, target), 1.0, 1.0
    for side in (side for side in POOLED_SIDES if side < min(student.shape[2:])):
        weight /= 2
        total += weight
        loss = loss + weight * squared_error(*(functional.adaptive_avg_pool2d(f, side) for f in (student, target)))
    return loss / total
