"""The learning rate of another batch size (Granziol, Zohren, Roberts, arXiv:2006.09092)."""

import jax
import optax

from flatopt._core import checks

POWERS = {"linear": 1.0, "sqrt": 0.5}


def batch_scaling(
    learning_rate: optax.ScalarOrSchedule, old_batch: int, new_batch: int, *, rule: str = "linear"
) -> optax.ScalarOrSchedule:
    r"""The learning rate for batches of another size.

    .. math:: \eta' = \eta \, B' / B \qquad \text{or} \qquad \eta' = \eta \, \sqrt{B' / B}

    Args:
      learning_rate: :math:`\eta` >= 0, that of the old batch: a number, a traced array, or a
        schedule.
      old_batch, new_batch: B and B', numbers of examples, >= 1.
      rule: "linear", for SGD; "sqrt", for Adam and others that divide by the size of gradients.

    Returns:
      The new rate: a number for a number, a schedule for a schedule of the same step count.

    Examples:
      >>> import flatopt
      >>> print(flatopt.batch_scaling(0.1, 128, 512))
      0.4
      >>> print(flatopt.batch_scaling(0.1, 128, 512, rule="sqrt"))
      0.2

    References:
      Granziol, Zohren, Roberts. Learning Rates as a Function of Batch Size: A Random Matrix Theory
      Approach to Neural Network Training. arXiv:2006.09092

    Cost: 0 extra gradients; 0 copies.
    """
    checks.check_number("learning_rate", learning_rate, low=0.0)
    checks.check_count("old_batch", old_batch, 1, none_allowed=False)
    checks.check_count("new_batch", new_batch, 1, none_allowed=False)
    checks.check_choice("rule", rule, POWERS)
    factor = (new_batch / old_batch) ** POWERS[rule]
    if not callable(learning_rate):
        return factor * learning_rate
    schedule = learning_rate

    def scaled(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return factor * schedule(step)

    return scaled
