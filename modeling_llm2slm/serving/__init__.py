"""
Serve a model over HTTP.

| module | what lives there |
| --- | --- |
| `schema.py` | requests and responses: fields, bounds, errors |
| `app.py` | the routes |
| `scheduler.py` | the queue, its batches, and what ends each output |
| `server.py` | the socket, and signals |
"""
