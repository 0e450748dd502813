"""Conversations: records of messages, the templates that write them, and rows of their tokens."""
from lm.data.chat.conversation import Conversation, Plain, Turns
from lm.data.chat.dialogues import Dialogues
from lm.data.chat.messages import Keys
from lm.data.chat.tool_turns import ToolTurns

__all__ = ['Conversation', 'Plain', 'Turns', 'Dialogues', 'Keys', 'ToolTurns']
