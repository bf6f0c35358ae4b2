"""What a person sees who opens the server in a browser: `/` says what runs and what to do next, `/docs` every route.

Knows HTML, in English and Chinese. Asks `service` what runs; computes nothing, and answers while the engine starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from qvl import __version__
from qvl.server.service import Service

# Swagger UI is 1.5 MB of script: a browser fetches it from where FastAPI's own page does, and without a way there the
# page still lists the routes. A dependency that carries it (fastapi-offline, 0.8 MB) is much for a page of few readers.
_VIEWER = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui"
_ROUTES = ("docs", "v1/models", "health", "ready", "metrics")
# What the pages say changes with the server's state and with who asks.
_HEADERS = {"cache-control": "no-store", "vary": "Accept, Accept-Language"}
_STYLE = """<style>
:root { color-scheme: light dark }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 46em; margin: 3em auto; padding: 0 1em }
code, pre { font: 14px/1.5 ui-monospace, monospace }
pre { padding: .8em 1em; border: 1px solid #8886; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 2em }
dd { margin: 0 }
</style>"""


@dataclass(frozen=True, slots=True)
class _Words:
    """Everything a page says, in one language."""

    lang: str
    ready: str
    again: str
    facts: Mapping[str, str]
    ask: str
    clients: str
    routes: Mapping[str, str]
    viewer: str


_ENGLISH = _Words(
    lang="en",
    ready="ready",
    again="not ready: {reason} (this page looks again every three seconds)",
    facts={
        "status": "state",
        "models": "model",
        "max_model_len": "context, tokens",
        "device": "device",
        "dtype": "precision",
    },
    ask="Ask it something:",
    clients="The base URL for OpenAI's clients:",
    routes={
        "docs": "every route, with examples to try out",
        "v1/models": "what is served",
        "health": "whether HTTP is up",
        "ready": "whether a request would be answered",
        "metrics": "numbers for Prometheus",
    },
    viewer="The viewer of this page comes from cdn.jsdelivr.net. If this text stays, your browser cannot reach that. "
    "Then open {link} in a viewer on your machine (an editor, Postman, Bruno); docs/api.md in qvl's repository "
    "explains every field. The routes:",
)
_CHINESE = _Words(
    lang="zh",
    ready="已就绪",
    again="尚未就绪：{reason}（本页每三秒刷新一次）",
    facts={"status": "状态", "models": "模型", "max_model_len": "上下文（token）", "device": "设备", "dtype": "精度"},
    ask="向它提问：",
    clients="OpenAI 客户端使用的 base URL：",
    routes={
        "docs": "所有接口，附可以试用的例子",
        "v1/models": "正在提供的模型",
        "health": "HTTP 是否在运行",
        "ready": "现在提问能否得到回答",
        "metrics": "供 Prometheus 读取的指标",
    },
    viewer="本页的查看器来自 cdn.jsdelivr.net。如果这段文字一直在，说明浏览器连不上那里。"
    "可以用本机的查看器（编辑器、Postman、Bruno）打开 {link}；"
    "每个字段的说明见 qvl 仓库中的 docs/api.md。接口如下：",
)


def add_pages(router: APIRouter, service: Service) -> None:
    """`/` and `/docs`. Behind the API key like every other route: a page would tell the model's name."""

    @router.get("/", tags=["monitoring"], summary="What runs here: a page for browsers, JSON for programs")
    async def home(request: Request) -> Response:
        state = _state(service)
        if not _wants_html(request.headers.get("accept", "")):
            return Response(msgspec.json.encode(state), headers=_HEADERS, media_type="application/json")
        return _page(_home(state, _words(request), request))

    @router.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return _page(_docs(request.app.openapi()["paths"], _words(request), _prefix(request)))


def _state(service: Service) -> dict[str, Any]:
    info, reason = service.backend.info, service.not_ready()
    state = {"name": "qvl", "version": __version__, "models": list(service.names)}
    state |= {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
    # Before the engine has said them these are empty.
    known = {"max_model_len": info.max_model_len, "device": info.device, "dtype": info.dtype}
    return state | {name: value for name, value in known.items() if value}


def _home(state: Mapping[str, Any], words: _Words, request: Request) -> str:
    prefix = _prefix(request)
    base_url = f"{request.url.scheme}://{request.url.netloc}{prefix}"  # as the reader called it
    ready = "reason" not in state
    status = words.ready if ready else words.again.format(reason=state["reason"])
    shown = {**state, "models": ", ".join(state["models"]), "status": status}
    facts = [
        f"<dt>{label}</dt><dd>{escape(str(shown[key]))}</dd>" for key, label in words.facts.items() if key in shown
    ]
    links = [f"<dt>{_link(route, prefix)}</dt><dd>{words.routes[route]}</dd>" for route in _ROUTES]
    body = """-d '{"messages": [{"role": "user", "content": "Hello!"}]}'"""
    curl = f"curl {base_url}/v1/chat/completions {body}"
    return f"""<!DOCTYPE html>
<html lang="{words.lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{"" if ready else '<meta http-equiv="refresh" content="3">'}
<link rel="icon" href="data:,">
<title>qvl: {escape(shown["models"])}</title>
{_STYLE}
</head>
<body>
<h1>qvl {__version__}</h1>
<dl>{"".join(facts)}</dl>
<p>{words.ask}</p>
<pre>{escape(curl, quote=False)}</pre>
<p>{words.clients} <code>{escape(base_url)}/v1</code></p>
<dl>{"".join(links)}</dl>
</body>
</html>
"""


def _docs(routes: Mapping[str, Any], words: _Words, prefix: str) -> str:
    """Swagger UI takes the place of the text when it comes; asked for behind it, it cannot keep it from being shown."""
    viewer = words.viewer.format(link=_link("openapi.json", prefix))
    address = msgspec.json.encode(_address("openapi.json", prefix)).decode()
    listed = [
        f"<dt><code>{method.upper()} {escape(path)}</code></dt><dd>{escape(operation['summary'])}</dd>"
        for path, operations in routes.items()
        for method, operation in operations.items()
    ]
    return f"""<!DOCTYPE html>
<html lang="{words.lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>qvl: API</title>
</head>
<body>
<div id="swagger-ui">{_STYLE}
<p>{viewer}</p>
<dl>{"".join(listed)}</dl>
</div>
<link rel="stylesheet" href="{_VIEWER}.css">
<script src="{_VIEWER}-bundle.js"></script>
<script>window.SwaggerUIBundle &&
SwaggerUIBundle({{url: {address}, dom_id: "#swagger-ui", deepLinking: true}})</script>
</body>
</html>
"""


def _page(html: str) -> Response:
    return Response(html, headers=_HEADERS, media_type="text/html")


def _prefix(request: Request) -> str:
    """Where the server stands below a proxy's root, as --root-path says."""
    root_path: str = request.scope.get("root_path", "")
    return root_path


def _link(route: str, prefix: str) -> str:
    return f'<a href="{escape(_address(route, prefix))}">/{route}</a>'


def _address(route: str, prefix: str) -> str:
    """Relative where no prefix was named: then it is right behind a proxy that strips one, too."""
    return f"{prefix}/{route}" if prefix else route


def _words(request: Request) -> _Words:
    wishes = _wishes(request.headers.get("accept-language", ""))
    chinese, english = (
        max((q for name, q in wishes.items() if name.split("-")[0] == language), default=0.0)
        for language in ("zh", "en")
    )
    return _CHINESE if chinese > english else _ENGLISH


def _wants_html(accept: str) -> bool:
    """Whether HTML is preferred to JSON. Browsers name it; curl and other programs take anything, and get JSON."""
    wishes = _wishes(accept)
    html, json = (
        next((wishes[name] for name in names if name in wishes), 0.0)
        for names in (("text/html", "text/*", "*/*"), ("application/json", "application/*", "*/*"))
    )
    return html > json


def _wishes(header: str) -> dict[str, float]:
    """What an Accept header names, with its weights from 0 to 1."""
    wishes: dict[str, float] = {}
    for entry in header.lower().split(","):
        name, _, parameters = entry.partition(";")
        given = [value for key, _, value in (one.strip().partition("=") for one in parameters.split(";")) if key == "q"]
        try:
            wishes[name.strip()] = float(given[0]) if given else 1.0
        except ValueError:
            wishes[name.strip()] = 0.0
    return wishes
