"""Curvature in Kronecker factors, layer by layer.

scale_by_kfac  Martens, Grosse, arXiv:1503.05671: K-FAC; George et al., arXiv:1806.03884: EKFAC
"""
