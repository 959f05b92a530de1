"""Several copies of the parameters that attract each other.

couple_replicas          the springs between replicas and their barycentre (Baldassi et al.,
                         arXiv:1605.06444)
gossip                   gossip: replicas that average with their neighbours instead of with
                         everyone
hold_replicas            a wrapper that keeps replicas in its state, for training loops that know
                         of one model only
parle                    Parle: replicas that each descend on their local entropy, coupled every
                         so many steps
replicas                 replicas: several copies of the parameters, and their barycentre
replicated_sgd           replicated SGD as a recipe, and the schedules of its coupling
"""
