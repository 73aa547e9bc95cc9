"""The index, in a process of its own: `lamsonq start -boot config.queue -pid run/queue.pid`."""

from app.model import configure_database
from config import settings
from lamsonq import queue, view
from lamsonq.routing import Router
from lamsonq.server import QueueReceiver, Relay, SMTPReceiver
from lamsonq.settings import load_logging
from lamsonq.state import SQLiteStorage

load_logging("config/logging.toml")

# where the mail that we send goes
settings.relay = Relay(**settings.relay_config)

# where to listen for incoming messages
settings.receiver = QueueReceiver(settings.queue_config["queue"], settings.queue_config["sleep"])

settings.database = configure_database(settings.database_config, also_create=False)

Router.defaults(**settings.router_defaults)
# NOTE: this is using a different handlers variable in settings
Router.load(settings.queue_handlers)
Router.RELOAD = True
Router.STATE_STORE = SQLiteStorage("run/state.db")
Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")

view.LOADER = view.templates("app/templates")
