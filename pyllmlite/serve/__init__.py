"""The HTTP server: an OpenAI-compatible API over an engine that runs in a process of its own.

``worker`` is the engine's process, ``client`` its face in the HTTP process, ``wire`` what they
say to each other; ``app`` holds the routes, ``server`` the sockets and signals.
"""
