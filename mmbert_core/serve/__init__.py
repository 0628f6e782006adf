"""An HTTP server for a model folder: a web page, and JSON for programs.

Modules, each importing only those before it: connections, page, server.
"""
