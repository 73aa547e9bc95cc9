"""What a handler says of its own job: try it again later, or never.

from lamsonq.deferred import Dead, Later

@route("(ticket)@(host)")
@stateless
def START(message, ticket=None, host=None):
    if archive_is_down():
        raise Later("the archive is down")
"""

from lamsonq.errors import Dead, Later

__all__ = ["Dead", "Later"]
