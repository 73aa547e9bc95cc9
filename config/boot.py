"""The mail server: `lamsonq start`."""

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
settings.receiver = SMTPReceiver(**settings.receiver_config)

settings.database = configure_database(settings.database_config, also_create=True)

Router.defaults(**settings.router_defaults)
Router.load(settings.handlers)
Router.RELOAD = True
Router.STATE_STORE = SQLiteStorage("run/state.db")
Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")

view.LOADER = view.templates("app/templates")
