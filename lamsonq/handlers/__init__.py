"""Handlers that come with lamsonq: log, queue and forward. Name them in `handlers` like your own."""
