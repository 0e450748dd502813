"""Text from a model."""
from lm.generate.completion import Draft, random_streams
from lm.generate.draft_model import DraftModel
from lm.generate.drafted_steps import Drafter
from lm.generate.engine import Engine, State, Tokens, longest_text
from lm.generate.filters import keep_min_p, keep_top_k, keep_top_p, process
from lm.generate.grammars import Grammar, Grammars, of_json_schema, of_regex, read_grammar
from lm.generate.prompt_lookup import PromptLookup
from lm.generate.request import Event, Request, Scores
from lm.generate.sampling import Sampling, Settings, settings
from lm.generate.scheduler import Scheduler
from lm.generate.text import DEFAULT, PLAIN, generate, room, stream, tokens
from lm.generate.text_stream import TextStream, text_and_source, with_bos

__all__ = ['Draft', 'Drafter', 'DraftModel', 'PromptLookup', 'random_streams', 'Engine', 'State', 'Tokens',
           'longest_text', 'keep_min_p', 'keep_top_k', 'keep_top_p', 'process', 'Grammar', 'Grammars', 'of_json_schema',
           'of_regex', 'read_grammar', 'Sampling', 'Settings', 'settings', 'Event', 'Request', 'Scheduler', 'Scores',
           'DEFAULT', 'PLAIN', 'generate', 'room', 'stream', 'tokens', 'TextStream', 'text_and_source', 'with_bos']
