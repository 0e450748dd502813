"""An HTTP server for one model, with the endpoints of OpenAI's protocol, and its chat page."""
from lm.serve.engine_thread import EngineThread
from lm.serve.served_model import ServedModel
from lm.serve.server_guard import Limits
from lm.serve.serving import address, check_packages, hosts, listen, serve
from lm.serve.web_application import application

__all__ = ['application', 'EngineThread', 'ServedModel', 'Limits', 'address', 'check_packages', 'hosts', 'listen',
           'serve']
