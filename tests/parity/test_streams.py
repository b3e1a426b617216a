"""ModelStreamInfer: what each answer carries, for models with one response and with none, one or many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from tests.parity.clients import GRPC, Client, covers, mentions
from tests.parity.test_infer import check_pair, pair

Answer = tuple[Any, Any]  # (result, error), one of which is None


def count(client: Client, number: int) -> list[Any]:
    """Inputs of `repeat`, which gives that many responses, or as many and then an error if it is negative."""
    return [client.input("COUNT", np.array([number], np.int32))]


async def answers(
    client: Client, requests: Sequence[dict[str, Any]], wanted: int, before_last: int = 0
) -> list[Answer]:
    """What comes on one stream for these requests; the stream must end with no more than `wanted` answers.

    The last request is sent when `before_last` answers have come.
    """
    if client.kind == "grpc":
        return await _with_callback(client, requests, wanted, before_last)
    found: list[Answer] = []
    enough = asyncio.Event()

    async def ask() -> AsyncIterator[dict[str, Any]]:
        for request in requests[:-1]:
            yield dict(request)
        if before_last:
            await asyncio.wait_for(enough.wait(), 30)
        yield dict(requests[-1])

    async for answer in client.method("stream_infer")(ask(), stream_timeout=30):
        found.append(answer)
        if len(found) == before_last:
            enough.set()
    return found


async def _with_callback(
    client: Client, requests: Sequence[dict[str, Any]], wanted: int, before_last: int
) -> list[Answer]:
    arrived: asyncio.Queue[Answer] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    client.method("start_stream")(
        lambda result, error: loop.call_soon_threadsafe(arrived.put_nowait, (result, error)), stream_timeout=30
    )
    send = client.method("async_stream_infer")
    for request in requests[:-1]:
        send(**request)
    found = [await asyncio.wait_for(arrived.get(), 30) for _ in range(before_last)]
    send(**requests[-1])
    found += [await asyncio.wait_for(arrived.get(), 30) for _ in range(wanted - before_last)]
    client.method("stop_stream")()  # half-closes, and waits for the server's end
    await asyncio.sleep(0)
    while not arrived.empty():
        found.append(arrived.get_nowait())
    return found


def final(result: Any) -> bool:
    """Whether this is the request's last response."""
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def numbers(found: Sequence[Answer]) -> list[int]:
    """What `repeat` counted."""
    assert not [error for _, error in found if error is not None]
    return [int(result.as_numpy("OUT")[0]) for result, _ in found]


def by_id(found: Sequence[Answer]) -> dict[str, Any]:
    """The results, whatever the order they came in, one for each request."""
    assert not [error for _, error in found if error is not None]
    results = {result.get_response().id: result for result, _ in found}
    assert len(results) == len(found)
    return results


@covers(kinds=GRPC)
async def test_a_model_with_one_response(client: Client) -> None:
    requests = [
        {"model_name": "simple", "inputs": pair(client), "request_id": "a"},
        {"model_name": "simple", "inputs": pair(client), "request_id": "b", "enable_empty_final_response": True},
        {"model_name": "simple", "inputs": pair(client), "outputs": [client.output("OUTPUT1")], "request_id": "c"},
    ]
    results = by_id(await answers(client, requests, 3))
    assert set(results) == {"a", "b", "c"}
    assert [final(result) for result in results.values()] == [True] * 3
    for result in results.values():
        assert set(result.get_response().parameters) == {"triton_final_response"}
    check_pair(results["a"])
    check_pair(results["b"])
    check_pair(results["c"], "OUTPUT1")


@covers(kinds=GRPC)
async def test_parameters_of_a_request(client: Client) -> None:
    requests = [
        {"model_name": "simple", "inputs": pair(client), "request_id": "one", "parameters": {"text": "x"}},
        {"model_name": "repeat", "inputs": count(client, 2), "request_id": "many", "parameters": {"text": "x"}},
    ]
    # They come back with every answer of the embedded server, and with none of Triton's.
    back = set() if client.server.is_triton else {"text"}
    for request, number in zip(requests, (1, 2), strict=True):
        for result, error in await answers(client, [request], number):
            assert error is None
            assert set(result.get_response().parameters) == {"triton_final_response", *back}


@covers(kinds=GRPC)
async def test_every_response_of_a_decoupled_model(client: Client) -> None:
    for number in (1, 3):
        asked = {"model_name": "repeat", "inputs": count(client, number), "request_id": "r"}
        found = await answers(client, [asked], number)
        assert numbers(found) == list(range(number))
        responses = [result.get_response() for result, _ in found]
        assert [(one.model_name, one.model_version, one.id) for one in responses] == [("repeat", "1", "r")] * number
        assert [final(result) for result, _ in found] == [False] * number


@covers(kinds=("grpc",))  # the other has no way to ask
async def test_an_empty_final_response_if_asked_for(client: Client) -> None:
    for number in (0, 1, 2):
        asked = {"model_name": "repeat", "inputs": count(client, number), "request_id": "r"}
        found = await answers(client, [{**asked, "enable_empty_final_response": True}], number + 1)
        assert numbers(found[:-1]) == list(range(number))
        assert [final(result) for result, _ in found] == [False] * number + [True]
        last = found[-1][0].get_response()
        assert (last.model_name, last.id, len(last.outputs), last.raw_output_contents) == ("repeat", "r", 0, [])


@covers(kinds=GRPC)
async def test_no_response_at_all(client: Client) -> None:
    # The request behind it shows that none came.
    requests = [
        {"model_name": "repeat", "inputs": count(client, 0), "request_id": "none"},
        {"model_name": "simple", "inputs": pair(client), "request_id": "after"},
    ]
    found = await answers(client, requests, 1)
    assert [result.get_response().id for result, _ in found] == ["after"]


@covers(kinds=GRPC)
async def test_an_error_after_responses(client: Client) -> None:
    # One request after the other: Triton aborts if two models have something to write to a stream at once.
    requests = [
        {"model_name": "repeat", "inputs": count(client, -2), "request_id": "r"},
        {"model_name": "simple", "inputs": pair(client), "request_id": "after"},
    ]
    found = await answers(client, requests, 4, before_last=3)
    assert numbers(found[:2]) == [0, 1]
    assert found[2][0] is None
    mentions(found[2][1].message(), "gave up after 2")
    assert [result.get_response().id for result, _ in found[3:]] == ["after"]
    check_pair(found[3][0])


@covers(kinds=GRPC)
async def test_errors_leave_the_stream_open(client: Client) -> None:
    requests = [
        {"model_name": "nope", "inputs": pair(client), "request_id": "a"},
        {"model_name": "simple", "inputs": pair(client)[:1], "request_id": "b"},
        {"model_name": "simple", "inputs": pair(client), "model_version": "9", "request_id": "c"},
        {"model_name": "fails", "inputs": [client.input("IN", np.array([5], np.int32))], "request_id": "d"},
        {"model_name": "simple", "inputs": pair(client), "request_id": "e"},
    ]
    found = await answers(client, requests, 5)
    texts = {error.message() for _, error in found if error is not None}
    assert len(texts) == 4
    for words in [("'nope'",), ("'simple'", "INPUT1"), ("version 9",), ("boom at 5",)]:
        assert [text for text in texts if all(word in text for word in words)], texts
    [(result, _)] = [answer for answer in found if answer[1] is None]
    assert result.get_response().id == "e"
    check_pair(result)


@covers(kinds=GRPC)
async def test_the_order_of_answers(client: Client) -> None:
    requests = [{"model_name": "simple", "inputs": pair(client), "request_id": str(one)} for one in range(20)]
    found = await answers(client, requests, 20)
    ids = [int(result.get_response().id) for result, _ in found]
    # Those of the embedded server come as they are ready, which may be in another order.
    assert (ids if client.server.is_triton else sorted(ids)) == list(range(20))


@covers("start_stream", "async_stream_infer", "stop_stream", kinds=("grpc",))
async def test_a_stream_with_a_callback(client: Client) -> None:
    found = await answers(client, [{"model_name": "repeat", "inputs": count(client, 2)}], 2)
    assert numbers(found) == [0, 1]


@covers("stream_infer", kinds=("grpc.aio",))
async def test_a_stream_with_an_iterator(client: Client) -> None:
    found = await answers(client, [{"model_name": "repeat", "inputs": count(client, 2)}], 2)
    assert numbers(found) == [0, 1]


@covers("start_stream", "async_stream_infer", "stop_stream", kinds=("grpc",))
async def test_a_stream_with_compression_and_headers(client: Client) -> None:
    arrived: asyncio.Queue[Answer] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    client.method("start_stream")(
        lambda result, error: loop.call_soon_threadsafe(arrived.put_nowait, (result, error)),
        headers={"x-anything": "1"},
        compression_algorithm="gzip",
    )
    client.method("async_stream_infer")("simple", pair(client))
    result, error = await asyncio.wait_for(arrived.get(), 30)
    client.method("stop_stream")()
    assert error is None
    check_pair(result)
