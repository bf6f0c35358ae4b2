"""A small typed client for any OpenAI-compatible vision server, qvl's own first; blocking or awaited.

    with Client() as client:
        print(client.ask("Read the text.", "photo.jpg"))

`calls` decides (what is sent, what an answer means, what is tried again) and `questions` in which order, and neither
touches a socket; `blocking` and `awaited` carry their bytes; `media` turns what a program holds into addresses, and
`screen` takes a picture of the screen. Knows no model and imports no torch.
"""

from __future__ import annotations

from qvl.client.awaited import AsyncClient
from qvl.client.blocking import Client
from qvl.client.calls import EventReader, Retries, body_of, collect, question
from qvl.client.local import local_server
from qvl.client.media import media_kind
from qvl.client.screen import screen_part, screenshot

__all__ = [
    "AsyncClient",
    "Client",
    "EventReader",
    "Retries",
    "body_of",
    "collect",
    "local_server",
    "media_kind",
    "question",
    "screen_part",
    "screenshot",
]
