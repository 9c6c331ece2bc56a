"""Objectives: a method is a choice on every axis, declared as a table and computed by small pure functions.

    declare.py       the tables and their options                           (no torch)
    refusals.py      what cannot be meant                                   (no torch)
    paths.py         numbers by their dotted path, for controllers          (no torch)
    tokens.py        what a loss sees: the trained tokens of a step
    ratios.py        policy / proximal policy, in parts                      S3
    gates.py         how far an update may push; bounds.py finds the bounds  S4
    behaviours.py    weights for the mismatch between sampler and learner    S5
    aggregations.py  tokens to a number                                      S6
    regularisers.py  what else the loss holds                                S7
    contrast.py      advantages that read the current log-probs
    custom.py        functions of your own on any axis
    compute.py       the composition of all of these

loss_t = sg(w_t) gate(A_t, ratio_t), aggregated; plus the regularisers, aggregated alike.
"""
