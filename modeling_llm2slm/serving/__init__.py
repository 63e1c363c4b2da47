"""
Serve a model over HTTP.

| module | content |
| --- | --- |
| `schema.py` | requests and responses: fields, bounds, errors |
| `app.py` | the routes |
| `scheduler.py` | the queue, its batches, and the end of each output |
| `server.py` | the socket, and signals |
"""
