"""The torch engine is a policy like any other."""

from __future__ import annotations

import pytest

from agentgym import make
from agentgym.testing import check_policy
from agentgym.types import Sampling


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_torch_engine_conforms(deterministic):
    pytest.importorskip("torch")
    from agentgym.modeling import build
    from agentgym.modeling.renderer import Renderer
    from agentgym.modeling.tokenizer import closed_vocabulary
    from agentgym_policies.torch_engine import TorchEngine

    env = make("shopping-v0", surface="compact")
    renderer = Renderer(closed_vocabulary(env.vocabulary()))
    model = build.tiny(len(renderer.tokenizer), hidden=32, layers=1)
    sampling = Sampling(max_tokens=8)
    engine = TorchEngine(
        model, renderer, slots=4, max_length=512, sampling=sampling, deterministic=deterministic, threads=1
    )
    try:
        report = check_policy(engine, env, episodes=2, deterministic=deterministic)
    finally:
        engine.close()
    report.raise_for_failures()
    assert report["spans"].status == report["released"].status == "passed"
