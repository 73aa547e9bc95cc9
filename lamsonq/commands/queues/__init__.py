"""What waits in queues, looked at and changed: `lamsonq queue`. One file for each kind of thing to do."""

from lamsonq.commands.queues.lamson import VERBS, queue

__all__ = ["VERBS", "queue"]
