"""A model folder behind HTTP: one page for people, JSON for programs.

Modules, each importing only those before it: connections, page, server.
"""
