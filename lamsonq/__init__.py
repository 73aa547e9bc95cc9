"""lamsonq: a mail application server. What a web framework is for HTTP, for e-mail."""

__version__ = "0.1.0"
