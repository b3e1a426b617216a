"""Promise: what changes in the repository's directory is served when it can be; until then what was there before is."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.backend.control import Control
from proxy.backend.errors import Code, InferenceError
from proxy.backend.loading import mark
from proxy.backend.repository import _LOADERS, Repository
from tests.backend import rendezvous
from tests.backend.models import NUMBER_TO_NUMBER, WAITS
from tests.backend.repositories import BROKEN, answers, ask, calls, index, until, write


@pytest.fixture
async def repository(tmp_path: Path) -> AsyncIterator[Repository]:
    """One in mode poll, with the model `m`, which answers 1."""
    write(tmp_path / "models/m", answers(1))
    made = Repository(tmp_path / "models", Control("poll", poll_seconds=0.01))
    await made.load()
    yield made
    rendezvous.release.set()
    await asyncio.to_thread(made.close, 10)


async def test_a_model_is_added_changed_and_removed(repository: Repository) -> None:
    path = repository.path
    write(path / "other", answers(5))
    with pytest.raises(InferenceError, match="'other' is not found"):
        repository.find("other", "")
    await repository.poll()
    assert (await ask(repository, "m"), await ask(repository, "other")) == (1, 5)
    write(path / "other", answers(6))
    await repository.poll()
    assert await ask(repository, "other") == 6
    shutil.rmtree(path / "other")
    await repository.poll()
    with pytest.raises(InferenceError, match="'other' has no available versions") as gone:
        repository.find("other", "")
    assert gone.value.code is Code.NOT_FOUND
    await until(lambda: index(repository) == [("m", "1", "READY", "")])
    assert "other" not in repository.models
    assert await ask(repository, "m") == 1
    write(path / "other", answers(7))
    await repository.poll()
    assert await ask(repository, "other") == 7


async def test_watch_looks_by_itself(repository: Repository) -> None:
    watching = asyncio.create_task(repository.watch())
    write(repository.path / "m", answers(2))
    while await ask(repository, "m") != 2:
        await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_watch_outlives_what_nobody_thought_of(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("proxy.backend.threads.Thread", NoThread)
        watching = asyncio.create_task(repository.watch())
        await until(lambda: "RuntimeError: can't start new thread; what is loaded stays" in caplog.text)
    write(repository.path / "m", answers(2))
    while await ask(repository, "m") != 2:
        await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_an_entry_that_cannot_be_read_is_left_out(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    path = repository.path
    for odd in (path / "odd", path / "other/2"):
        odd.parent.mkdir(exist_ok=True)
        odd.symlink_to("a" * 300)
    write(path / "other", answers(5))
    for _ in range(3):
        await repository.poll()
    assert (await ask(repository, "m"), await ask(repository, "other")) == (1, 5)
    assert [line[0] for line in index(repository)] == ["m", "other"]
    for odd in ("odd", "other/2"):
        assert caplog.text.count(f"{path}/{odd} is left out: it cannot be read: File name too long") == 1


async def test_names_that_come_and_go_leave_nothing(repository: Repository) -> None:
    for number in range(5):
        path = write(repository.path / f"job{number}", BROKEN if number % 2 else answers(number))
        await repository.poll()
        shutil.rmtree(path)
    await repository.poll()
    await until(lambda: list(repository.models) == ["m"])
    assert index(repository) == [("m", "1", "READY", "")]
    tasks = asyncio.all_tasks()
    assert await repository._look() == []
    assert asyncio.all_tasks() == tasks


async def test_a_model_that_is_back_before_it_is_unloaded(repository: Repository) -> None:
    rendezvous.reset()
    model = write(repository.path / "waits", WAITS)
    await repository.poll()
    call = asyncio.create_task(ask(repository, "waits", sent=1))
    await until(lambda: rendezvous.ran == [1])
    away = model.rename(repository.path.with_name("away"))
    await repository.poll()
    assert ("waits", "1", "UNLOADING", "") in index(repository)
    away.rename(model)
    await repository.poll()
    rendezvous.release.set()
    assert await call == 1
    await until(lambda: rendezvous.finalized == ["waits"])
    assert await ask(repository, "waits", sent=2) == 2


async def test_version_0_is_not_found(repository: Repository) -> None:
    with pytest.raises(InferenceError, match=r"^Request for unknown model: 'm' version 0 is not found$") as unknown:
        repository.find("m", "0")
    assert unknown.value.code is Code.NOT_FOUND
    assert not repository.is_ready("m", "0")


async def test_watch_outlives_a_directory_that_is_gone(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    watching = asyncio.create_task(repository.watch())
    away = repository.path.with_name("away")
    repository.path.rename(away)
    while "what is loaded stays" not in caplog.text:
        await asyncio.sleep(0.01)
    assert await ask(repository, "m") == 1
    write(away / "m", answers(3))
    away.rename(repository.path)
    while await ask(repository, "m") != 3:
        await asyncio.sleep(0.01)
    assert caplog.text.count("what is loaded stays") == 1
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_nothing_is_loaded_anew_without_a_change(repository: Repository) -> None:
    before = repository.find("m", "")
    (repository.path / "m/1/__pycache__").mkdir()
    (repository.path / "m/1/__pycache__/model.cpython-311.pyc").write_bytes(b"x")
    (repository.path / "m/.model.py.swp").touch()
    await repository.poll()
    await repository.load()
    assert repository.find("m", "") is before


CHANGES = {
    "a file's content": lambda model: (model / "1/model.py").write_text(answers(1) + "# more"),
    "a file of the same size": lambda model: (model / "1/model.py").write_text(answers(8)),
    "a time": lambda model: os.utime(model / "1/model.py", ns=(1, 1)),
    "labels": lambda model: (model / "labels.txt").touch(),
    "a version": lambda model: write(model, answers(2), version=2),
    "an empty version": lambda model: (model / "7").mkdir(),
    "a file in a folder": lambda model: ((model / "1/data").mkdir(), (model / "1/data/x").touch()),
    "no config": lambda model: (model / "config.pbtxt").unlink(),
    "a link": lambda model: (model / "1/link").symlink_to("nowhere"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_is_a_change(tmp_path: Path, change: object) -> None:
    model = write(tmp_path / "m", answers(1))
    before = mark(model)
    assert mark(model) == before
    assert callable(change)
    change(model)
    assert mark(model) != before


def test_links_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    model = write(tmp_path / "m", answers(1))
    for number in range(6):
        (model / f"1/loop{number}").symlink_to("..")
    assert mark(model) == mark(model)


async def test_a_broken_reload_keeps_the_old_version(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    model = repository.path / "m"
    write(model, BROKEN)
    await repository.poll()
    assert await ask(repository, "m") == 1
    (line,) = index(repository)
    assert line[:3] == ("m", "1", "READY")
    assert "m/1/model.py:1: ValueError: boom" in line[3]
    assert "model m could not be reloaded; version 1 stays as it is" in caplog.text
    caplog.clear()
    await repository.poll()
    assert caplog.text == ""  # not tried again before it changes
    (model / "config.pbtxt").write_text("max_batch_size: x")
    await repository.poll()
    assert await ask(repository, "m") == 1
    assert "m/config.pbtxt:1:17" in index(repository)[0][3]
    write(model, answers(2))
    await repository.poll()
    assert await ask(repository, "m") == 2
    assert index(repository) == [("m", "1", "READY", "")]


async def test_a_new_version_that_is_broken_keeps_the_old_one(repository: Repository) -> None:
    model = write(repository.path / "m", BROKEN, version=2)
    await repository.poll()
    assert await ask(repository, "m") == 1
    first, second = index(repository)
    assert first[:3] == ("m", "1", "READY")
    assert second[:3] == ("m", "2", "UNAVAILABLE")
    assert "ValueError: boom" in second[3]
    assert index(repository, ready_only=True) == [first]
    write(model, answers(4), version=2)
    await repository.poll()
    assert await ask(repository, "m") == 4
    await until(lambda: index(repository) == [("m", "1", "UNAVAILABLE", "unloaded"), ("m", "2", "READY", "")])
    with pytest.raises(InferenceError, match="'m' version 1 is not at ready state") as gone:
        await ask(repository, "m", "1")
    assert gone.value.code is Code.UNAVAILABLE


async def test_a_version_policy_that_changes(repository: Repository) -> None:
    model = repository.path / "m"
    write(model, answers(2), NUMBER_TO_NUMBER + "version_policy { all { } }", version=2)
    await repository.poll()
    assert [await ask(repository, "m", version) for version in ("1", "2", "")] == [1, 2, 2]
    (model / "config.pbtxt").write_text(NUMBER_TO_NUMBER + "version_policy { specific { versions: 1 } }")
    await repository.poll()
    assert await ask(repository, "m") == 1
    assert not repository.is_ready("m", "2")


async def test_half_a_copy_is_tried_again_when_it_goes_on(repository: Repository) -> None:
    model = repository.path / "copied"
    model.mkdir()
    await repository.poll()
    with pytest.raises(InferenceError, match="holds no version directory"):
        repository.find("copied", "")
    (model / "1").mkdir()
    await repository.poll()
    assert "holds no model.onnx or model.py" in index(repository)[0][3]
    (model / "1/model.py").write_text(answers(1)[:40])
    await repository.poll()
    assert "copied/1/model.py" in index(repository)[0][3]
    (model / "1/model.py").write_text(answers(9))
    await repository.poll()
    assert "no input is described" in index(repository)[0][3]
    (model / "config.pbtxt").write_text(NUMBER_TO_NUMBER)
    await repository.poll()
    assert await ask(repository, "copied") == 9


async def test_a_broken_model_that_is_removed_is_forgotten(repository: Repository) -> None:
    model = write(repository.path / "broken", BROKEN)
    await repository.poll()
    assert index(repository)[0][:3] == ("broken", "1", "UNAVAILABLE")
    shutil.rmtree(model)
    await repository.poll()
    assert index(repository) == [("m", "1", "READY", "")]
    with pytest.raises(InferenceError, match="'broken' is not found"):
        repository.find("broken", "")


async def test_a_model_that_hangs_while_it_is_loaded_holds_up_no_other(repository: Repository) -> None:
    rendezvous.reset()
    path = repository.path
    hangs = "from tests.backend import rendezvous\nrendezvous.execute(1)\n"
    write(path / "hangs", hangs + answers(3))
    watching = asyncio.create_task(repository.watch())
    await until(lambda: rendezvous.ran == [1])
    with pytest.raises(InferenceError, match="'hangs' is being loaded"):
        repository.find("hangs", "")
    assert ("hangs", "", "LOADING", "") in index(repository)
    write(path / "m", answers(2))
    while await ask(repository, "m") != 2:
        await asyncio.sleep(0.01)
    rendezvous.release.set()
    await until(lambda: repository.is_ready("hangs", ""))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_models_that_hang_give_their_places_back(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rendezvous.reset()
    monkeypatch.setattr("proxy.backend.repository._PATIENCE", 0.01)
    for name in ("h1", "h2", "h3"):
        hangs = f"from tests.backend import rendezvous\nrendezvous.execute({name[1]})\n"
        write(repository.path / name, hangs + answers(3))
    polling = asyncio.create_task(repository.poll())
    await until(lambda: sorted(rendezvous.ran) == [1, 2, 3])
    await until(lambda: caplog.text.count("others no longer wait for it") == 3)
    write(repository.path / "m", answers(2))
    await repository.poll()
    assert await ask(repository, "m") == 2
    rendezvous.release.set()
    await polling
    assert [await ask(repository, name) for name in ("h1", "h2", "h3")] == [3, 3, 3]
    assert repository._room._value == _LOADERS


async def test_no_call_fails_while_a_model_is_reloaded(repository: Repository) -> None:
    async with calls(repository, "m") as came:
        for number in range(2, 22):
            write(repository.path / "m", answers(number))
            await repository.poll()
            await until(lambda number=number: number in came)  # type: ignore[misc]
    assert [one for one in came if isinstance(one, Exception)] == []
    assert sorted(set(came)) == list(range(1, 22))  # type: ignore[type-var]
    assert await ask(repository, "m") == 21


BATCHED = "max_batch_size: 2 dynamic_batching { } " + NUMBER_TO_NUMBER.replace("dims: 1", "dims: [ ]")
WAITS_BATCHED = WAITS.replace('int(batch["IN"][0])', 'int(batch["IN"].flat[0])')


@pytest.mark.parametrize(("code", "config"), [(WAITS, NUMBER_TO_NUMBER), (WAITS_BATCHED, BATCHED)])
async def test_what_was_accepted_is_run_by_the_version_that_accepted_it(
    repository: Repository, code: str, config: str
) -> None:
    rendezvous.reset()
    model = write(repository.path / "waits", code, config)
    await repository.poll()
    waiting = [asyncio.create_task(ask(repository, "waits", sent=1))]
    await until(lambda: rendezvous.ran == [1])
    waiting += [asyncio.create_task(ask(repository, "waits", sent=number)) for number in (2, 3)]
    await asyncio.sleep(0)
    write(model, answers(9))
    await repository.poll()
    assert await ask(repository, "waits") == 9
    assert not any(call.done() for call in waiting)
    assert rendezvous.finalized == []
    rendezvous.release.set()
    assert await asyncio.gather(*waiting) == [1, 2, 3]
    await until(lambda: rendezvous.finalized == ["waits"])


async def test_what_still_waits_at_the_end_is_told(repository: Repository) -> None:
    rendezvous.reset()
    model = write(repository.path / "waits", WAITS_BATCHED, BATCHED)
    await repository.poll()
    first = asyncio.create_task(ask(repository, "waits", sent=1))
    await until(lambda: rendezvous.ran == [1])
    second = asyncio.create_task(ask(repository, "waits", sent=2))
    await asyncio.sleep(0)
    shutil.rmtree(model)
    await repository.poll()
    assert ("waits", "1", "UNLOADING", "") in index(repository)
    closing = asyncio.create_task(asyncio.to_thread(repository.close, 30))
    with pytest.raises(InferenceError, match="is being unloaded"):
        await second
    assert not first.done()
    rendezvous.release.set()
    assert await first == 1
    await closing
    assert rendezvous.finalized == ["waits"]


async def test_the_code_is_new_and_its_state_is_nobody_elses(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    code = """
import numpy as np
counted = 0
class Model:
    def execute(self, batch):
        global counted
        counted += %d
        return {"OUT": np.array([counted], np.int32)}
"""
    model = repository.path / "counts"
    config = NUMBER_TO_NUMBER + "version_policy { all { } }"
    write(model, code % 1, config)
    write(model, code % 1, config, version=2)
    await repository.poll()
    assert [await ask(repository, "counts", version) for version in ("1", "1", "2")] == [1, 2, 1]
    # The size and the second are the same: a compiled copy would be taken for current, if there were one.
    written = (model / "1/model.py").stat()
    write(model, code % 5, config)
    os.utime(model / "1/model.py", ns=(written.st_atime_ns, written.st_mtime_ns + 1))
    await repository.poll()
    assert await ask(repository, "counts", "1") == 5
    assert not (model / "1/__pycache__").exists()


async def test_nothing_is_left_of_versions_that_were_replaced(repository: Repository) -> None:
    def modules() -> int:
        return sum(name.startswith("tensorgate model") and str(repository.path) in name for name in sys.modules)

    for number in range(5):
        write(repository.path / "m", answers(number))
        await repository.poll()
    await until(lambda: sum(thread.name.startswith("m/1#") for thread in threading.enumerate()) == 1)
    await until(lambda: not repository._retiring)
    gc.collect()
    assert modules() == 1


async def test_models_that_code_looks_up_by_its_module(repository: Repository) -> None:
    more = "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: 'int'\nimport sys\nsys.modules[__name__]\n"
    write(repository.path / "m", answers(2, more))
    await repository.poll()
    assert await ask(repository, "m") == 2


async def test_mode_none_looks_once(tmp_path: Path) -> None:
    write(tmp_path / "m", answers(1))
    repository = Repository(tmp_path)
    await repository.load()
    write(tmp_path / "m", answers(2))
    await repository.watch()  # which ends at once
    assert await ask(repository, "m") == 1
    for change in (repository.load_model("m"), repository.unload_model("m")):
        with pytest.raises(InferenceError, match=r"^explicit model load / unload is not allowed if poll") as refused:
            await change
        assert refused.value.code is Code.UNAVAILABLE
    repository.close(timeout=10)


async def test_bytes_of_requests_are_bounded(tmp_path: Path) -> None:
    rendezvous.reset()
    write(tmp_path / "waits", WAITS)
    repository = Repository(tmp_path, most_bytes_per_model=7)
    await repository.load()
    first = asyncio.create_task(ask(repository, "waits", sent=1))
    await until(lambda: rendezvous.ran == [1])
    with pytest.raises(InferenceError, match="holds 4 bytes of requests; 4 more would exceed its limit of 7"):
        await ask(repository, "waits")
    rendezvous.release.set()
    assert await first == 1
    await asyncio.to_thread(repository.close, 10)


async def test_the_log_names_what_it_serves(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(repository.path / "m", answers(2), NUMBER_TO_NUMBER + "version_policy { all { } }", version=2)
    await repository.poll()
    assert "model m is ready: version 1, 2" in caplog.text
