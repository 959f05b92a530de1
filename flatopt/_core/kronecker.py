"""Matrices that are Kronecker products: their damped inverses, times a matrix."""

from typing import Any

import jax
import jax.numpy as jnp

Factors = tuple[jax.Array, jax.Array]


def balance(a: jax.Array, g: jax.Array) -> jax.Array:
    r""":math:`\pi`: the root of the mean eigenvalue of A over that of G; 1 where one is 0."""
    sizes = jnp.trace(a) / len(a), jnp.trace(g) / len(g)
    usable = (sizes[0] > 0) & (sizes[1] > 0)
    return jnp.where(usable, jnp.sqrt(sizes[0] / jnp.where(usable, sizes[1], 1)), 1)


def factored_inverses(a: jax.Array, g: jax.Array, damping: Any) -> Factors:
    r""":math:`(A / \pi + \sqrt\lambda I)^{-1}` and :math:`(\pi G + \sqrt\lambda I)^{-1}`.

    A factor of size 1 takes no damping: the other takes all.
    """
    one = jnp.ones_like
    if len(a) == 1 or len(g) == 1:
        small, large = (a, g) if len(a) == 1 else (g, a)
        inverse = _inverse(small[0, 0] * large, damping)
        return (one(a), inverse) if len(a) == 1 else (inverse, one(g))
    pi, root = balance(a, g), jnp.sqrt(damping)
    return _inverse(a / pi, root), _inverse(pi * g, root)


def _inverse(matrix: jax.Array, damping: Any) -> jax.Array:
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    factor = jax.scipy.linalg.cho_factor(matrix + jnp.asarray(damping, matrix.dtype) * eye)
    return jax.scipy.linalg.cho_solve(factor, eye)


def eigh(matrix: jax.Array) -> Factors:
    """Eigenvalues, at least 0, and eigenvectors."""
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.maximum(values, 0), vectors


def divide_in_basis(d: jax.Array, bases: Factors, scales: jax.Array, damping: Any) -> jax.Array:
    r""":math:`Q_A (Q_A^T D Q_G / (S + \lambda)) Q_G^T`."""
    q_a, q_g = bases
    return q_a @ (q_a.T @ d @ q_g / (scales + jnp.asarray(damping, d.dtype))) @ q_g.T
