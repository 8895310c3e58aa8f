"""What a course's own server would not have: keys, refusals, events, OpenAI's format, shutdown.

    settings.py, keys.py    flags and environment variables, and the keys among them
    bodies.py, parsing.py   what every JSON body has in common: strict types, limits, and errors
                            that name the field
    incoming.py     from a request to an answer under way: key, body, engine
    clients.py, preparation.py    who asks, and the threads in which clients take turns
    browsers.py     web pages of other origins
    http_errors.py  where a 400, 401, 403, 408, 413, 429, 431 or 503 gets its form
    responses.py    an answer on its way to a client that may disconnect
    answers.py, stops.py    an answer up to a stop sequence, with calls; several at once
    metrics.py      /metrics and /status
    headers.py      request ids, unknown fields, HEAD
    uvicorn_http1.py    offers to upgrade, and HTTP/1.0
    sse.py          /stream, server-sent events
    static.py       the files of the page at GET /
    openai_request.py, openai_chat.py, openai_text.py, openai_forms.py, openai_fields.py
                    what a request to /v1 may hold
    openai_replies.py, openai_api.py    what is answered, and the routes
    listener.py, connections.py, shutdown.py, logs.py    from the port to the last answer

Nothing here imports torch, and nothing in chatglm/ imports this.
"""
