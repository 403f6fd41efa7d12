"""Replays a trace in Mooncake's form against a server."""
