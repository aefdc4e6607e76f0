from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import subspace_angles

from svftool.numerics.subspace import (
    best_matches,
    captured,
    count_intruders,
    principal_angles,
    subspace_distance,
    subspace_similarity,
)


def basis(n: int, r: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize(("r", "q"), [(1, 1), (3, 3), (2, 5), (5, 2), (10, 10)])
def test_angles_agree_with_scipy(r: int, q: int) -> None:
    A, B = basis(12, r), basis(12, q, seed=1)
    expected = torch.from_numpy(subspace_angles(A.numpy(), B.numpy()).copy()).flip(0)
    torch.testing.assert_close(principal_angles(A, B), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-14, 1e-10, 1e-7, 1e-3, 0.7, 0.8, 1.5, math.pi / 2])
def test_known_angles_are_found_to_the_last_digits(angle: float) -> None:
    A = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    B = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
    assert float(principal_angles(A, B)[0]) == pytest.approx(angle, rel=1e-12)


def test_the_cosine_alone_would_lose_small_angles() -> None:
    angle = 1e-10
    assert math.acos(min(math.cos(angle), 1.0)) == 0.0


def test_distances_follow_from_the_angles() -> None:
    theta = torch.tensor([0.1, 0.4], dtype=torch.float64)
    A = torch.zeros(4, 2, dtype=torch.float64)
    A[0, 0] = A[1, 1] = 1.0
    B = torch.zeros(4, 2, dtype=torch.float64)
    B[0, 0], B[2, 0] = math.cos(0.1), math.sin(0.1)
    B[1, 1], B[3, 1] = math.cos(0.4), math.sin(0.4)
    found = subspace_distance(A, B)
    assert found.largest == pytest.approx(0.4)
    assert found.mean == pytest.approx(0.25)
    assert found.chordal == pytest.approx(float(theta.sin().square().sum().sqrt()))
    assert found.grassmann == pytest.approx(math.hypot(0.1, 0.4))
    projection = torch.linalg.matrix_norm(A @ A.mT - B @ B.mT, ord=2)
    assert found.projection == pytest.approx(float(projection))


def test_similarity_of_every_two_leading_subspaces() -> None:
    A, B = basis(9, 4), basis(9, 3, seed=1)
    found = subspace_similarity(A, B)
    for i in range(1, 5):
        for j in range(1, 4):
            expected = float((A[:, :i].mT @ B[:, :j]).square().sum()) / min(i, j)
            assert float(found[i - 1, j - 1]) == pytest.approx(expected)
    assert float(subspace_similarity(A, A)[3, 3]) == pytest.approx(1.0)


def test_intruders_are_vectors_without_a_match() -> None:
    base = torch.eye(8, dtype=torch.float64)
    tuned = base[:, :4].clone()
    tuned[:, 1] = 1 / math.sqrt(8)  # spread over all base vectors: best match 0.35
    overlaps = base.mT @ tuned
    assert best_matches(overlaps).tolist() == pytest.approx([1, 1 / math.sqrt(8), 1, 1])
    assert count_intruders(overlaps) == 1
    assert count_intruders(overlaps, below=0.3) == 0
    assert captured(overlaps, top=4).tolist() == pytest.approx([1, math.sqrt(0.5), 1, 1])


def test_a_rotation_inside_the_leading_subspace_is_captured_though_every_match_is_poor() -> None:
    base = torch.eye(64, dtype=torch.float64)
    tuned = torch.zeros(64, 16, dtype=torch.float64)
    tuned[:16] = basis(16, 16)
    hadamard = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    tuned[:16] = hadamard / 4
    overlaps = base.mT @ tuned
    assert count_intruders(overlaps) == 16
    assert captured(overlaps, top=16).tolist() == pytest.approx([1.0] * 16)
