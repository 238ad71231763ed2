"""Kronecker algebra against dense linear algebra."""

import pytest
import torch

from backpack.kronecker import lists as kronecker
from backpack.utils import kroneckers

SQUARE = [[3], [3, 2], [2, 4, 3]]
RECTANGULAR = [[(2, 3)], [(2, 3), (4, 1)], [(1, 2), (3, 2), (2, 5)]]
COLUMNS = [None, 1, 4, 0]
DIAGONAL = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64))


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def symmetric(size):
    root = random(size, size)
    return root @ root.T + 0.5 * torch.eye(size, dtype=torch.float64)


def dense(factors):
    """Kronecker product entry by entry, from its definition."""
    result = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        blocks = [torch.cat([entry * factor for entry in row], dim=1) for row in result]
        result = torch.cat(blocks)
    return result


def argument(size, columns):
    return random(size) if columns is None else random(size, columns)


@pytest.mark.parametrize("shapes", RECTANGULAR)
@pytest.mark.parametrize("columns", COLUMNS)
def test_product(shapes, columns):
    factors = [random(*shape) for shape in shapes]
    matrix = dense(factors)
    assert torch.equal(kronecker.kfacs_to_mat(factors), matrix)
    vectors = argument(matrix.shape[1], columns)
    result = kronecker.apply_kfac_mat_prod(factors, vectors)
    torch.testing.assert_close(result, matrix @ vectors)
    assert result.is_contiguous()
    torch.testing.assert_close(kronecker.kfac_mat_prod(factors)(vectors), result)


@pytest.mark.parametrize("sizes", SQUARE)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", ["none", "float", "list"])
def test_inverse(sizes, columns, kind):
    factors = [symmetric(size) for size in sizes]
    shifts = {"none": None, "float": 0.3, "list": [0.1 * (1 + j) for j in range(len(sizes))]}
    shift = shifts[kind]
    each = shift if kind == "list" else [shift or 0.0] * len(sizes)
    shifted = [f + s * torch.eye(len(f), dtype=f.dtype) for f, s in zip(factors, each, strict=True)]
    inverse = torch.linalg.inv(dense(shifted))
    torch.testing.assert_close(dense(kronecker.inv_kfacs(factors, shift)), inverse)
    vectors = argument(len(inverse), columns)
    for result in (
        kronecker.apply_inv_kfac_mat_prod(factors, vectors, shift=shift),
        kronecker.inv_kfac_mat_prod(factors, shift=shift)(vectors),
    ):
        torch.testing.assert_close(result, inverse @ vectors)


def test_two_factors_act_on_the_flattened_weight():
    B, A, weight = random(3, 3), random(2, 2), random(3, 2)
    expected = B @ weight @ A.T
    torch.testing.assert_close(kronecker.two_kfacs_to_mat(B, A) @ weight.flatten(), expected.flatten())
    result = kronecker.apply_kfac_mat_prod([B, A], weight.flatten())
    torch.testing.assert_close(result.view(3, 2), expected)


@pytest.mark.parametrize(
    "shift, smallest", [(None, 1e8), (0.5, 2.0), (-1e-12, -1e8), ([1e-12], 1e8), (-4.0, -0.25)]
)
def test_inverse_of_eigenvalues_is_clamped(shift, smallest):
    (inverse,) = kronecker.inv_kfacs([DIAGONAL], shift=shift)
    assert inverse[1, 1].item() == pytest.approx(smallest)
    assert inverse.abs().max() <= 1e8


def test_product_is_differentiable():
    factors, vector = [random(2, 2), random(3, 3)], random(6).requires_grad_()
    torch.autograd.gradcheck(lambda v: kronecker.apply_kfac_mat_prod(factors, v), vector)


def test_is_matrix_and_is_vector():
    assert kronecker.is_matrix(random(1, 1)) and kronecker.is_vector(random(1))
    assert not any(kronecker.is_matrix(random(*shape)) for shape in [(), (1,), (1, 1, 1)])
    assert not any(kronecker.is_vector(random(*shape)) for shape in [(), (1, 1)])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kronecker.kfacs_to_mat([]), "at least one"),
        (lambda: kronecker.two_kfacs_to_mat(random(2), random(2, 2)), r"factor 0 .*\[2\]"),
        (lambda: kronecker.apply_kfac_mat_prod([random(2, 3)], random(2)), r"\[3, K\].*\[2\]"),
        (lambda: kronecker.apply_kfac_mat_prod([random(2, 2)], random(2, 1, 1)), "flatten"),
        (lambda: kronecker.inv_kfacs([random(2, 2), random(2, 3)]), "factor 1 .*square"),
        (lambda: kronecker.inv_kfacs([random(2, 2)], shift=[1.0, 2.0]), "2 shifts for 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_under_utils():
    assert len(kroneckers.__all__) == 9
    for name in kroneckers.__all__:
        assert getattr(kroneckers, name) is getattr(kronecker, name)
