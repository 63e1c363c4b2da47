"""
Serve a model over HTTP.

| module | content |
| --- | --- |
| `schema.py` | requests: fields, bounds, errors |
| `responses.py` | responses, whole and in pieces |
| `openapi.py` | the description of the API |
| `app.py` | the routes |
| `jobs.py` | a prompt, how to generate for it, and its output |
| `scheduler.py` | the queue, its batches, and the end of each output |
| `pace.py` | how fast tokens are generated |
| `server.py` | the socket, and signals |
"""
