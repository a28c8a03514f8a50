import math

import numpy as np
import pytest
import torch
from test_losses_maps import close, drawn, tensor

from kcdcache.methods.relations import angle_wise, distance_wise, probabilistic, similarity_preserving

LOSSES = [similarity_preserving, distance_wise, angle_wise, probabilistic]


def huber(a, b):
    gap = abs(a - b)
    return gap**2 / 2 if gap < 1 else gap - 0.5


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a):
    size = math.sqrt(dot(a, a))
    return [x / size if size else 0.0 for x in a]


def reference_similarity(student, teacher):
    tables = []
    for features in (student, teacher):
        flat = features.reshape(len(features), -1).tolist()
        tables.append([unit([dot(a, b) for b in flat]) for a in flat])
    b = len(student)
    return np.array([sum((tables[0][i][j] - tables[1][i][j]) ** 2 for j in range(b)) / b for i in range(b)])


def distances(features):
    table = [[math.dist(a, b) for b in features.tolist()] for a in features.tolist()]
    positive = [d for row in table for d in row if d > 0]
    mean = sum(positive) / len(positive) if positive else 1.0
    return [[d / mean for d in row] for row in table]


def reference_distance(student, teacher):
    found, wanted = distances(student), distances(teacher)
    b = len(student)
    return np.array([sum(huber(found[i][j], wanted[i][j]) for j in range(b)) / b for i in range(b)])


def angle(features, i, j, k):
    """Cosine of the angle j-i-k."""
    return dot(unit((features[j] - features[i]).tolist()), unit((features[k] - features[i]).tolist()))


def reference_angle(student, teacher):
    b = len(student)
    pairs = [(j, k) for j in range(b) for k in range(b)]
    return np.array(
        [sum(huber(angle(student, i, j, k), angle(teacher, i, j, k)) for j, k in pairs) / b**2 for i in range(b)]
    )


def neighbours(features):
    rows = [unit(row) for row in features.tolist()]
    table = [[(dot(a, b) + 1) / 2 for b in rows] for a in rows]
    return [[value / sum(row) for value in row] for row in table]


def reference_probabilistic(student, teacher):
    found, wanted = neighbours(student), neighbours(teacher)
    b, tiny = len(student), 1e-7
    return np.array(
        [
            sum(p * math.log((p + tiny) / (q + tiny)) for p, q in zip(wanted[i], found[i], strict=True)) / b
            for i in range(b)
        ]
    )


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (similarity_preserving, reference_similarity),
        (distance_wise, reference_distance),
        (angle_wise, reference_angle),
        (probabilistic, reference_probabilistic),
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_relations_equal_a_float64_reference(loss, reference, batch):
    student, teacher = drawn(0, batch, 6), drawn(1, batch, 9)
    close(loss(tensor(student), tensor(teacher)), reference(student, teacher))


def test_similarity_of_maps_is_that_of_their_flattened_rows():
    student, teacher = drawn(2, 5, 3, 4, 4), drawn(3, 5, 2, 3, 3)
    found = similarity_preserving(tensor(student), tensor(teacher))
    close(found, reference_similarity(student, teacher))


def test_the_means_are_the_published_numbers():
    """||G_S - G_T||_F^2 / b^2, and the plain mean over all pairs, triples and entries."""
    student, teacher = tensor(drawn(4, 6, 5)), tensor(drawn(5, 6, 5))
    tables = [torch.nn.functional.normalize(f @ f.T) for f in (student, teacher)]
    torch.testing.assert_close(similarity_preserving(student, teacher).mean(), (tables[0] - tables[1]).norm() ** 2 / 36)
    pairs = [torch.cdist(f, f) for f in (student, teacher)]
    scaled = [d * 30 / d.sum() for d in pairs]
    expected = torch.nn.functional.smooth_l1_loss(*scaled)
    torch.testing.assert_close(distance_wise(student, teacher).mean(), expected, rtol=1e-4, atol=1e-6)


def rotation(seed, size):
    return tensor(np.linalg.qr(drawn(seed, size, size))[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_relations_ignore_scale_and_rotation_of_either_side(loss):
    student, teacher = tensor(drawn(6, 7, 6)), tensor(drawn(7, 7, 9))
    found = loss(student, teacher)
    moved = loss(student @ rotation(8, 6) * 5, teacher @ rotation(9, 9) / 3)
    torch.testing.assert_close(moved, found, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss(student, student @ rotation(8, 6) * 5), torch.zeros(7), atol=1e-6, rtol=0)
    assert found.mean() > 1e-4


@pytest.mark.parametrize("loss", [distance_wise, angle_wise])
def test_distances_and_angles_ignore_a_shift(loss):
    student, teacher = tensor(drawn(10, 7, 6)), tensor(drawn(11, 7, 9))
    torch.testing.assert_close(loss(student + 3, teacher - 5), loss(student, teacher), rtol=1e-4, atol=1e-6)


def test_opposite_rows_have_no_infinite_divergence():
    student, teacher = np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    expected = reference_probabilistic(student, teacher)
    assert 1 < expected.max() < 10
    close(probabilistic(tensor(student), tensor(teacher)), expected)


def test_neighbour_probabilities_ignore_the_length_of_each_row():
    student, teacher = tensor(drawn(12, 7, 6)), tensor(drawn(13, 7, 9))
    longer = student * torch.linspace(0.1, 9, 7).unsqueeze(1)
    torch.testing.assert_close(probabilistic(longer, teacher), probabilistic(student, teacher), rtol=1e-4, atol=1e-6)


def test_equal_samples_take_no_part_in_the_mean_distance():
    student = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    assert distances(student)[0][2] == 1.0
    close(distance_wise(tensor(student), tensor(drawn(14, 3, 4))), reference_distance(student, drawn(14, 3, 4)))


def test_near_neighbours_far_from_the_origin_keep_their_distances():
    """|a|^2 + |b|^2 - 2ab would leave nothing of a distance of 1 at 4096."""
    student = 4096 + np.array([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 3.0]])
    teacher = drawn(15, 4, 3)
    close(distance_wise(tensor(student), tensor(teacher)), reference_distance(student, teacher))


@pytest.mark.parametrize("loss", [similarity_preserving, angle_wise, distance_wise])
def test_no_gradient_is_nan_on_its_way_where_all_samples_are_equal(loss):
    student = torch.ones(4, 3, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        loss(student, tensor(drawn(16, 4, 3))).sum().backward()


@pytest.mark.parametrize("loss", [similarity_preserving, angle_wise, distance_wise])
def test_rows_of_zeros_and_equal_rows_pass_no_gradient_where_there_is_no_direction(loss):
    student = torch.zeros(4, 3, requires_grad=True)
    loss(student, tensor(drawn(16, 4, 3))).sum().backward()
    assert torch.equal(student.grad, torch.zeros(4, 3))
