"""The model side: published ChatGLM weights on today's transformers, many conversations at once.

    tokenizer, model = chatglm.load()                        # the bundled tiny ChatGLM
    response, history = model.chat(tokenizer, "你好")
    engine = chatglm.Engine(tokenizer, model)                # for a server

Reading order: glm.py, tokenizer.py, quantize.py, devices.py, device.py, files.py, checkpoint.py,
tools.py, detokenizer.py, chat.py, sampler.py, attention.py, network.py, request.py, router.py,
places.py, engine.py; bodies.py and completions.py: what requests may hold.
"""

from chatglm.checkpoint import load
from chatglm.engine import Engine
from chatglm.request import Chunk, EngineError, QueueFull, Request

__all__ = ["Chunk", "Engine", "EngineError", "QueueFull", "Request", "load"]
