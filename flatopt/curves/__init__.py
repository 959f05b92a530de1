"""Curves of low loss between solutions: Bezier curves and polygonal chains, and their training."""

from flatopt.curves._bases import bezier as bezier
from flatopt.curves._bases import polychain as polychain
from flatopt.curves._evaluation import evaluate as evaluate
from flatopt.curves._points import control_points as control_points
from flatopt.curves._points import fixed_points as fixed_points
from flatopt.curves._points import point as point
from flatopt.curves._training import curve_loss as curve_loss
from flatopt.curves._training import keep_fixed as keep_fixed
from flatopt.curves._training import train as train
