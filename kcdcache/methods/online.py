"""Methods that train further networks with the student: mutual learning (DML), on-the-fly ensemble (ONE)."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional

from kcdcache.errors import SettingsError
from kcdcache.methods.base import Batch, Outputs, Pair, Term, constant, hard_term
from kcdcache.methods.losses import logit_divergence
from kcdcache.networks import registry
from kcdcache.networks.resnet import ResNet, ResNet50, WideResNet
from kcdcache.networks.taps import of_family


class MutualLearning(Term):
    """DML: KL(peer || student) + CE(peer) + KL(student || peer), no gradient into the targets; T = 1.

    The peer has the student's inputs, labels (smoothed and mixed) and optimizer, and computes in float32.
    Source: Zhang et al., CVPR 2018 (arXiv 1706.00384), Eq. 5-6.
    """

    taps = ("input",)

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        name = pair.settings.peer or pair.student
        peer = registry.build(name, pair.classes, drawn_seed(), channels=pair.image[0])
        self._labels = pair.settings.mix_label, pair.smoothing
        self.peer = peer.to(memory_format=torch.channels_last)

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        student, peer = outputs["logits"], self.peer(outputs["input"])
        taught = logit_divergence(student, peer, 1.0) + hard_term(peer, batch, *self._labels)
        return taught + logit_divergence(peer, student, 1.0)


def drawn_seed() -> int:
    """Return a seed from torch's generator, which is seeded for each method's term."""
    return int(torch.randint(2**62, ()))


BRANCHES = 3
"""with the student's own"""
RAMP = 80 / 300
"""share of the epochs until the divergences have their full weight"""

TAILS: Mapping[type[nn.Module] | str, tuple[str, tuple[str, ...]]] = {
    ResNet: ("stage2", ("layer3", "avgpool", "fc")),
    ResNet50: ("stage3", ("layer4", "avgpool", "linear")),
    WideResNet: ("stage2", ("block3", "bn1", "relu", "avgpool", "fc")),
    "torchvision.models.resnet.ResNet": ("stage3", ("layer4", "avgpool", "fc")),
}
"""family -> tap of its last stage but one, and the modules after it, classifier last"""


class Ensemble(Term):
    """ONE: CE of two further branches and of the ensemble + ramp T^2 sum over branches of KL(ensemble || branch).

    Branches are the student's last stage and classifier with initial weights of their own; the ensemble is the mean of
    the three logits, weighted by a gate on the shared stage's pooled values. The ramp is exp(-5 (1 - e / R)^2) in epoch
    e = 0 .. R, R 80 of 300 epochs. Labels are smoothed and mixed as the student's; branches compute in float32.
    Source: Lan et al., NeurIPS 2018 (arXiv 1806.04606), Eq. 4-8, T = 3; gate and ramp of its release.
    """

    _ramp: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._labels = pair.settings.mix_label, pair.smoothing
        self._temperature = pair.settings.temperature or 3.0
        _, *seeds = (drawn_seed() for _ in range(BRANCHES))  # the first is the student's own branch's
        tails = [_tail(pair, seed) for seed in seeds]
        self._stage = tails[0][0]
        self.taps = (self._stage,)
        self.branches = nn.ModuleList(tail for _, tail in tails)
        self.gate = Gate(pair.student_shape(self._stage)[0])
        constant(self, "_ramp", torch.ones(()))

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Set the epoch's weight of the divergences; factors are 1."""
        behind = min(1.0, epoch / max(1, round(epochs * RAMP)))
        self._ramp.fill_(math.exp(-5 * (1 - behind) ** 2))
        return 1.0, 1.0

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        shared = outputs[self._stage]
        logits = [outputs["logits"].float(), *(branch(shared) for branch in self.branches)]
        shares = self.gate(shared.mean(dim=(2, 3)))
        ensemble = (shares[:, :, None] * torch.stack(logits, dim=1)).sum(dim=1)
        hard = sum(hard_term(found, batch, *self._labels) for found in (*logits[1:], ensemble))
        soft = sum(logit_divergence(found, ensemble, self._temperature) for found in logits)
        return hard + self._ramp * soft


class Gate(nn.Module):
    """The weights of the branches for a sample: linear layer, batch normalisation, ReLU, softmax."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, BRANCHES)
        self.norm = nn.BatchNorm1d(BRANCHES)

    def forward(self, pooled: Float[Tensor, "batch size"]) -> Float32[Tensor, "batch branches"]:
        """Return weights of sum 1; a batch of one sample uses the running statistics."""
        norm, raw = self.norm, self.linear(pooled)
        normal = functional.batch_norm(
            raw, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=len(raw) > 1
        )
        return normal.relu().softmax(dim=1)


def _tail(pair: Pair, seed: int) -> tuple[str, nn.Module]:
    """Return the tap of the student's last stage but one, and newly initialised modules of all that follows it."""
    network = registry.build(pair.student, pair.classes, seed, channels=pair.image[0])
    if (found := of_family(TAILS, network)) is None:
        raise SettingsError(
            f"one branches off before a residual network's last stage, which '{pair.student}' does not have; take a "
            "student of the resnet or wrn families (resnet20, wrn_16_2, ResNet50, torchvision:resnet18, ...)"
        )
    stage, names = found
    parts = [network.get_submodule(name) for name in names]
    return stage, nn.Sequential(*parts[:-1], nn.Flatten(1), parts[-1]).to(memory_format=torch.channels_last)
