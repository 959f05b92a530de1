"""Which weights are kept: averages, snapshots, restarts, merging.

running_mean             mechanism: the stage behind every running mean, and its state
ring                     mechanism: the latest few trees, stacked along a new leading axis
swa                      Izmailov et al., arXiv:1803.05407: the mean of all models; its schedule
params_ema               Polyak, Juditsky 1992: the mean that forgets, debiased or warmed up
bema                     Block, Zhang, arXiv:2508.00180: the mean that forgets, without its lag
power_ema                Karras et al., arXiv:2312.02696: the mean whose memory grows with the run
lawa                     Kaddour, arXiv:2209.14981: the mean of the latest few models
snapshots                the latest few models themselves
swag                     Maddox et al., arXiv:1902.02476: the mean, and a Gaussian to sample from
lookahead                Zhang et al., arXiv:1907.08610: slow weights to which the fast come back
pace                     Au, Block, arXiv:2606.25086: AdamW, pulled to its own mean
schedule_free_plus       Defazio, arXiv:2605.19095: a mean and Polyak's steps, without a schedule
periodic_swa             Guo et al., arXiv:2201.00519: training starts anew from its own mean
gadam                    Granziol et al., arXiv:2003.01247: Adam or Padam, with `swa`
wasam                    Kaddour et al., arXiv:2202.00661: `sam`, with `swa`
merging                  Tian et al., arXiv:2507.17634; Wortsman et al., arXiv:2203.05482: weighted
                         sums of models, and the greedy soup
fast_geometric_ensemble  Garipov et al., arXiv:1802.10026: a model at each low of a cyclic rate
batch_stats              BatchNorm statistics for averaged weights, whatever the framework
"""
