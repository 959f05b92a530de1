"""Learning rates that are measured or computed, not tuned.

sgd_by_curvature  Granziol, Zohren, Roberts, arXiv:2006.09092: SGD that looks at its own Hessian
batch_scaling     the same paper: the rate of another batch size
"""
