import numpy as np
import pytest
import torch
from test_losses import probabilities
from test_losses_decoupled import divergence
from test_losses_maps import close, drawn, tensor

from kcdcache.methods.losses import logit_divergence, soft_divergence
from kcdcache.methods.online import ensemble_divergence, mutual


def reference_logits(student, teacher, temperature):
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    found = [divergence(probabilities(t, temperature), probabilities(s, temperature)) for s, t in rows]
    return temperature**2 * np.array(found)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergences_of_logits_equal_a_float64_reference(temperature):
    student, teacher = drawn(0, 5, 6, scale=3), drawn(1, 5, 6, scale=3)
    for loss in (logit_divergence, ensemble_divergence):
        close(loss(tensor(student), tensor(teacher), temperature), reference_logits(student, teacher, temperature))


def test_mutual_is_the_divergence_from_the_peer_at_temperature_one():
    student, peer = drawn(2, 5, 6, scale=3), drawn(3, 5, 6, scale=3)
    close(mutual(tensor(student), tensor(peer)), reference_logits(student, peer, 1.0))
    assert not torch.allclose(mutual(tensor(student), tensor(peer)), mutual(tensor(peer), tensor(student)))


def test_divergence_of_logits_is_that_from_their_probabilities():
    student, teacher = tensor(drawn(4, 5, 6)), tensor(drawn(5, 5, 6))
    expected = soft_divergence(student, torch.softmax(teacher / 4, dim=1), 4.0)
    assert torch.equal(logit_divergence(student, teacher, 4.0), expected)


def test_divergence_of_logits_ignores_a_shift_of_either():
    student, teacher = tensor(drawn(6, 5, 6)), tensor(drawn(7, 5, 6))
    moved = ensemble_divergence(student + 5, teacher - 9, 3.0)
    torch.testing.assert_close(moved, ensemble_divergence(student, teacher, 3.0), rtol=1e-4, atol=1e-5)
