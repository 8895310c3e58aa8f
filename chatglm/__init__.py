"""The model side: published ChatGLM weights on today's transformers, many conversations at once.

    tokenizer, model = chatglm.load()                        # the bundled tiny ChatGLM
    response, history = model.chat(tokenizer, "你好")
    engine = chatglm.Engine(tokenizer, model)                # for a server

Reading order (api.py, client.py and server/ are beside this folder). First sitting: api.py,
client.py, generate.py, sampling.py, text/messages.py, text/tokenizer.py, text/chatglm2.py,
text/rounds.py, text/detokenizer.py, engine/engine.py, engine/sequence.py, engine/statistics.py,
engine/queue.py. Second: engine/transformers_batch.py, engine/cache_config.py, engine/rows.py,
text/continuation.py, errors.py, server/, text/tools.py, text/forms.py, text/constraint.py. Third:
checkpoint/, hardware/, engine/cpu_attention.py, engine/prefix_attention.py, engine/contexts.py,
engine/cache_salt.py, engine/cpu_glm.py, engine/cpu_cache.py, text/time_limit.py,
text/template.py, text/glm4.py, text/chatglm1.py, tiny/.
"""

from chatglm.checkpoint.load import load
from chatglm.engine.engine import Engine
from chatglm.engine.sequence import Chunk, Sequence
from chatglm.errors import EngineError, InvalidField, PromptTooLong, QueueFull
from chatglm.sampling import SamplingParams

__all__ = [
    "Chunk",
    "Engine",
    "EngineError",
    "InvalidField",
    "PromptTooLong",
    "QueueFull",
    "SamplingParams",
    "Sequence",
    "load",
]
