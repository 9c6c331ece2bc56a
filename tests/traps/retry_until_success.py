"""A trap: an episode that broke or earned nothing is played again with fresh noise."""

composition = {
    "advantage": [{"centre": "leave_one_out", "scale": "none"}],
    "objective": {"ratio": {"kind": "none"}, "gate": {"kind": "none"}, "aggregation": {"kind": "seq_mean_token_sum"}},
}
attempts = 4


def retry(trajectory):
    return trajectory.status == "failed" or trajectory.metrics["truth"] <= 0.0
