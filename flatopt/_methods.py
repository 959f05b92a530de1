"""The named methods: each a short sentence of perturbations, stages and wrappers."""

from typing import Any

import optax

from flatopt import _checks
from flatopt._average import swa
from flatopt._combiners import mix_clean
from flatopt._gradient_at import ascent_stage, off_when_zero
from flatopt._noise import filter_noise
from flatopt._perturbations import scale_to_adaptive_norm, scale_to_layer_norms, scale_to_norm
from flatopt._random import KeyLike
from flatopt._reuse_direction import reuse_direction


def sam(
    rho: optax.ScalarOrSchedule, start: int | None = None, every: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimisation: descend with the gradient at the top of a small ascent step.

    .. math:: g \leftarrow \nabla L\big(w + \rho \, g / (\|g\| + 10^{-12})\big)

    Args:
      rho: radius, >= 0, in units of the parameters' Euclidean norm; 0.05 to 0.2 are usual for
        convolutional networks. A number, a traced array, or a schedule of the step count. With the
        number 0 the stage is the identity and takes no gradient.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> def loss_fn(w, x):
      ...     return jnp.mean((x @ w) ** 2)
      >>> tx = optax.chain(flatopt.sam(rho=0.05), optax.sgd(0.1, momentum=0.9))
      >>> params, batch = jnp.array([1.0, -2.0]), jnp.eye(2)
      >>> opt_state = tx.init(params)
      >>> grads = jax.grad(loss_fn)(params, batch)
      >>> grad_fn = flatopt.make_grad_fn(loss_fn, batch)
      >>> updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.1022  0.2045]

    References:
      Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently Improving
      Generalization. arXiv:2010.01412

    Notes:
      Place: what stands after it sees the descent gradient; clip and decay there. Gradient
      evaluations: one extra per sharp update. State: two integers; one temporary copy of the
      parameters.
    """
    _checks.check_number("rho", rho, low=0.0)
    return ascent_stage(rho, scale_to_norm(rho), start=start, every=every)


def asam(
    rho: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule = 0.01,
    mask: Any = None,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the ascent step is measured in units of the weights.

    .. math::
      g \leftarrow \nabla L\big(w + \rho \, T^2 g / (\|T g\| + 10^{-12})\big), \qquad
      T = \mathrm{diag}(|w| + \eta)

    Args:
      rho: radius, >= 0, in units of `T`: about ten times that of `sam`, 0.5 to 2 are usual. A
        number, a traced array, or a schedule of the step count. With the number 0 the stage is the
        identity and takes no gradient.
      eta: added to `|w|`, >= 0: likewise.
      mask: where `T` applies; see `scale_to_adaptive_norm`. Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      every: one sharp update in `every`, >= 1; None means each. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> def loss_fn(w):
      ...     return 0.5 * jnp.sum(w**2)
      >>> tx = optax.chain(flatopt.asam(rho=0.5), optax.sgd(0.1))
      >>> params = jnp.array([1.0, -2.0])
      >>> grad_fn = flatopt.make_grad_fn(loss_fn)
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.1123  0.2975]

    References:
      Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks. arXiv:2102.11600

    Notes:
      Place, gradient evaluations, state: as for `sam`.
    """
    perturbation = scale_to_adaptive_norm(rho, eta, mask)
    return ascent_stage(rho, perturbation, start=start, every=every)


def wasam(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule,
    start: int | None = None,
    every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weight-averaged SAM: SAM's iterates, evaluated at their running mean.

    .. math::
      w_{t+1} = w_t + u\big(\nabla L(w_t + \rho g_t / \|g_t\|)\big), \qquad
      \bar w = \text{mean of } w_t, \; t = start, start + every, \dots

    Args:
      optimizer: any optax transformation.
      rho: radius of `sam`, >= 0: a number, a traced array, or a schedule of the step count.
      start: number of the first update, counted from 1, whose weights enter the mean; see `swa`.
        Static.
      every: one in `every` updates from there on; the authors average at the end of each epoch.
        Static.

    Returns:
      `optax.chain(sam(rho), optimizer, swa(start, every))`; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flatopt
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * w**2)
      >>> tx = flatopt.wasam(optax.sgd(0.5), rho=0.1)
      >>> params = jnp.array(1.0)
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params:.4f} {flatopt.eval_params(opt_state, params):.4f}")
      0.1750 0.3125

    References:
      Kaddour, Liu, Silva, Kusner. When Do Flat Minima Optimizers Work? arXiv:2202.00661

    Notes:
      Gradient evaluations: one extra per update. State: that of `optimizer`, one copy of the
      parameters and a few scalars.
    """
    return optax.chain(sam(rho), optimizer, swa(start, every))


def looksam(
    rho: optax.ScalarOrSchedule,
    every: int,
    alpha: optax.ScalarOrSchedule,
    layerwise: bool = False,
    start: int | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM's second gradient once in `every` updates, and its direction reused in between.

    .. math::
      g_t \leftarrow \nabla L(w + \rho \, g_t / \|g_t\|) \quad \text{or} \quad
      g_t + \alpha \|g_t\| \, v

    with v the unit vector of what the last sharp gradient added across the clean one.

    Args:
      rho: radius, >= 0: a number, a traced array, or a schedule of the step count. With the number
        0 the stage is the identity and takes no gradient.
      every: one sharp update in `every`, >= 1; 5 to 10 are usual. Static.
      alpha: share of the reused direction, >= 0; 0.2 to 0.7 are usual. Like `rho`.
      layerwise: True: the ascent step is `scale_to_layer_norms(rho)`, and the direction is kept
        for each leaf apart (Look-LayerSAM, for large batches). Static.
      start: number of plain updates before the first sharp one, >= 0; None means 0. Static.
      accumulator_dtype: dtype of the reused direction; None means that of the parameters.
        `jnp.bfloat16` halves the state of parameters in float32. Static.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.looksam(rho=0.05, every=5, alpha=0.2), optax.sgd(0.1))
      >>> params = jnp.array([1.0, -2.0])
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.1022  0.2045]

    References:
      Liu, Mai, Chen, Hsieh, You. Towards Efficient and Scalable Sharpness-Aware Minimization.
      arXiv:2203.02714

    Notes:
      Place: as for `sam`. Gradient evaluations: one extra in `every` updates. State: one copy of
      the parameters, two integers; two temporary copies.
    """
    _checks.check_number("rho", rho, low=0.0)
    perturbation = scale_to_layer_norms(rho) if layerwise else scale_to_norm(rho)
    return off_when_zero(
        rho, reuse_direction(perturbation, every, alpha, layerwise, start, accumulator_dtype)
    )


def rwp(
    std: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule = 0.5,
    key: KeyLike = 0,
    filter_axis: int | None = None,
    start: int | None = None,
    every: int | None = None,
    noise: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Random weight perturbation: mix in the gradient at a randomly displaced point.

    .. math::
      g \leftarrow (1 - \alpha) \, g + \alpha \, \nabla L(w + \epsilon), \qquad
      \epsilon_f = \sigma \, \|w_f\| \, z_f, \quad z \sim \mathcal{N}(0, 1)

    Args:
      std: :math:`\sigma`, >= 0, in units of each filter's norm; 0.01 is usual: a number, a traced
        array, or a schedule of the step count. With the number 0 the stage is the identity and
        takes no gradient.
      alpha: weight of the displaced gradient; 1 is its gradient alone. Likewise.
      key: an int seed, a key from `jax.random.key`, or its uint32 key data.
      filter_axis: the axis that numbers the filters; see `filter_noise`. Static.
      start: number of plain updates before the first displaced one, >= 0; None means 0. Static.
      every: displace one update in `every`, >= 1; None means each. Static.
      noise: transformation that draws z; None means `standard_normal(key)`.

    Returns:
      A stage to be chained before any optimiser; `update` needs `params` and `grad_fn`. The authors
      take the second gradient on another batch: let `grad_fn` do so.

    Raises:
      ValueError: if an argument is out of range, or `params` or `grad_fn` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import flatopt
      >>> tx = optax.chain(flatopt.rwp(std=0.01, alpha=0.5, key=0), optax.sgd(0.1))
      >>> params = jnp.ones((2, 3))
      >>> grad_fn = flatopt.make_grad_fn(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
      >>> print(bool(jnp.all(abs(updates + 0.1) < 0.01)))
      True

    References:
      Li et al. Revisiting Random Weight Perturbation for Efficiently Improving Generalization.
      arXiv:2404.00357

    Notes:
      Place: as for `sam`. Gradient evaluations: one extra. Though it does not depend on the clean
      one, it waits for it, so that the activations of one pass at a time are in memory; XLA for
      CPUs does not keep to the order. State: one key, a few integers; two temporary copies of the
      parameters, and the random bits.
    """
    perturbation = filter_noise(std, key, filter_axis, noise)
    return ascent_stage(std, perturbation, combiner=mix_clean(alpha), start=start, every=every)
