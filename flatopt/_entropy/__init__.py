"""The local entropy: a Langevin loop around the weights, and Entropy-SGD.

entropy_sgd              entropy-SGD as a whole, in the three forms in which it was published
langevin                 Langevin dynamics: gradient descent with thermal noise of a stated
                         temperature
local_entropy            schedules of radii and learning rates
"""
