"""Stands in for the ``vllm`` command: ``serve MODEL --port N ...`` runs the test server over a tiny model in that folder.

Faults, chosen by the served model name: "crashes" ends with an error before it is ready, "never-ready" answers nothing,
"stubborn" ignores SIGTERM and starts a worker of its own. It writes what it was given to ``$FAKE_VLLM_REPORT``.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import time


def main() -> None:
    arguments = sys.argv[1:]
    assert arguments[0] == "serve", arguments
    options = dict(zip(arguments[2::2], arguments[3::2], strict=False))
    name, port = options["--served-model-name"], int(options["--port"])
    worker = None
    if name == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]).pid
    report = {"pid": os.getpid(), "worker": worker, "arguments": arguments}
    report["batch_invariant"] = os.environ.get("VLLM_BATCH_INVARIANT")
    with open(os.environ["FAKE_VLLM_REPORT"], "w") as file:
        json.dump(report, file)
    print("loading the model", flush=True)
    if name == "crashes":
        print("RuntimeError: no GPU", flush=True)
        sys.exit(3)
    if name == "never-ready":
        time.sleep(300)
    serve_model(arguments[1], name, port) if name == "real" else serve_health(port)


def serve_model(folder: str, name: str, port: int) -> None:
    from servers.completions_server import CompletionsServer
    from transformers import AutoTokenizer

    from bvpo.engines.local.engine import create

    CompletionsServer(create(model=folder), AutoTokenizer.from_pretrained(folder), model=name, port=port)
    while True:
        time.sleep(60)


def serve_health(port: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
