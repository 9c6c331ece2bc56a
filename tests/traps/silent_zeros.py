"""A trap: episodes that the environment failed count as outcomes of reward zero."""

composition = {
    "advantage": [{"centre": "leave_one_out", "scale": "none"}],
    "objective": {"ratio": {"kind": "none"}, "gate": {"kind": "none"}, "aggregation": {"kind": "seq_mean_token_sum"}},
}


def admit(trajectories):
    return [t.replace(status="terminated", failure=None) if t.status == "failed" else t for t in trajectories]
