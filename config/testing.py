"""What the tests run: the real handlers, no ports. Mail that is sent lands in run/queue, and nobody's states last."""

from app.model import configure_database
from config import settings
from lamsonq import queue, testing, view
from lamsonq.routing import Router

settings.relay = testing.relay()
settings.receiver = None
settings.database = configure_database(settings.database_config, also_create=True)

Router.defaults(**settings.router_defaults)
Router.load(settings.handlers)
Router.LOG_EXCEPTIONS = False
Router.UNDELIVERABLE_QUEUE = queue.Queue("run/undeliverable")

view.LOADER = view.templates("app/templates")
