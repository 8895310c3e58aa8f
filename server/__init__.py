"""What a course's own server would not have: keys, refusals, events, OpenAI's format, shutdown.

    settings.py     flags and environment variables
    bodies.py       what every JSON body has in common: strict types, errors that name the field
    admission.py    from a request to an answer under way: key, body, engine
    refusals.py     where a 400, 401, 413, 429 or 503 gets its form
    responses.py    an answer on its way to a client that may disconnect
    answers.py, stops.py    an answer up to a stop sequence, with calls; several at once
    heads.py        request ids, unknown fields, HEAD
    http1.py        offers to upgrade, and HTTP/1.0
    sse.py          /stream, server-sent events
    openai_request.py, openai_fields.py, openai_api.py    /v1, OpenAI's chat completions
    listener.py, shutdown.py    from the port to the last answer

Nothing here imports torch, and nothing in chatglm/ imports this.
"""
