"""Promise: clients load and unload models where that is allowed, with what they send and nothing else of it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from proxy.backend import control
from proxy.backend.control import Control
from proxy.backend.errors import Code, InferenceError
from proxy.backend.repository import Repository
from tests.backend import rendezvous
from tests.backend.models import WAITS
from tests.backend.onnxfile import onnx_file
from tests.backend.repositories import BROKEN, answers, ask, calls, index, until, write

TENSORS = {
    "input": [{"name": "IN", "data_type": "TYPE_INT32", "dims": [1]}],
    "output": [{"name": "OUT", "data_type": "TYPE_INT32", "dims": [1]}],
}
CONFIG = json.dumps(TENSORS)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Repository]:
    """In mode explicit: `m` answers 1, `waits` when it may, `broken` can't be loaded, `odd` can't be read."""
    rendezvous.reset()
    models = tmp_path / "models"
    write(models / "m", answers(1))
    write(models / "waits", WAITS)
    write(models / "broken", BROKEN)
    write(models / "odd", answers(1), "max_batch_size: x")
    write(models / "empty", answers(1), version=1)
    (models / "empty/1").rename(models / "empty/one")
    made = Repository(models, Control("explicit", startup=["m"]))
    await made.load()
    yield made
    rendezvous.release.set()
    await asyncio.to_thread(made.close, 10)


async def refused(repository: Repository, name: str, code: Code, *args: object) -> str:
    with pytest.raises(InferenceError) as failed:
        await repository.load_model(name, *args)  # type: ignore[arg-type]
    assert failed.value.code is code
    return str(failed.value)


async def test_only_what_is_asked_for_is_loaded_at_the_start(repository: Repository) -> None:
    assert index(repository) == [
        ("broken", "", "", ""),
        ("empty", "", "", ""),
        ("m", "1", "READY", ""),
        ("odd", "", "", ""),
        ("waits", "", "", ""),
    ]
    with pytest.raises(InferenceError, match=r"^Request for unknown model: 'waits' is not found$") as unknown:
        repository.find("waits", "")
    assert unknown.value.code is Code.NOT_FOUND


@pytest.mark.parametrize(("startup", "ready"), [([], []), (["*"], ["a", "b"]), (["a", "a", "none"], ["a"])])
async def test_startup(
    tmp_path: Path, startup: list[str], ready: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, answers(1))
    repository = Repository(tmp_path, Control("explicit", startup=startup))
    await repository.load()
    assert [line[0] for line in index(repository, ready_only=True)] == ready
    assert ("model none is not ready: it is not in the model repository" in caplog.text) == ("none" in startup)
    repository.close(timeout=10)


async def test_load_and_unload(repository: Repository) -> None:
    await repository.load_model("waits")
    rendezvous.release.set()
    assert await ask(repository, "waits", sent=3) == 3
    await repository.unload_model("waits")
    with pytest.raises(InferenceError) as gone:
        repository.find("waits", "")
    assert str(gone.value) == "Request for unknown model: 'waits' has no available versions"
    assert gone.value.code is Code.NOT_FOUND
    with pytest.raises(InferenceError) as gone:
        repository.find("waits", "1")
    assert str(gone.value) == "Request for unknown model: 'waits' version 1 is not at ready state"
    assert gone.value.code is Code.UNAVAILABLE
    await until(lambda: ("waits", "1", "UNAVAILABLE", "unloaded") in index(repository))
    assert ("waits", "1", "UNAVAILABLE", "unloaded") not in index(repository, ready_only=True)
    assert rendezvous.finalized == ["waits"]
    await repository.load_model("waits")
    assert await ask(repository, "waits", sent=4) == 4


async def test_unloading_what_is_not_loaded_is_fine(repository: Repository) -> None:
    before = index(repository)
    for name in ("waits", "nobody", "", "../m"):
        await repository.unload_model(name)
    assert index(repository) == before


async def test_a_model_that_did_not_change_is_left_alone(repository: Repository) -> None:
    before = repository.find("m", "")
    await repository.load_model("m")
    assert repository.find("m", "") is before
    write(repository.path / "m", answers(2))
    await repository.load_model("m")
    assert await ask(repository, "m") == 2


async def test_a_new_directory_can_be_loaded_and_is_listed(repository: Repository) -> None:
    write(repository.path / "new", answers(7))
    assert "new" not in [line[0] for line in index(repository)]
    await repository.refresh()
    assert ("new", "", "", "") in index(repository)
    await repository.load_model("new")
    assert await ask(repository, "new") == 7


@pytest.mark.parametrize("name", ["nope", "", ".", "..", "../models/m", "m/1", "m/", "/etc", "m\n"])
async def test_names_that_are_in_no_listing(repository: Repository, name: str) -> None:
    says = await refused(repository, name, Code.INTERNAL)
    assert says == f"failed to load '{name}', failed to poll from model repository"
    assert name not in repository.models


async def test_models_that_cannot_be_loaded(repository: Repository) -> None:
    says = await refused(repository, "broken", Code.INVALID_ARGUMENT)
    assert says.startswith("load failed for model 'broken': version 1 is at UNAVAILABLE state: broken/1/model.py:1")
    says = await refused(repository, "odd", Code.INTERNAL)
    assert says.startswith("failed to load 'odd', failed to poll from model repository: odd/config.pbtxt:1:17: ")
    says = await refused(repository, "empty", Code.INVALID_ARGUMENT)
    assert "at least one version must be available under the version policy of model 'empty'" in says
    broken, empty, _, odd, _ = index(repository)
    assert broken[:3] == ("broken", "1", "UNAVAILABLE")
    assert "ValueError: boom" in broken[3]
    assert empty[:3] == ("empty", "", "UNAVAILABLE")
    assert odd[:3] == ("odd", "", "UNAVAILABLE")
    assert "odd/config.pbtxt" in odd[3]


async def test_a_broken_reload_keeps_the_old_version(repository: Repository) -> None:
    write(repository.path / "m", BROKEN)
    assert "ValueError: boom" in await refused(repository, "m", Code.INVALID_ARGUMENT)
    assert await ask(repository, "m") == 1
    assert "ValueError: boom" in await refused(repository, "m", Code.INVALID_ARGUMENT)  # asked for again, tried again
    write(repository.path / "m", answers(2))
    await repository.load_model("m")
    assert await ask(repository, "m") == 2


@pytest.mark.parametrize("version", [1, 2])
async def test_an_unload_forgets_a_reload_that_failed(repository: Repository, version: int) -> None:
    write(repository.path / "m", BROKEN, version=version)
    assert "ValueError: boom" in await refused(repository, "m", Code.INVALID_ARGUMENT)
    assert [line[1] for line in index(repository) if line[0] == "m"] == ["1", "2"][:version]
    await repository.unload_model("m")
    with pytest.raises(InferenceError, match=r"^Request for unknown model: 'm' has no available versions$") as gone:
        repository.find("m", "")
    assert gone.value.code is Code.NOT_FOUND
    await until(lambda: ("m", "1", "UNAVAILABLE", "unloaded") in index(repository))
    assert [line for line in index(repository) if line[0] == "m"] == [("m", "1", "UNAVAILABLE", "unloaded")]


async def test_an_unload_keeps_why_a_model_never_served(repository: Repository) -> None:
    await refused(repository, "broken", Code.INVALID_ARGUMENT)
    await repository.unload_model("broken")
    with pytest.raises(InferenceError, match="ValueError: boom"):
        repository.find("broken", "")


async def test_a_config_in_place_of_the_file(repository: Repository) -> None:
    await repository.load_model("m", json.dumps({**TENSORS, "instance_group": [{"count": 3, "kind": "KIND_CPU"}]}))
    assert repository.find("m", "").config.instance_group[0].count == 3
    assert await ask(repository, "m") == 1
    await repository.load_model("m")  # the files are what they were: it stays
    assert repository.find("m", "").config.instance_group[0].count == 3
    write(repository.path / "m", answers(2))
    await repository.load_model("m")
    assert repository.find("m", "").config.instance_group[0].count == 1


async def test_an_empty_config_for_a_model_that_needs_none(repository: Repository) -> None:
    graph = onnx_file("Identity", {"IN": ("INT32", [1])}, {"OUT": ("INT32", [1])})
    await repository.load_model("net", "{}", {"1/model.onnx": graph})
    assert await ask(repository, "net", sent=12) == 12


BAD_CONFIGS: dict[str, tuple[str, str]] = {
    "nothing": ("", "config of 'm': "),
    "no JSON": ("{", "config of 'm': "),
    "a list": ("[]", "config of 'm': "),
    "an unknown field": ('{"max_size": 4}', 'no field named "max_size"'),
    "an unknown field inside": ('{"input": [{"shape": [1]}]}', 'no field named "shape"'),
    "a wrong type": ('{"max_batch_size": "many"}', "max_batch_size"),
    "an infinite number": ('{"max_batch_size": 1e999}', "max_batch_size"),
    "an unknown name": ('{"input": [{"data_type": "TYPE_FLOAT"}]}', "TYPE_FLOAT"),
    "nested without end": ('{"input":' * 20000, "config of 'm': "),
    "digits without end": (f'{{"max_batch_size": {"9" * 5000}}}', "config of 'm': "),
    "much text": (f'{{"{"x" * 100_000}": 1}}', "config of 'm': "),
    "too much text": (" " * 2_000_000, "2000000 characters; at most 1048576"),
    "half a character": ('{"name": "\\ud800"}', "config of 'm': "),
    "another name": ('{"name": "x"}', "name is 'x'"),
    "not supported": ('{"ensemble_scheduling": {}}', "ensemble_scheduling: not supported"),
    "a path": ('{"default_model_filename": "../../m/1/model.py"}', "must be a plain file name"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS.values(), ids=list(BAD_CONFIGS))
async def test_bad_configs(repository: Repository, case: tuple[str, str]) -> None:
    text, part = case
    says = await refused(repository, "m", Code.INTERNAL, text)
    assert says.startswith("failed to load 'm', failed to poll from model repository: ")
    assert part in says
    assert len(says) < 1000
    assert await ask(repository, "m") == 1


FORGED = "x\n2026-11-23T09:00:00Z info forged\x1b[31m"


@pytest.mark.parametrize("field", ["name", FORGED, "backend", "default_model_filename"])
async def test_a_reason_is_one_line(
    repository: Repository, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InferenceError) as failed:
        await repository.load_model("waits", json.dumps({**TENSORS, field: FORGED}))
    assert "x\\n2026-11-23T09:00:00Z info forged\\x1b[31m" in str(failed.value)
    for text in (str(failed.value), *(entry.reason for entry in repository.index(ready_only=False)), *caplog.messages):
        assert text.isprintable()


async def test_a_long_reason_is_cut(repository: Repository) -> None:
    code = b"raise ValueError('\\n' * 10_000_000)\n"
    await refused(repository, "waits", Code.INVALID_ARGUMENT, CONFIG, {"1/model.py": code})
    (entry,) = [entry for entry in repository.index(ready_only=False) if entry.name == "waits"]
    assert entry.reason.isprintable()
    assert entry.reason.endswith("...")
    assert len(entry.reason) == 2003


async def test_files_of_a_client(repository: Repository, temporary: Path) -> None:
    await repository.load_model("m", CONFIG, {"7/model.py": answers(7).encode(), "labels.txt": b"a"})
    assert await ask(repository, "m") == 7
    assert repository.find("m", "").spec.version == 7
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not list(folder.glob("*/1"))  # nothing of the repository's
    await repository.load_model("m")
    assert await ask(repository, "m") == 1
    await until(lambda: not list(temporary.iterdir()))
    assert not repository.is_ready("m", "7")


async def test_a_model_that_is_in_no_directory(repository: Repository, temporary: Path) -> None:
    await repository.load_model("mine", CONFIG, {"1/model.py": answers(3).encode()})
    assert await ask(repository, "mine") == 3
    assert ("mine", "1", "READY", "") in index(repository)
    await repository.unload_model("mine")
    await until(lambda: ("mine", "1", "UNAVAILABLE", "unloaded") in index(repository))
    assert not list(temporary.iterdir())
    says = await refused(repository, "mine", Code.INTERNAL)
    assert says == "failed to load 'mine', failed to poll from model repository"


async def test_files_are_gone_when_the_last_request_is_answered(repository: Repository, temporary: Path) -> None:
    await repository.load_model("mine", CONFIG, {"1/model.py": WAITS.encode()})
    call = asyncio.create_task(ask(repository, "mine", sent=5))
    await until(lambda: rendezvous.ran == [5])
    await repository.unload_model("mine")
    assert ("mine", "1", "UNLOADING", "") in index(repository)
    assert list(temporary.iterdir())
    rendezvous.release.set()
    assert await call == 5
    await until(lambda: not list(temporary.iterdir()))


async def test_files_are_gone_when_the_server_ends(repository: Repository, temporary: Path) -> None:
    await repository.load_model("mine", CONFIG, {"1/model.py": answers(1).encode()})
    await asyncio.to_thread(repository.close, 10)
    assert not list(temporary.iterdir())


async def test_files_are_gone_when_the_load_fails(repository: Repository, temporary: Path) -> None:
    for content, code, config in (
        (BROKEN.encode(), Code.INVALID_ARGUMENT, CONFIG),
        (answers(1).encode(), Code.INTERNAL, '{"max_size": 1}'),
    ):
        await refused(repository, "mine", code, config, {"1/model.py": content})
        assert not list(temporary.iterdir())
    await refused(repository, "m", Code.INVALID_ARGUMENT, CONFIG, {"1/model.py": BROKEN.encode()})
    assert await ask(repository, "m") == 1


PATHS = [
    "../x/model.py", "/etc/x", "1/../../x", "1//model.py", "1/./model.py", "", "/", "..", ".", "1/", "1/..", "1/a\0b",
    "1\\model.py", "1/a\nb", "a/" * 20 + "x", "1/" + "x" * 300, "1/" + "\u6c49" * 100, "1/\ud800",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
async def test_paths_that_are_refused(repository: Repository, tmp_path: Path, temporary: Path, path: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    says = await refused(repository, "m", Code.INTERNAL, CONFIG, {"1/model.py": b"", path: b"evil"})
    assert says.startswith("failed to load 'm', failed to poll from model repository: file:")
    assert says.isprintable()
    assert len(says) < 400
    assert sorted(tmp_path.rglob("*")) == before


async def test_files_that_are_in_each_others_way(repository: Repository, temporary: Path) -> None:
    for files in ({"1": b"", "1/model.py": b""}, {"1/model.py": b"", "1": b""}):
        says = await refused(repository, "m", Code.INTERNAL, CONFIG, files)
        assert "files cannot be written" in says
        assert not list(temporary.iterdir())


async def test_files_are_taken_with_a_config_only_and_within_limits(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "with a config only" in await refused(repository, "m", Code.INTERNAL, None, {"1/model.py": b""})
    many = {f"1/{number}": b"" for number in range(1025)}
    assert "1025 files; at most 1024" in await refused(repository, "m", Code.INTERNAL, CONFIG, many)
    monkeypatch.setattr(control, "_MOST_BYTES", 10)
    says = await refused(repository, "m", Code.INTERNAL, CONFIG, {"1/a": b"123456", "1/b": b"123456"})
    assert "files of 12 bytes; at most 10" in says


@pytest.mark.parametrize("name", ["", "a/b", "../m", ".hidden", "a\nb", "a\0b", "x" * 256, "\ud800"])
async def test_names_that_no_model_gets(repository: Repository, name: str) -> None:
    says = await refused(repository, name, Code.INTERNAL, CONFIG, {"1/model.py": answers(1).encode()})
    assert "a model's name is" in says
    assert name not in repository.models


async def test_names_that_clients_choose_are_bounded(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.backend.repository._MOST_UNLISTED", 2)
    files = {"1/model.py": answers(1).encode()}
    for name in ("a", "b"):
        await repository.load_model(name, CONFIG, files)
    says = await refused(repository, "c", Code.RESOURCE_EXHAUSTED, CONFIG, files)
    assert "2 models that are not in the repository" in says
    await repository.load_model("a", CONFIG, {"1/model.py": answers(5).encode()})
    assert await ask(repository, "a") == 5
    await repository.unload_model("b")
    await repository.load_model("c", CONFIG, files)
    assert await ask(repository, "c") == 1
    assert "b" not in repository.models


async def test_names_that_came_to_nothing_are_in_nobodys_way(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.backend.repository._MOST_UNLISTED", 2)
    for number in range(5):
        await refused(repository, f"x{number}", Code.INVALID_ARGUMENT, CONFIG, {"1/model.py": BROKEN.encode()})
    assert [name for name in repository.models if name[0] == "x"] == ["x3", "x4"]


async def test_versions_that_clients_choose_are_bounded(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.backend.state._MOST_GONE", 2)
    for number in range(1, 12):
        await repository.load_model("a", CONFIG, {f"{number}/model.py": answers(number).encode()})
        await refused(repository, "a", Code.INVALID_ARGUMENT, CONFIG, {f"{number}0/model.py": BROKEN.encode()})
        assert await ask(repository, "a") == number
    assert len(repository.models["a"].versions) <= 5


async def test_no_call_fails_while_a_model_is_reloaded(repository: Repository) -> None:
    async with calls(repository, "m") as came:
        for number in range(2, 22):
            await repository.load_model("m", CONFIG, {"1/model.py": answers(number).encode()})
            await until(lambda number=number: number in came)  # type: ignore[misc]
    assert [one for one in came if isinstance(one, Exception)] == []
    assert sorted(set(came)) == list(range(1, 22))  # type: ignore[type-var]


async def test_calls_while_a_model_is_unloaded_and_loaded(repository: Repository) -> None:
    async with calls(repository, "m") as came:
        for _ in range(20):
            await repository.unload_model("m")
            await repository.load_model("m")
            seen = len(came)
            await until(lambda seen=seen: len(came) > seen + 8)  # type: ignore[misc]
    faults = {(one.code, str(one)) for one in came if isinstance(one, InferenceError)}
    assert faults <= {
        (Code.NOT_FOUND, "Request for unknown model: 'm' has no available versions"),
        (Code.UNAVAILABLE, "model 'm' is being loaded"),
    }
    assert {one for one in came if not isinstance(one, InferenceError)} == {1}


async def test_changes_of_one_model_come_one_after_the_other(repository: Repository) -> None:
    files: Callable[[int], dict[str, bytes]] = lambda number: {"1/model.py": answers(number).encode()}  # noqa: E731
    both = [repository.load_model("m", CONFIG, files(number)) for number in range(2, 10)]
    both.insert(4, repository.unload_model("m"))
    await asyncio.gather(*both)
    assert await ask(repository, "m") == 9
    await until(lambda: not repository._retiring)
    assert index(repository, ready_only=True) == [("m", "1", "READY", "")]


HANGS = b"from tests.backend import rendezvous\nrendezvous.execute(1)\n"


async def test_a_load_goes_on_when_its_caller_leaves(repository: Repository, temporary: Path) -> None:
    loading = asyncio.create_task(repository.load_model("m", CONFIG, {"1/model.py": HANGS + answers(8).encode()}))
    await until(lambda: rendezvous.ran == [1])
    waiting = asyncio.create_task(repository.load_model("m", CONFIG, {"1/model.py": answers(9).encode()}))
    await asyncio.sleep(0.05)
    for call in (loading, waiting):
        call.cancel()
    await asyncio.gather(loading, waiting, return_exceptions=True)
    assert await ask(repository, "m") == 1
    rendezvous.release.set()
    await until(lambda: not repository.models["m"].loading)
    assert await ask(repository, "m") == 8
    await repository.load_model("m")
    assert await ask(repository, "m") == 1


async def test_only_so_many_are_loaded_at_a_time(repository: Repository) -> None:
    loads = [
        asyncio.create_task(repository.load_model(name, CONFIG, {"1/model.py": HANGS + answers(8).encode()}))
        for name in ("a", "b", "c")
    ]
    await until(lambda: rendezvous.ran == [1, 1])
    await asyncio.sleep(0.1)
    assert rendezvous.ran == [1, 1]
    assert await ask(repository, "m") == 1
    rendezvous.release.set()
    await asyncio.gather(*loads)
    assert [await ask(repository, name) for name in ("a", "b", "c")] == [8, 8, 8]


async def test_a_load_that_ends_after_the_server_leaves_nothing(repository: Repository, temporary: Path) -> None:
    loading = asyncio.create_task(repository.load_model("a", CONFIG, {"1/model.py": HANGS + answers(8).encode()}))
    await until(lambda: rendezvous.ran == [1])
    await asyncio.to_thread(repository.close, 10)
    rendezvous.release.set()
    with pytest.raises(InferenceError, match="shutting down"):
        await loading
    assert not list(temporary.iterdir())
    assert not repository.is_ready("a", "")
