"""Mechanisms without a paper's name: what every method is built from.

batches                  means over batches: a scan over stacked arrays, or a Python loop over an
                         iterable
checks                   argument checks: each error names the argument, its value, the allowed
                         range and the mend
eval_params              `eval_params`: the weights to evaluate, for any nest of methods
grad_fn                  the gradient contract: `grad_fn(params, i)` gives the gradient anywhere
                         the optimiser asks
means                    running means of parameters: when a model enters, and how, in float32 at
                         least
momenta                  the momenta inside any optimiser's state, known by the names of their
                         fields
progress                 a progress bar for loops in Python that take long
quantile                 order statistics of large arrays without sorting: a few sweeps, wherever
                         the entries lie
rng                      random keys, kept in states as raw data that every checkpoint format can
                         hold, and draws
stage                    what the factories share: the transformation around a pure function
timing                   when a method acts, and what its schedules say then
tree_math                tree arithmetic that `optax.tree` lacks: norms and products that survive
                         half precision
"""
