"""Each bad settings file gives exactly these messages, all of them at once, one line each."""

# ruff: noqa: E501  (a message is one line for its reader, and stands here as one)

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.config.load import ConfigError, load
from tests.config.places import furnish, unprivileged

TLS = "tls: {cert_file: server.pem, key_file: server.key}\n"
BEHIND = "upstream: {grpc: '127.0.0.1:9001'}\n"
GOOD = TLS + BEHIND
EMBEDDED = TLS + "model_repository_path: models\n"


def tls(**keys: str) -> str:
    """A file that is good but for these keys of tls."""
    section = {"cert_file": "server.pem", "key_file": "server.key", **keys}
    return BEHIND + "tls: {" + ", ".join(f"{key}: {value}" for key, value in section.items()) + "}\n"


# name -> (text of the file, its messages). In a message, {d} is the folder of the file and {f} the file itself.
CASES: dict[str, tuple[str, list[str]]] = {
    # the file as a whole
    "empty": (
        "",
        ["{f}: is empty; set at least tls.cert_file, tls.key_file, and model_repository_path or upstream.grpc"]),
    "only comments": (
        "# nothing\n\n",
        ["{f}: holds no setting; set at least tls.cert_file, tls.key_file, and model_repository_path or upstream.grpc"]),
    "a list": (
        "- grpc_port: 8001\n",
        ["{f}: is not a mapping of keys to values but a list; write 'key: value' lines"]),
    "a text": (
        "grpc_port\n",
        ["{f}: is not a mapping of keys to values but a single text; write 'key: value' lines"]),
    "a number": (
        "8001\n",
        ["{f}: is not a mapping of keys to values but a single value; write 'key: value' lines"]),
    "a pem file": (
        "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg\n-----END PRIVATE KEY-----\n",
        ["{f}: is not a mapping of keys to values but a PEM file; write 'key: value' lines"]),
    "tab": (
        GOOD + "log:\n\tlevel: info\n",
        ["{f}: line 4, column 1: is not YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs"]),
    "unclosed": (
        "tls: {cert_file: server.pem\n",
        ["{f}: line 2, column 1: is not YAML: expected ',' or '}', but got '<stream end>'; a bracket or a quote is not closed"]),
    "bad indentation": (
        "tls:\n  cert_file: server.pem\n key_file: server.key\n",
        ["{f}: line 3, column 2: is not YAML: expected <block end>, but found '<block mapping start>'; check the indentation"]),
    "colon in a text": (
        GOOD + "host: gate: 1\n",
        ["{f}: line 3, column 11: is not YAML: mapping values are not allowed here; put a text that holds ': ' in quotes, and check the indentation"]),
    "bracket address unquoted": (
        GOOD + "admin: {address: [::1]:9090}\n",
        ["{f}: line 3, column 19: is not YAML: expected the node content, but found ':'; put an address such as '[::1]:9090' in quotes"]),
    "unknown tag": (
        GOOD + "host: !!python/object/apply:os.system ['true']\n",
        ["{f}: line 3, column 7: is not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'; write the value without a tag"]),
    "unknown alias": (
        GOOD + "host: *where\n",
        ["{f}: line 3, column 7: is not YAML: found undefined alias 'where'"]),
    "two documents": (
        GOOD + "---\n" + GOOD,
        ["{f}: line 3, column 1: a second document starts here; keep one, and no further line ---"]),
    "deep": (
        "host: " + "[" * 3000,
        ["{f}: is nested too deeply to be a settings file"]),
    "bad date": (
        GOOD + "host: 2024-99-99\n",
        ["{f}: holds a date that does not exist (month must be in 1..12); put it in quotes"]),
    "control character": (
        GOOD + "host: \"a\x00b\"\n",
        ["{f}: line 3: is not YAML: holds the character U+0000"]),
    # keys
    "twice": (
        GOOD + "grpc_port: 8001\nlog: {level: info}\ngrpc_port: 8002\n",
        ["grpc_port: is given twice, in lines 3 and 5; keep one of them"]),
    "twice in a section": (
        BEHIND + "tls:\n  cert_file: server.pem\n  key_file: server.key\n  cert_file: server.pem\n",
        ["tls.cert_file: is given twice, in lines 3 and 5; keep one of them"]),
    "unknown with a near one": (
        GOOD + "grpc-port: 8001\n",
        ["grpc-port: unknown key; did you mean grpc_port?"]),
    "unknown camel case": (
        GOOD + "grpcPort: 8001\n",
        ["grpcPort: unknown key; did you mean grpc_port?"]),
    "unknown of another section": (
        GOOD + "client_auth: require\n",
        ["client_auth: unknown key; did you mean tls.client_auth?"]),
    "unknown in a section": (
        GOOD + "limits: {conections: 10}\n",
        ["limits.conections: unknown key; did you mean limits.connections?"]),
    "unknown with nothing near": (
        GOOD + "log: {colour: red}\n",
        ["log.colour: unknown key; known here: level, format, access"]),
    "unknown secret": (
        tls(key_password="hunter2"),
        ["tls.key_password: unknown key; known here: cert_file, key_file, ca_file, client_auth"]),
    "number as a key": (
        GOOD + "8001: grpc\n",
        ["8001: is not a key (a key is text); known here: model_repository_path, backend, upstream, host, grpc_port, http_port, tls, admin, limits, timeouts, drain, log, workers"]),
    "key material as a key": (
        GOOD + "'-----BEGIN PRIVATE KEY-----': 1\n",
        ["(key material): unknown key; known here: model_repository_path, backend, upstream, host, grpc_port, http_port, tls, admin, limits, timeouts, drain, log, workers"]),
    "policy": (
        GOOD + "policy: {default: deny}\n",
        ["policy: rules are not available in this version, and nothing is started, because a rule that is not enforced would be worse than none; remove the key"]),
    "one port": (
        GOOD + "port: 443\n",
        ["port: one port for both protocols is not available in this version; use grpc_port"]),
    "section is a text": (
        GOOD + "limits: many\n",
        ["limits: 'many' is not a mapping; give its keys on indented lines: connections, connections_per_address, streams_per_connection, header_list_bytes, stream_window_bytes, upstream_connections, streams_per_upstream_connection, pending_requests, pending_bytes, waiting_bytes_per_connection"]),
    "section is a list": (
        GOOD + "timeouts: [1, 2]\n",
        ["timeouts: a list is not a mapping; give its keys on indented lines: handshake, connect, unread, idle"]),
    "tls missing": (
        BEHIND,
        ["tls.cert_file: is missing; give the path of a file (PEM: the server certificate, then its intermediate certificates)",
         "tls.key_file: is missing; give the path of a file (PEM: the private key that belongs to it, unencrypted)"]),
    "tls empty": (
        BEHIND + "tls:\n",
        ["tls.cert_file: is missing; give the path of a file (PEM: the server certificate, then its intermediate certificates)",
         "tls.key_file: is missing; give the path of a file (PEM: the private key that belongs to it, unencrypted)"]),
    "cert missing": (
        BEHIND + "tls: {key_file: server.key}\n",
        ["tls.cert_file: is missing; give the path of a file (PEM: the server certificate, then its intermediate certificates)"]),
    "key missing": (
        BEHIND + "tls: {cert_file: server.pem}\n",
        ["tls.key_file: is missing; give the path of a file (PEM: the private key that belongs to it, unencrypted)"]),
    # which backend
    "neither": (
        TLS,
        ["model_repository_path: neither it nor upstream.grpc is set; give a folder of models to serve, or the address of a running server in upstream.grpc"]),
    "both": (
        GOOD + "model_repository_path: models\n",
        ["upstream.grpc: 127.0.0.1:9001 is given as well as model_repository_path {d}/models; keep one of the two: model_repository_path starts the embedded backend, upstream fronts a running server"]),
    "upstream without grpc": (
        TLS + "upstream: {http: '127.0.0.1:9000'}\n",
        ["upstream.grpc: is missing; give an address such as 127.0.0.1:9001 (gRPC address of the server behind (h2c))"]),
    "upstream is a text": (
        TLS + "upstream: 127.0.0.1:9001\n",
        ["upstream: '127.0.0.1:9001' is not a mapping; give its keys on indented lines: grpc, http"]),
    "repository missing": (
        TLS + "model_repository_path: gone\n",
        ["model_repository_path: {d}/gone does not exist; give a folder with one folder per model"]),
    "repository is a file": (
        TLS + "model_repository_path: a-file\n",
        ["model_repository_path: {d}/a-file is not a folder; give a folder with one folder per model"]),
    "repository null and nothing else": (
        TLS + "model_repository_path:\n",
        ["model_repository_path: neither it nor upstream.grpc is set; give a folder of models to serve, or the address of a running server in upstream.grpc"]),
    # the embedded backend
    "backend without a repository": (
        GOOD + "backend: {model_control_mode: poll, repository_poll: 2, load_models: [a, b], metrics: '127.0.0.1:8002', memory_limit_bytes: 2000000}\n",
        ["backend.model_control_mode: poll is for the embedded backend, which only model_repository_path starts; set that, or remove the key",
         "backend.repository_poll: 2 is for the embedded backend, which only model_repository_path starts; set that, or remove the key",
         "backend.load_models: [a, b] is for the embedded backend, which only model_repository_path starts; set that, or remove the key",
         "backend.metrics: 127.0.0.1:8002 is for the embedded backend, which only model_repository_path starts; set that, or remove the key",
         "backend.memory_limit_bytes: 2000000 is for the embedded backend, which only model_repository_path starts; set that, or remove the key"]),
    "startup models without mode explicit": (
        EMBEDDED + "backend: {load_models: [a, b]}\n",
        ["backend.load_models: [a, b] is for backend.model_control_mode explicit, and that is none; set it to explicit, or remove the key"]),
    "startup models in mode poll": (
        EMBEDDED + "backend: {load_models: '*', model_control_mode: poll}\n",
        ["backend.load_models: [*] is for backend.model_control_mode explicit, and that is poll; set it to explicit, or remove the key"]),
    "a wrong mode is one fault": (
        EMBEDDED + "backend: {load_models: [a], model_control_mode: manual}\n",
        ["backend.model_control_mode: 'manual' is not known here; give one of: none, poll, explicit"]),
    "a wrong repository is one fault": (
        TLS + "model_repository_path: 7\nbackend: {metrics: '127.0.0.1:8002'}\n",
        ["model_repository_path: 7 is not a path; give the path of a file as text"]),
    "list is a number": (
        EMBEDDED + "backend: {load_models: 7}\n",
        ["backend.load_models: 7 is not a list; give a list such as [one, two] (loaded at the start in mode explicit; '*': all)"]),
    "list is a mapping": (
        EMBEDDED + "backend: {load_models: {digits: 1}}\n",
        ["backend.load_models: a mapping is not a list; give a list such as [one, two] (loaded at the start in mode explicit; '*': all)"]),
    "list has no value": (
        EMBEDDED + "backend: {load_models: }\n",
        ["backend.load_models: has no value; give a list such as [one, two] (loaded at the start in mode explicit; '*': all), or remove the key"]),
    "list with a number": (
        EMBEDDED + "backend: {model_control_mode: explicit, load_models: [digits, 7]}\n",
        ["backend.load_models: 7 is not a model's name; give a name as text, in quotes where it looks like a number"]),
    "list with nothing": (
        EMBEDDED + "backend: {model_control_mode: explicit, load_models: [digits, ~]}\n",
        ["backend.load_models: null is not a model's name; give a name as text, in quotes where it looks like a number"]),
    "list in a list": (
        EMBEDDED + "backend: {model_control_mode: explicit, load_models: [[digits]]}\n",
        ["backend.load_models: a list is not a model's name; give a name as text, in quotes where it looks like a number"]),
    "list with a path": (
        EMBEDDED + "backend: {model_control_mode: explicit, load_models: [digits, ../digits]}\n",
        ["backend.load_models: '../digits' is not a model's name; give the name of its folder in model_repository_path, or '*' for all"]),
    "list with a comma too many": (
        EMBEDDED + "backend: {model_control_mode: explicit, load_models: 'digits,,simple'}\n",
        ["backend.load_models: '' is not a model's name; give the name of its folder in model_repository_path, or '*' for all"]),
    "list with a key in it": (
        EMBEDDED + "backend: {model_control_mode: explicit, load_models: ['-----BEGIN PRIVATE KEY-----']}\n",
        ["backend.load_models: this value is not a model's name; give the name of its folder in model_repository_path, or '*' for all"]),
    "list with a key in it, as base64": (
        EMBEDDED + f"backend: {{model_control_mode: explicit, load_models: [MI{'A' * 80}]}}\n",
        ["backend.load_models: this value is not a model's name; give the name of its folder in model_repository_path, or '*' for all"]),
    "metrics on a unix socket": (
        EMBEDDED + "backend: {metrics: 'unix:/run/metrics.sock'}\n",
        ["backend.metrics: 'unix:/run/metrics.sock' is a unix socket, which Prometheus does not read; write HOST:PORT or [IPV6]:PORT"]),
    "metrics is a port": (
        EMBEDDED + "backend: {metrics: 8002}\n",
        ["backend.metrics: 8002 is not an address; write HOST:PORT, [IPV6]:PORT or unix:/path"]),
    "memory with a unit": (
        EMBEDDED + "backend: {memory_limit_bytes: 1G}\n",
        ["backend.memory_limit_bytes: '1G' is not a whole number; give a whole number from 1048576 to 17592186044416"]),
    "poll at once": (
        EMBEDDED + "backend: {repository_poll: 0}\n",
        ["backend.repository_poll: 0 is out of range; give seconds from 0.1 to 86400"]),
    "backend is a text": (
        EMBEDDED + "backend: embedded\n",
        ["backend: 'embedded' is not a mapping; give its keys on indented lines: model_control_mode, repository_poll, load_models, metrics, memory_limit_bytes"]),
    "unknown in backend": (
        EMBEDDED + "backend: {load_model: [a]}\n",
        ["backend.load_model: unknown key; did you mean backend.load_models?"]),
    # addresses
    "address without a port": (
        TLS + "upstream: {grpc: triton}\n",
        ["upstream.grpc: 'triton' has no port; write HOST:PORT, [IPV6]:PORT or unix:/path"]),
    "address is a URL": (
        TLS + "upstream: {grpc: 'http://triton:8001'}\n",
        ["upstream.grpc: 'http://triton:8001' is a URL; write HOST:PORT without a scheme, or unix:/path"]),
    "address without a host": (
        GOOD + "admin: {address: ':9090'}\n",
        ["admin.address: ':9090' has no host; write 127.0.0.1:PORT, or 0.0.0.0:PORT for every address"]),
    "address port too high": (
        TLS + "upstream: {grpc: 'triton:70000'}\n",
        ["upstream.grpc: 'triton:70000' has no port number after the last colon; give one from 0 to 65535"]),
    "address port 0": (
        TLS + "upstream: {grpc: 'triton:0'}\n",
        ["upstream.grpc: 'triton:0' has port 0, which cannot be connected to; give a port from 1 to 65535"]),
    "address ipv6 without brackets": (
        GOOD + "admin: {address: '::1:9090'}\n",
        ["admin.address: '::1:9090' has several colons; put an IPv6 address in brackets, as in [::1]:9090"]),
    "address bad ipv6": (
        GOOD + "admin: {address: '[::zz]:9090'}\n",
        ["admin.address: '[::zz]:9090' has no IPv6 address between [ and ]; write it as in [::1]:9090"]),
    "address bad ipv4": (
        GOOD + "admin: {address: '127.0.0.256:9090'}\n",
        ["admin.address: '127.0.0.256:9090' has a host that is no IPv4 address; write it as in 127.0.0.1:9090"]),
    "address bad host": (
        GOOD + "admin: {address: 'a b:9090'}\n",
        ["admin.address: 'a b:9090' has a host that is neither a name nor an IP address; write HOST:PORT"]),
    "address relative socket": (
        TLS + "upstream: {grpc: 'unix:triton.sock'}\n",
        ["upstream.grpc: 'unix:triton.sock' needs an absolute path after unix:, as in unix:/run/triton.sock"]),
    "address long socket": (
        TLS + "upstream: {grpc: 'unix:/" + "s" * 110 + "'}\n",
        ["upstream.grpc: 'unix:/ssssssssssssssssssssssssssssssssssssssssssssssssssss…' is too long: the path of a unix socket has at most 107 bytes"]),
    "address is a number": (
        GOOD + "admin: {address: 9090}\n",
        ["admin.address: 9090 is not an address; write HOST:PORT, [IPV6]:PORT or unix:/path"]),
    "address sexagesimal": (
        GOOD + "admin: {address: 127:30}\n",
        ["admin.address: 7650 is not an address; write HOST:PORT, [IPV6]:PORT or unix:/path"]),
    "host with a port": (
        GOOD + "host: 127.0.0.1:8001\n",
        ["host: '127.0.0.1:8001' is not a host; leave scheme and port out (the port is grpc_port)"]),
    "host with spaces": (
        GOOD + "host: my host\n",
        ["host: 'my host' is neither a host name nor an IP address; '' means every address"]),
    "host is a number": (
        GOOD + "host: 10\n",
        ["host: 10 is not a host; give a name or an IP address in quotes, or '' for all"]),
    "host is a short ipv4": (
        GOOD + "host: 10.0.1\n",
        ["host: '10.0.1' is neither a host name nor an IP address; '' means every address"]),
    # numbers and words
    "port too high": (
        GOOD + "grpc_port: 70000\n",
        ["grpc_port: 70000 is out of range; give a whole number from 0 to 65535"]),
    "port negative": (
        GOOD + "http_port: -1\n",
        ["http_port: -1 is out of range; give a whole number from 0 to 65535"]),
    "port is a text": (
        GOOD + "grpc_port: https\n",
        ["grpc_port: 'https' is not a whole number; give a whole number from 0 to 65535"]),
    "port is yes": (
        GOOD + "grpc_port: yes\n",
        ["grpc_port: true is not a whole number; give a whole number from 0 to 65535"]),
    "port is a fraction": (
        GOOD + "grpc_port: 8001.5\n",
        ["grpc_port: 8001.5 is not a whole number; give a whole number from 0 to 65535"]),
    "port has no value": (
        GOOD + "grpc_port:\n",
        ["grpc_port: has no value; give a whole number from 0 to 65535, or remove the key"]),
    "port is a list": (
        GOOD + "grpc_port: [8001, 8002]\n",
        ["grpc_port: a list is not a whole number; give a whole number from 0 to 65535"]),
    "limit zero": (
        GOOD + "limits: {connections: 0}\n",
        ["limits.connections: 0 is out of range; give a whole number from 1 to 1000000"]),
    "limit with a unit": (
        GOOD + "limits: {stream_window_bytes: 256k}\n",
        ["limits.stream_window_bytes: '256k' is not a whole number; give a whole number from 65536 to 16777216"]),
    "limit too small": (
        GOOD + "limits: {header_list_bytes: 10}\n",
        ["limits.header_list_bytes: 10 is out of range; give a whole number from 4096 to 1048576"]),
    "limit too large": (
        GOOD + "limits: {stream_window_bytes: 99999999999999999999}\n",
        ["limits.stream_window_bytes: 99999999999999999999 is out of range; give a whole number from 65536 to 16777216"]),
    "time with a unit": (
        GOOD + "timeouts: {handshake: 10s}\n",
        ["timeouts.handshake: '10s' is not a number of seconds; give seconds above 0 and up to 300"]),
    "time zero": (
        GOOD + "timeouts: {connect: 0}\n",
        ["timeouts.connect: 0 is out of range; give seconds above 0 and up to 300"]),
    "time negative": (
        GOOD + "drain: {delay: -1}\n",
        ["drain.delay: -1 is out of range; give seconds from 0 to 3600"]),
    "time endless": (
        GOOD + "timeouts: {idle: .inf}\n",
        ["timeouts.idle: inf is out of range; give seconds from 0 to 86400"]),
    "time not a number": (
        GOOD + "timeouts: {idle: .nan}\n",
        ["timeouts.idle: nan is out of range; give seconds from 0 to 86400"]),
    "time true": (
        GOOD + "timeouts: {idle: true}\n",
        ["timeouts.idle: true is not a number of seconds; give seconds from 0 to 86400"]),
    "level unknown": (
        GOOD + "log: {level: verbose}\n",
        ["log.level: 'verbose' is not known here; give one of: debug, info, warning, error"]),
    "level upper case": (
        GOOD + "log: {level: INFO}\n",
        ["log.level: 'INFO' is not known here; give one of: debug, info, warning, error"]),
    "format is a number": (
        GOOD + "log: {format: 3}\n",
        ["log.format: 3 is not known here; give one of: text, json"]),
    "access is a word": (
        GOOD + "log: {access: sometimes}\n",
        ["log.access: 'sometimes' is neither true nor false; give one of the two"]),
    "workers": (
        GOOD + "workers: 4\n",
        ["workers: 4 is not available in this version; leave it out or set it to 1"]),
    "workers zero": (
        GOOD + "workers: 0\n",
        ["workers: 0 is out of range; give a whole number from 1 to 1024"]),
    # listeners
    "same port for grpc and admin": (
        GOOD + "grpc_port: 9090\n",
        ["admin.address: port 9090 is taken by grpc_port as well; give each listener a port of its own"]),
    "same port for grpc and http": (
        GOOD + "grpc_port: 8000\nhttp_port: 8000\n",
        ["http_port: port 8000 is taken by grpc_port as well; give each listener a port of its own"]),
    "same port on the same host": (
        GOOD + "host: 127.0.0.1\ngrpc_port: 9090\n",
        ["admin.address: port 9090 is taken by grpc_port as well; give each listener a port of its own"]),
    "same port for metrics and admin": (
        EMBEDDED + "backend: {metrics: '0.0.0.0:9090'}\n",
        ["backend.metrics: port 9090 is taken by admin.address as well; give each listener a port of its own"]),
    "same port for metrics and grpc": (
        EMBEDDED + "backend: {metrics: '127.0.0.1:8001'}\n",
        ["backend.metrics: port 8001 is taken by grpc_port as well; give each listener a port of its own"]),
    # TLS
    "auth is no": (
        tls(ca_file="ca.pem", client_auth="no"),
        ["tls.client_auth: false is not known here (YAML reads a bare yes, no, on or off as a truth value); give one of: none, optional, require"]),
    "auth unknown": (
        tls(ca_file="ca.pem", client_auth="required"),
        ["tls.client_auth: 'required' is not known here; give one of: none, optional, require"]),
    "auth without a CA": (
        tls(client_auth="require"),
        ["tls.client_auth: require needs tls.ca_file, the CA that client certificates are checked against; set tls.ca_file, or tls.client_auth to none"]),
    "optional auth without a CA": (
        tls(client_auth="optional"),
        ["tls.client_auth: optional needs tls.ca_file, the CA that client certificates are checked against; set tls.ca_file, or tls.client_auth to none"]),
    "cert does not exist": (
        tls(cert_file="gone.pem"),
        ["tls.cert_file: {d}/gone.pem does not exist; give the path of a file that does"]),
    "cert dangling": (
        tls(cert_file="dangling.pem"),
        ["tls.cert_file: {d}/dangling.pem does not exist; give the path of a file that does"]),
    "cert loop": (
        tls(cert_file="loop.pem"),
        ["tls.cert_file: {d}/loop.pem cannot be read (too many levels of symbolic links)"]),
    "cert below a file": (
        tls(cert_file="a-file/x.pem"),
        ["tls.cert_file: {d}/a-file/x.pem cannot be read (not a directory)"]),
    "cert is a folder": (
        tls(cert_file="models"),
        ["tls.cert_file: {d}/models is a folder; give the path of a file"]),
    "cert is a device": (
        tls(cert_file="/dev/null"),
        ["tls.cert_file: /dev/null is not a regular file; give the path of a file"]),
    "cert empty": (
        tls(cert_file="empty.pem"),
        ["tls.cert_file: {d}/empty.pem is empty"]),
    "cert is text": (
        tls(cert_file="text.pem"),
        ["tls.cert_file: {d}/text.pem holds no certificate in PEM (-----BEGIN …-----)"]),
    "cert damaged": (
        tls(cert_file="damaged.pem"),
        ["tls.cert_file: {d}/damaged.pem holds a certificate that cannot be decoded; the file may be cut off or damaged"]),
    "cert cut off": (
        tls(cert_file="half.pem"),
        ["tls.cert_file: {d}/half.pem holds no whole certificate: a BEGIN line has no END line; the file may be cut off"]),
    "cert in der": (
        tls(cert_file="server.der"),
        ["tls.cert_file: {d}/server.der is binary (DER or PKCS#12), not PEM; convert it: openssl x509 -inform der -in IN -out OUT"]),
    "cert huge": (
        tls(cert_file="huge.pem"),
        ["tls.cert_file: {d}/huge.pem is larger than 1 MiB; give a PEM file"]),
    "cert and key exchanged": (
        tls(cert_file="server.key", key_file="server.pem"),
        ["tls.cert_file: {d}/server.key holds no certificate, only: private key; were two files exchanged?",
         "tls.key_file: {d}/server.pem holds no private key, only: certificate; were two files exchanged?"]),
    "cert in wrong order": (
        tls(cert_file="wrong-order.pem"),
        ["tls.key_file: {d}/server.key belongs to certificate number 2 in tls.cert_file {d}/wrong-order.pem; put the server's own certificate first, then the intermediate ones"]),
    "cert refused by openssl": (
        tls(cert_file="small.pem", key_file="small.key"),
        ["tls.cert_file: {d}/small.pem is refused by OpenSSL (ee key too small); use a key of ECDSA P-256, or of RSA with 2048 bits or more"]),
    "cert path empty": (
        tls(cert_file="''"),
        ["tls.cert_file: '' is not a path; give the path of a file"]),
    "cert path is a number": (
        tls(cert_file="7"),
        ["tls.cert_file: 7 is not a path; give the path of a file as text"]),
    "key does not exist": (
        tls(key_file="gone.key"),
        ["tls.key_file: {d}/gone.key does not exist; give the path of a file that does"]),
    "key of another certificate": (
        tls(key_file="other.key"),
        ["tls.key_file: {d}/other.key does not belong to the certificate in tls.cert_file {d}/server.pem (CN=server); give the key that the certificate was issued for"]),
    "key encrypted": (
        tls(key_file="encrypted.key"),
        ["tls.key_file: {d}/encrypted.key is encrypted; decrypt it, as a passphrase cannot be asked for: openssl pkey -in IN -out OUT"]),
    "key encrypted legacy": (
        tls(key_file="encrypted-legacy.key"),
        ["tls.key_file: {d}/encrypted-legacy.key is encrypted; decrypt it, as a passphrase cannot be asked for: openssl pkey -in IN -out OUT"]),
    "key damaged": (
        tls(key_file="damaged.key"),
        ["tls.key_file: {d}/damaged.key holds a private key that cannot be decoded; the file may be cut off or damaged"]),
    "key cut off": (
        tls(key_file="cut.key"),
        ["tls.key_file: {d}/cut.key holds no whole private key: a BEGIN line has no END line; the file may be cut off"]),
    "key in der": (
        tls(key_file="key.der"),
        ["tls.key_file: {d}/key.der is binary (DER or PKCS#12), not PEM; convert it: openssl pkey -inform der -in IN -out OUT"]),
    "key text in place of a path": (
        BEHIND + "tls:\n  cert_file: server.pem\n  key_file: |\n    -----BEGIN PRIVATE KEY-----\n    MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg\n    -----END PRIVATE KEY-----\n",
        ["tls.key_file: this value is the content of a file; write it to a file and give the path of that"]),
    "ca is a key": (
        tls(ca_file="server.key"),
        ["tls.ca_file: {d}/server.key holds no certificate, only: private key; were two files exchanged?"]),
    "ca does not exist": (
        tls(ca_file="gone.pem", client_auth="require"),
        ["tls.ca_file: {d}/gone.pem does not exist; give the path of a file that does"]),
    "ca without a certificate": (
        tls(ca_file="text.pem"),
        ["tls.ca_file: {d}/text.pem holds no certificate in PEM (-----BEGIN …-----)"]),
    # all at once
    "everything": (
        "grpc_port: 70000\nlog: {level: loud}\nmodel_repository_path: gone\ntls: {cert_file: gone.pem, key_file: text.pem, client_auth: require}\nworkers: 2\npolicy: {}\nlimit: {}\n",
        ["policy: rules are not available in this version, and nothing is started, because a rule that is not enforced would be worse than none; remove the key",
         "limit: unknown key; did you mean limits?",
         "grpc_port: 70000 is out of range; give a whole number from 0 to 65535",
         "log.level: 'loud' is not known here; give one of: debug, info, warning, error",
         "tls.client_auth: require needs tls.ca_file, the CA that client certificates are checked against; set tls.ca_file, or tls.client_auth to none",
         "workers: 2 is not available in this version; leave it out or set it to 1",
         "model_repository_path: {d}/gone does not exist; give a folder with one folder per model",
         "tls.cert_file: {d}/gone.pem does not exist; give the path of a file that does",
         "tls.key_file: {d}/text.pem holds no private key in PEM (-----BEGIN …-----)"]),
}  # fmt: skip


def faults_of(config: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(config, env={})
    return caught.value.faults


@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_gives_exactly_these_messages(name: str, place: Path) -> None:
    text, messages = CASES[name]
    config = place / "gate.yaml"
    config.write_text(text)
    faults = faults_of(config)
    assert faults == [line.replace("{d}", str(place)).replace("{f}", str(config)) for line in messages]
    assert not any("\n" in fault for fault in faults)


def test_the_good_parts_of_the_table_are_good(place: Path) -> None:
    config = place / "gate.yaml"
    for text in (GOOD, tls(), tls(ca_file="ca.pem", client_auth="require"), TLS + "model_repository_path: models\n"):
        config.write_text(text)
        load(config, env={})


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    config = tmp_path / "gate.yaml"
    assert faults_of(config) == [f"{config}: does not exist; give the path of a settings file"]


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    assert faults_of(tmp_path) == [f"{tmp_path}: is a folder; give the path of a settings file"]


def test_a_file_that_is_not_utf_8_is_said_so_with_the_line(tmp_path: Path) -> None:
    config = tmp_path / "gate.yaml"
    config.write_bytes(GOOD.encode() + b"host: caf\xe9\n")
    assert faults_of(config) == [f"{config}: line 3: is not UTF-8 text; save it as UTF-8"]


def test_a_huge_file_is_not_read_as_settings(tmp_path: Path) -> None:
    config = tmp_path / "gate.yaml"
    config.write_bytes(b"# filler\n" * 120_000)
    assert faults_of(config) == [f"{config}: is larger than 1 MiB; that is no settings file"]


@pytest.fixture(scope="module")
def closed_place() -> Iterator[Path]:
    """A furnished folder that anybody may enter, with files that nobody but root may read."""
    with tempfile.TemporaryDirectory() as name:
        place = furnish(Path(name) / "place")
        Path(name).chmod(0o755)
        place.chmod(0o755)
        for path in ("models", "server.pem", "server.key", "ca.pem", "closed.yaml"):
            (place / path).touch()
            (place / path).chmod(0)
        yield place
        (place / "models").chmod(0o700)


def test_files_that_may_not_be_read_are_named_with_the_user(closed_place: Path) -> None:
    config = closed_place / "gate.yaml"
    config.write_text("model_repository_path: models\n" + TLS.replace("}", ", ca_file: ca.pem}"))
    config.chmod(0o644)
    with unprivileged() as user:
        faults = faults_of(config)
    remedy = f"cannot be read by user {user}; change its owner or mode"
    assert faults == [
        f"model_repository_path: {closed_place}/models {remedy}",
        f"tls.cert_file: {closed_place}/server.pem {remedy}",
        f"tls.key_file: {closed_place}/server.key {remedy}",
        f"tls.ca_file: {closed_place}/ca.pem {remedy}",
    ]


def test_a_settings_file_that_may_not_be_read_is_named_with_the_user(closed_place: Path) -> None:
    config = closed_place / "closed.yaml"
    with unprivileged() as user:
        faults = faults_of(config)
    assert faults == [f"{config}: cannot be read by user {user}; change its owner or mode"]


def test_no_message_holds_a_secret(place: Path) -> None:
    body = (place / "server.key").read_text().splitlines()[1]
    config = place / "gate.yaml"
    for text in (
        BEHIND + "tls:\n  cert_file: server.pem\n  key_file: |\n    " + (place / "server.key").read_text().replace("\n", "\n    "),
        tls(key_file=body + body),
        tls(ca_file=f"['{body}']"),
        tls(client_auth=f"'{body}'"),
        tls(key_password=f"'{body}'"),
        GOOD + f"log: {body}\n",
        (place / "server.key").read_text(),
    ):
        config.write_text(text)
        assert not any(body[:20] in fault for fault in faults_of(config)), text
