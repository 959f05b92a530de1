"""Sparse training: few weights are alive, and which ones is learnt.

densities        mechanism: how many weights of each leaf live, `erk_sparsities` among others
sparse_training  Evci et al., arXiv:1911.11134 (RigL); Mocanu et al., arXiv:1707.04780 (SET): the
                 smallest weights make room for others, at the same number
"""
