"""Servers that speak OpenAI's protocol as policies: chat completions, and completions of our own token ids.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", model="my-model")
    async with endpoint.session(episode, agent) as session:
        action = await session.act(observation)          # text and tool calls
    await endpoint.aclose()

Where the server returns its token ids (vLLM does), actions carry an exact `TokenSpan` and can be trained on; elsewhere
they are for evaluation only, and `endpoint.refusal` says why. Trouble of the server is retried and then becomes an
`EngineFault`, never a reward; a tool call whose arguments are no JSON object is the model's own doing, stays text and
is an outcome.
"""

from agentgym_policies.endpoint.chat import ChatSession as ChatSession
from agentgym_policies.endpoint.chat import Endpoint as Endpoint
from agentgym_policies.endpoint.client import Client as Client
