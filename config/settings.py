"""What this program is. What differs from machine to machine stands in settings.toml."""

from app.model import Database
from lamsonq.server import QueueConfig, Receiver, Relay
from lamsonq.settings import machine

here = machine("config/settings.toml")

receiver_config = here.receiver.config()
relay_config = here.relay.config()
database_config = here.database

# the modules whose functions take the mail
handlers = ["app.handlers.post"]

# what a (name) in a route stands for
router_defaults = {"host": here.host_pattern(), "post_name": "[a-zA-Z0-9][a-zA-Z0-9.]+"}

# what a boot fills in
relay: Relay
receiver: Receiver | None
database: Database
queue_config: QueueConfig
queue_handlers: list[str]

# this is for when you run the config.queue boot
queue_config = {"queue": "run/posts", "sleep": 10}

queue_handlers = ["app.handlers.index"]
