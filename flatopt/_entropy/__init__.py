"""The local entropy: a Langevin loop around the weights, and Entropy-SGD.

entropy_sgd              Entropy-SGD as a whole, as three published programs compute it
exponential_scoping      the growth of the stiffness
langevin                 Langevin dynamics: gradient descent with noise of a stated temperature
local_entropy            the gradient of the local entropy by a Langevin loop
"""
