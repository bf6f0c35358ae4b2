"""Flags and commands of other servers that qvl does not have: what to do instead, for people who bring them along.

Knows words only.
"""

from __future__ import annotations

_LEAVE_OUT = "leave it out"
_OWN = "the checkpoint's own is always used"
_NO_DOWNLOAD = "qvl downloads nothing, MODEL is a folder or the name of one"

HINTS = {
    "--model": "the model is the first argument: qvl serve MODEL",
    "--tokenizer": _OWN,
    "--tokenizer-mode": _OWN,
    "--chat-template": _OWN,
    "--revision": _NO_DOWNLOAD,
    "--download-dir": _NO_DOWNLOAD,
    "--uvicorn-log-level": "here it is --log-level",
    "--kv-cache-dtype": f"the KV cache has the model's precision; {_LEAVE_OUT}",
    "--kv-cache-memory-bytes": "here it is --kv-cache-memory",
    "--enable-chunked-prefill": f"long prompts always go in chunks; {_LEAVE_OUT}",
    "--no-enable-chunked-prefill": f"long prompts always go in chunks; {_LEAVE_OUT}",
    "--swap-space": f"sequences that give way are computed again; {_LEAVE_OUT}",
    "--disable-log-requests": f"requests are not logged unless --access-log says so; {_LEAVE_OUT}",
    "--no-enable-log-requests": f"requests are not logged unless --access-log says so; {_LEAVE_OUT}",
    "--disable-log-stats": f"figures stand at /metrics only; {_LEAVE_OUT}",
    "--ssl-keyfile": "TLS belongs to the proxy in front",
    "--ssl-certfile": "TLS belongs to the proxy in front",
    "--enable-lora": "this version has no LoRA",
    "--lora-modules": "this version has no LoRA",
    "--enable-auto-tool-choice": "this version has no tool calls",
    "--tool-call-parser": "this version has no tool calls",
    "--data-parallel-size": "start one server for each device instead",
    "--allowed-origins": "here it is --cors-origin",
    "--mem-fraction-static": "here it is --gpu-memory-utilization",
    "--context-length": "here it is --max-model-len",
    "--ctx-size": "here it is --max-model-len",
}

_FETCH = "hf download NAME or modelscope download --model NAME fetches a model"
_FOLDERS = "models are folders: ./models, ~/models or the Hugging Face cache"

COMMANDS = {
    "pull": _FETCH,
    "download": _FETCH,
    "run": "qvl chat --model MODEL talks to a model, qvl serve MODEL serves it",
    "generate": "qvl ask TEXT FILE asks one question",
    "list": _FOLDERS,
    "ls": _FOLDERS,
    "show": "qvl check MODEL says what a model is and how it would run",
    "plan": "qvl check MODEL says whether a model can be loaded here, and how",
    "stop": "Ctrl-C or SIGTERM ends a server",
}
