"""A trap: the ratio is taken against the sampler, and the weight for the sampler's mismatch multiplies it."""

composition = {"advantage": [{"centre": "leave_one_out", "scale": "none"}]}


def loss(objective, tokens, totals):
    ratio = (tokens.logp - tokens.sampled).exp()
    weight = (tokens.logp.detach() - tokens.sampled).exp().clamp(max=2.0)
    return -(weight * ratio * tokens.advantages).sum() / totals.sequences
