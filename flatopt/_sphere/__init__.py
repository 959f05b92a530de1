"""Weights of fixed norm, for networks to which only the direction of the weights matters.

groups                          mechanism: which weights share a norm, and their norms
project_to_sphere               the last stage: every step lands on the sphere
fixed_elr                       Kodryan et al., arXiv:2209.03695: a fixed effective learning rate
effective_learning_rate         the learning rate over the squared norm, as a run goes on
"""
