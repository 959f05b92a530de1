"""Which weights are kept: averages, snapshots, restarts, merging.

batch_stats              BatchNorm statistics for averaged weights, whatever the framework
fast_geometric_ensemble  schedules of radii and learning rates
gadam                    Gadam and GadamX: Adam, or its partially adaptive sibling, with averaged
                         weights
lawa                     LAWA (Kaddour, arXiv:2209.14981): the mean of the latest few models
lookahead                Lookahead: slow weights that follow the fast ones, and to which the fast
                         ones come back
merging                  merging checkpoints: weights that stand in for a decaying learning rate,
                         and the greedy soup
params_ema               exponential moving average of the weights
periodic_swa             periodic SWA: training starts again and again from the average of its
                         last period
power_ema                power-law average of the weights (Karras et al., arXiv:2312.02696)
ring                     a ring buffer of parameter trees: the latest few, stacked along a new
                         leading axis
running_mean             the stage behind every running mean of the weights
snapshots                snapshots: the latest few models along the run
swa                      SWA (Izmailov et al., arXiv:1803.05407): the equal-weight mean of the
                         weights along the run
swag                     SWAG: the mean of the weights along the run, and a Gaussian around it to
                         sample from
wasam                    WASAM (Kaddour et al., arXiv:2202.00661): SAM's iterates, evaluated at
                         their running mean
"""
